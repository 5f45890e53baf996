"""Parameter groups, AdamW and clipping on a small learner."""

import pytest
import torch

from pretrain.build import build_learner
from pretrain.config import HeadsConfig, ModelConfig, OptimConfig
from pretrain.optim import build_optimizer, clip_gradients, set_schedule
from pretrain.schedules import StepValues

HEADS = HeadsConfig(num_prototypes=16, hidden=32, bottleneck=8)


def learner(**model):
    return build_learner(ModelConfig(arch="vit_nano", patch_size=8, **model), HEADS, image_size=32, seed=0)


def factors(optim: OptimConfig, student) -> dict[str, dict]:
    """Parameter name -> its group in the optimizer."""
    names = {id(p): name for name, p in student.named_parameters()}
    groups = build_optimizer(student, optim).param_groups
    return {names[id(p)]: group for group in groups for p in group["params"]}


def test_every_parameter_is_in_exactly_one_group():
    student = learner(num_registers=2)
    groups = build_optimizer(student, OptimConfig(layer_decay=0.9)).param_groups
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in student.parameters())


def test_no_decay_on_biases_norms_and_gammas_but_on_tokens():
    found = factors(OptimConfig(), learner(num_registers=2))
    for name, group in found.items():
        exempt = name.endswith("bias") or "norm" in name or "gamma" in name
        assert group["wd_factor"] == (0.0 if exempt else 1.0), name
    assert found["backbone.cls_token"]["wd_factor"] == 1.0  # as the reference code has it
    assert found["backbone.pos_embed"]["wd_factor"] == 1.0


def test_layer_decay_counts_from_the_top():
    found = factors(OptimConfig(layer_decay=0.5, patch_embed_lr=0.2), learner())
    assert found["backbone.norm.weight"]["lr_factor"] == 1.0
    assert found["backbone.blocks.3.attn.qkv.weight"]["lr_factor"] == 0.5
    assert found["backbone.blocks.0.attn.qkv.weight"]["lr_factor"] == 0.5**4
    assert found["backbone.pos_embed"]["lr_factor"] == 0.5**5
    assert found["backbone.patch_embed.proj.weight"]["lr_factor"] == pytest.approx(0.2 * 0.5**5)
    assert found["dino_head.mlp.0.weight"]["lr_factor"] == 1.0


def test_the_frozen_last_layer_does_not_move():
    student = learner()
    optimizer = build_optimizer(student, OptimConfig())
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    set_schedule(
        optimizer,
        StepValues(lr=0.1, weight_decay=0.0, momentum=0.9, temperature=0.04, last_layer_lr=0.0, backbone_lr=0.1),
    )
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in student.named_parameters():
        assert torch.equal(p, before[name]) == ("prototypes" in name), name


def test_modules_are_clipped_apart():
    student = learner()
    for p in student.parameters():
        p.grad = torch.full_like(p, 1e-3)
    student.dino_head.mlp[0].weight.grad.fill_(100.0)
    small = student.backbone.norm.weight.grad.clone()
    norms = clip_gradients(student, 1.0)
    assert set(norms) == {"grad_norm/backbone", "grad_norm/dino_head", "grad_norm/ibot_head"}
    assert norms["grad_norm/dino_head"] > 1000
    clipped = torch.cat([p.grad.flatten() for p in student.dino_head.parameters()]).norm()
    assert clipped == pytest.approx(1.0, rel=1e-3)
    assert torch.equal(student.backbone.norm.weight.grad, small)  # its own norm is below the limit


def test_a_tied_head_is_clipped_once_and_has_one_group_entry():
    student = learner()
    student.ibot_head = None  # one head for both losses
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    count = sum(p.numel() for p in student.dino_head.parameters())
    norms = clip_gradients(student, 1.0)
    assert set(norms) == {"grad_norm/backbone", "grad_norm/dino_head"}
    assert norms["grad_norm/dino_head"] == pytest.approx(count**0.5, rel=1e-4)
    ids = [id(p) for group in build_optimizer(student, OptimConfig()).param_groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in student.parameters())


def test_no_clipping_leaves_gradients_and_still_measures():
    student = learner()
    for p in student.parameters():
        p.grad = torch.full_like(p, 100.0)
    student.dino_head.mlp[0].weight.grad = None  # a parameter that no loss reached
    norms = clip_gradients(student, 0.0)
    assert all(value > 100 for value in norms.values())
    assert all((p.grad == 100).all() for p in student.parameters() if p.grad is not None)


def test_the_frozen_backbone_does_not_move_and_its_moments_do():
    student = learner(num_registers=2)
    optimizer = build_optimizer(student, OptimConfig())
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    set_schedule(
        optimizer,
        StepValues(lr=0.1, weight_decay=0.1, momentum=0.9, temperature=0.04, last_layer_lr=0.1, backbone_lr=0.0),
    )
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in student.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("backbone."), name
    assert all(optimizer.state[p]["exp_avg"].abs().sum() > 0 for p in student.backbone.parameters())


def test_fused_adamw_equals_the_formula():
    """Loshchilov and Hutter 2019, algorithm 2, with the factors of each group."""
    optim = OptimConfig(layer_decay=0.5, beta2=0.99)
    student = learner()
    optimizer = build_optimizer(student, optim)
    expected = {name: p.detach().clone().double() for name, p in student.named_parameters()}
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in expected.items()}
    groups = factors(optim, student)
    values = StepValues(lr=0.01, weight_decay=0.3, momentum=0.9, temperature=0.04, last_layer_lr=0.01, backbone_lr=0.01)
    for step in (1, 2, 3):
        set_schedule(optimizer, values)
        for name, p in student.named_parameters():
            p.grad = torch.sin(torch.arange(p.numel()) + step).view_as(p)
            m, v = moments[name]
            g = p.grad.double()
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.99).add_(0.01 * g * g)
            lr, decay = 0.01 * groups[name]["lr_factor"], 0.3 * groups[name]["wd_factor"]
            expected[name] -= lr * decay * expected[name]
            expected[name] -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        optimizer.step()
    for name, p in student.named_parameters():
        assert torch.allclose(p.double(), expected[name], atol=1e-6), name


def test_same_seed_same_weights():
    one, two = learner(), learner()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
