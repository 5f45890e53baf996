"""Stages of a run: which config each has, and what a stage may not change."""

import pytest

from pretrain.config import GramConfig, LossConfig, PretrainConfig, StageConfig, TrainConfig
from pretrain.gram import check, is_snapshot, teacher_folder, weight
from pretrain.stages import resolve, total_steps
from runtime.errors import UserError

RUN = PretrainConfig(
    out="run",
    train=TrainConfig(steps=100),
    gram=GramConfig(keep_at=0.2, update_every=10, max_updates=2),
    stages=(
        StageConfig("gram", 40, {"loss.gram": 2.0, "loss": {"dino_local": 0.5}, "train.batch_size": 64}),
        StageConfig("high_res", 20, {"loss.gram": 1.5, "crops.global_size": 448, "teacher.warmup": 0.5}),
    ),
)


def test_a_stage_is_the_runs_config_with_its_keys_changed():
    first, gram, high = resolve(RUN)
    assert [(s.name, s.start, s.end) for s in (first, gram, high)] == [
        ("pretrain", 0, 100),
        ("gram", 100, 140),
        ("high_res", 140, 160),
    ]
    assert total_steps(RUN) == 160
    assert first.config.stages == ()
    assert (gram.config.loss.gram, gram.config.loss.dino_local, gram.config.train.batch_size) == (2.0, 0.5, 64)
    assert (high.config.loss.dino_local, high.config.crops.global_size) == (1.0, 448)
    assert gram.config.model == first.config.model


def test_a_later_stage_starts_warm_unless_it_says_otherwise():
    first, gram, high = resolve(RUN)
    assert first.config.optim.freeze_last_layer > 0
    assert (gram.config.optim.freeze_last_layer, gram.config.teacher.warmup) == (0.0, 0.0)
    assert high.config.teacher.warmup == 0.5


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (StageConfig("a", 1, {"loss": 3}), r"stages\[0\].set: loss cannot change"),
        (StageConfig("a", 1, {"model.arch": "vit_base"}), "model.arch cannot change between stages"),
        (StageConfig("a", 1, {"train.steps": 3}), r"give stages\[\].steps"),
        (StageConfig("a", 1, {"loss.gramm": 1.0}), "did you mean loss.gram?"),
        (StageConfig("a", 1, {"loss.gram": "much"}), r"stages\[0\].set: loss.gram: found 'much'"),
        (StageConfig("a", 0), r"stages\[0\].steps: found 0"),
        (StageConfig("", 1), "expected a name of its own"),
        (StageConfig("pretrain", 1), "expected a name of its own"),
    ],
)
def test_wrong_stages_are_one_clear_line(stage, message):
    with pytest.raises(UserError, match=message):
        resolve(PretrainConfig(stages=(stage,)))


def test_gram_weight_rises_along_half_a_cosine():
    config = PretrainConfig(train=TrainConfig(steps=100), loss=LossConfig(gram=2.0, gram_warmup=0.1))
    assert [weight(step, config) for step in (0, 10, 99)] == [0.0, 2.0, 2.0]
    assert weight(5, config) == pytest.approx(1.0)


def test_the_early_teacher_is_kept_and_then_replaced_twice_at_most(tmp_path):
    """DINOv3 sec. 4.2: an early teacher first, then the EMA every so many steps, a limited number of times."""
    first, gram, high = resolve(RUN)
    assert [step for step in range(1, 161) if any(s.start < step <= s.end and is_snapshot(step, s)
            for s in (first, gram, high))] == [20, 110, 120, 150]  # fmt: skip
    assert teacher_folder(50, first, first, tmp_path) is None
    found = [teacher_folder(step, gram, first, tmp_path).name for step in (100, 109, 110, 119, 120, 139)]
    assert found == [f"step-{n:08d}" for n in (20, 20, 110, 110, 120, 120)]
    assert teacher_folder(140, high, first, tmp_path).name == "step-00000020"


def test_a_stage_with_nothing_to_anchor_to_is_refused():
    alone = PretrainConfig(loss=LossConfig(gram=1.0))
    with pytest.raises(UserError, match=r"loss.gram: stage pretrain has no Gram teacher\n  give gram.teacher"):
        check(resolve(alone))
    check(resolve(PretrainConfig(loss=LossConfig(gram=1.0), gram=GramConfig(teacher="export"))))
    check(resolve(RUN))


def test_high_resolution_may_anchor_to_the_stage_before(tmp_path):
    """DINOv3 app. C: at high resolution the finished model is the Gram teacher."""
    stages = resolve(PretrainConfig(
        train=TrainConfig(steps=5), stages=(StageConfig("high_res", 5, {"loss.gram": 1.5, "gram.teacher": "previous"}),)
    ))  # fmt: skip
    check(stages)
    assert teacher_folder(7, stages[1], stages[0], tmp_path) == tmp_path / "exports" / "step-00000005"
    with pytest.raises(UserError, match="stage pretrain has no Gram teacher"):
        check(resolve(PretrainConfig(loss=LossConfig(gram=1.0), gram=GramConfig(teacher="previous"))))
