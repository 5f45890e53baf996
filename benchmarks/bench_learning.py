"""Does it learn? k-NN accuracy after minutes on one CPU core, beside features nobody trained and LightlyTrain's DINOv2.

Both programs train at the same time, each on one thread of a core of its own, loader included, on the same images, for
the same wall time (a short run of each sets its number of steps). Judged is the EMA teacher of both, by the class token
after the last norm. LightlyTrain trains the same architecture: in round 0 with our settings wherever it has keys for
them, in round 1 with its own (but for sizes, prototypes and the lengths of its warm-ups). The seed is the round's
number. No label is used in training; the settings were chosen with these evaluation sets in sight (docs/learning.md).

    troodon curate default source.paths=[POOL] guard.paths=[EVAL/a,EVAL/b] out=runs/curated
    python benchmarks/bench_learning.py --shards runs/curated/shards --eval EVAL/a EVAL/b --lightly LT/bin/python

LT is a virtual environment with `pip install lightly-train`; without --lightly ours runs alone.
Writes benchmarks/results/learning.json.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from learning_runs import Command, baselines, judge, our_curve, ours, together, versions  # beside this file
from safetensors.torch import load_file

from pretrain.build import ARCHS
from pretrain.config import PretrainConfig
from pretrain.data.shards import ShardSet
from pretrain.export import load_backbone, read_export, write_export
from pretrain.loop import choose_precision
from runtime.config import load
from runtime.environment import describe
from runtime.files import write_json
from runtime.progress import say

HERE = Path(__file__).parent
RATE_STEPS, RATE_POINTS = 80, 4  # of the short runs
RECIPES = ("ours", "defaults")  # of LightlyTrain, by round
NAMED_MODELS = {"init_values": 1e-5, "drop_path_rate": 0.1, "num_register_tokens": 4}  # as its own ViTs have them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="images to train on, of `troodon curate`")
    parser.add_argument("--eval", nargs="+", required=True, help="labelled folders")
    parser.add_argument("--config", default="tiny", help="preset or YAML of our run")
    parser.add_argument("--set", nargs="*", default=[], help="key=value of our run")
    parser.add_argument("--minutes", type=float, default=25, help="wall time of a training, from start to exit")
    parser.add_argument("--lightly", help="the Python of an environment with lightly-train")
    parser.add_argument("--rounds", type=int, default=len(RECIPES))
    parser.add_argument("--cores", type=int, nargs=2, default=[0, 1], help="of our process and of LightlyTrain's")
    parser.add_argument("--points", type=int, default=6, help="of a curve")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_learning"))
    parser.add_argument("--json", type=Path, default=HERE / "results" / "learning.json")
    args = parser.parse_args()
    load_before = os.getloadavg()[0]
    num_images = len(ShardSet.open([str(args.shards)]))
    if args.lightly:
        write_images(args.shards, args.out / "images")
    trained = [train_round(args, number) for number in range(args.rounds)]
    runs = [run for number, each in enumerate(trained) for run in judge_round(args, number, each)]
    random = baselines(args.out / runs[0]["curve"][-1]["export"])
    result = {
        "question": "how good are features by k-NN after minutes of training on one CPU core, beside features that "
        "nobody trained and LightlyTrain's DINOv2 in the same wall time?",
        "date": time.strftime("%Y-%m-%d"),
        "load_average_before": load_before,
        "minutes": args.minutes,
        "images": num_images,
        "config": [args.config, *args.set],
        "knn": "percent, with the 95 % bootstrap interval over test images",
        "baselines": {name: judge(model, args.eval) for name, model in random.items()},
        "runs": runs,
        "lightly_versions": versions(args.lightly, ["lightly-train", "torch"]) if args.lightly else None,
        "environment": describe(),
    }
    write_json(args.json, result)
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))


def write_images(shards: Path, folder: Path) -> None:
    """The images of the shards as files, which is what LightlyTrain reads."""
    found = ShardSet.open([str(shards)])
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(len(found)):
        (folder / f"{number:06d}.jpg").write_bytes(found.read(number)[1])


def train_round(args: argparse.Namespace, number: int) -> dict[str, dict[str, float]]:
    """One training of each program, side by side; steps and seconds of each."""
    steps = plan(args, number)
    say(f"round {number}: steps {steps}")
    seconds = together(commands(args, number, steps, "train", args.points))
    return {name: {"steps": steps[name], **used} for name, used in seconds.items()}


def judge_round(args: argparse.Namespace, number: int, trained: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """The trainings of a round with their curves."""
    size = load(PretrainConfig, args.config, args.set).train.batch_size
    runs = []
    for name, used in trained.items():
        curve = [
            {
                "minutes": round((when - used["started"]) / 60, 2),
                "images": step * size,
                "knn": judge(export, args.eval),
                "export": str(export.relative_to(args.out)),
            }
            for step, when, export in checkpoints_of(args, name, number)
        ]
        settings = recipe_of(number) if name == "lightly" else "ours"
        spent = {key: value for key, value in used.items() if key != "started"}
        runs.append({"program": name, "settings": settings, "seed": number, **spent, "curve": curve})
    return runs


def plan(args: argparse.Namespace, number: int) -> dict[str, int]:
    """Steps that each program makes in the time, from a short run of both at once."""
    short: dict[str, int] = dict.fromkeys(("ours", "lightly"), RATE_STEPS)
    steps = {}
    for name, used in together(commands(args, number, short, "rate", RATE_POINTS)).items():
        written = [path.stat().st_mtime for _, path in checkpoint_paths(folder(args, name, number, "rate"))]
        step = (written[-1] - written[0]) / RATE_STEPS * RATE_POINTS / (RATE_POINTS - 1)
        left = 60 * args.minutes - (used["wall"] - RATE_STEPS * step)
        steps[name] = int(left / step) // args.points * args.points
    return steps


def commands(args: argparse.Namespace, number: int, steps: dict[str, int], kind: str, points: int) -> list[Command]:
    """Our command of a round, and LightlyTrain's beside it."""
    settings = [*args.set, f"data.shards=[{args.shards}]", f"seed={number}"]
    out = folder(args, "ours", number, kind)
    found = [ours("ours", args.config, settings, out=out, steps=steps["ours"], points=points, core=args.cores[0])]
    if args.lightly:
        out = folder(args, "lightly", number, kind)
        shutil.rmtree(out, ignore_errors=True)
        config = load(PretrainConfig, args.config, args.set)
        told = lightly_settings(config, recipe_of(number), steps=steps["lightly"], points=points)
        told["pretrain"] |= {"out": str(out), "data": str(args.out / "images"), "seed": number}
        write_json(out.with_suffix(".json"), told)
        words = [args.lightly, str(HERE / "lightly_dinov2.py"), "train", str(out.with_suffix(".json"))]
        found.append(Command("lightly", words, out.with_suffix(".log"), args.cores[1]))
    return found


def recipe_of(number: int) -> str:
    """LightlyTrain's settings in a round."""
    return RECIPES[number % len(RECIPES)]


def folder(args: argparse.Namespace, name: str, number: int, kind: str) -> Path:
    return args.out / f"{name}-{number}-{kind}"


def lightly_settings(config: PretrainConfig, recipe: str, *, steps: int, points: int) -> dict[str, Any]:
    """What LightlyTrain is told: our architecture, sizes and lengths; with recipe `ours` all that it has keys for."""
    width, depth, heads, _ = ARCHS[config.model.arch]
    crops, teacher, optim = config.crops, config.teacher, config.optim
    model = {
        "img_size": crops.global_size,
        "patch_size": config.model.patch_size,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "block_chunks": 0,
        **NAMED_MODELS,
    }
    method: dict[str, Any] = {
        "output_dim": config.heads.num_prototypes,
        "hidden_dim": config.heads.hidden,
        "dino_bottleneck_dim": config.heads.bottleneck,
        "ibot_bottleneck_dim": config.heads.bottleneck,
        "warmup_steps": int(optim.warmup * steps),
        "teacher_temp_warmup_steps": int(teacher.warmup * steps),
        "student_freeze_last_layer_steps": int(optim.freeze_last_layer * steps),
    }
    local: dict[str, Any] = {"num_views": crops.num_local, "view_size": [crops.local_size] * 2}
    transform: dict[str, Any] = {"image_size": [crops.global_size] * 2, "local_view": local}
    precision = choose_precision(config.train.precision, torch.device("cpu"))
    pretrain: dict[str, Any] = {
        "method": "dinov2",
        "method_args": method,
        "transform_args": transform,
        "batch_size": config.train.batch_size,
        "epochs": steps,  # never reached: the steps end first
        "trainer_args": {"max_steps": steps},
        "num_workers": 0,
        "accelerator": "cpu",
        "precision": {torch.bfloat16: "bf16-mixed", torch.float32: "32-true"}[precision],
        "callbacks": {"model_checkpoint": {"every_n_train_steps": max(1, steps // points), "save_top_k": -1}},
        "loggers": {"tensorboard": None},
    }
    if recipe == "ours":
        model |= {
            "init_values": config.model.layerscale,
            "drop_path_rate": config.model.drop_path,
            "num_register_tokens": config.model.num_registers,
        }
        method |= {
            "ibot_separate_head": not config.heads.tied,
            "center_method": {"sinkhorn": "sinkhorn_knopp", "center": "softmax"}[config.loss.targets],
            "dino_loss_weight": config.loss.dino,
            "ibot_loss_weight": config.loss.ibot,
            "koleo_loss_weight": config.loss.koleo,
            "teacher_temp_start": teacher.warmup_temperature,
            "teacher_temp_end": teacher.temperature,
            "momentum_start": teacher.momentum,
            "momentum_end": teacher.momentum_end,
            "min_lr": optim.min_lr,
            "lr_scale_method": optim.lr_rule,
            "reference_batch_size": optim.reference_batch,
            "layerwise_decay": optim.layer_decay,
            "patch_embed_lr_multiplier": optim.patch_embed_lr,
            "weight_decay_start": optim.weight_decay,
            "weight_decay_end": optim.weight_decay_end,
            "gradient_clip_val": optim.clip,
            "mask_probability": config.mask.probability,
            "mask_ratio_min": config.mask.ratio_min,
            "mask_ratio_max": config.mask.ratio_max,
        }
        pretrain["optim_args"] = {"lr": optim.lr, "betas": [0.9, optim.beta2]}
        transform["random_resize"] = dict(zip(("min_scale", "max_scale"), crops.global_scale, strict=True))
        local["random_resize"] = dict(zip(("min_scale", "max_scale"), crops.local_scale, strict=True))
    return {"model": model, "fan_in": recipe == "ours" and config.model.init == "fan_in", "pretrain": pretrain}


def checkpoint_paths(out: Path) -> list[tuple[int, Path]]:
    """Step and path of each checkpoint in the run folder of either program, oldest first."""
    folder = out / "checkpoints"
    found = [*folder.glob("step-*"), *folder.glob("epoch=*.ckpt")]  # ours, LightlyTrain's
    return sorted((int(path.stem.replace("=", "-").rpartition("step-")[2]), path) for path in found)


def checkpoints_of(args: argparse.Namespace, name: str, number: int) -> list[tuple[int, float, Path]]:
    """Step, time of writing and export of each checkpoint of one training."""
    mine = our_curve(folder(args, "ours", number, "train"))
    if name == "ours":
        return mine
    out = folder(args, name, number, "train")
    found = checkpoint_paths(out)
    words = [args.lightly, str(HERE / "lightly_dinov2.py"), "convert", *[str(path) for _, path in found]]
    together([Command("convert", words, out.with_suffix(".convert.log"), args.cores[1])])
    card = read_export(mine[-1][2])[1]
    return [(step, path.stat().st_mtime, adopt(path, card)) for step, path in found]


def adopt(checkpoint: Path, card: dict[str, Any]) -> Path:
    """LightlyTrain's teacher as an export of ours; it must say here what it said there."""
    tensors = load_file(checkpoint.with_suffix(".safetensors"))
    images, cls = tensors.pop("check.images"), tensors.pop("check.cls")
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    export = checkpoint.with_suffix("")
    write_export(
        export,
        {f"backbone.{name}": value for name, value in tensors.items()},
        card | {"model": card["model"] | {"num_registers": registers, "position": "learned"}},
    )
    with torch.inference_mode():
        difference = (load_backbone(export)[0].forward_features(images).cls - cls).abs().max().item()
    assert difference < 1e-4, f"{checkpoint}: class tokens differ by {difference:.2g} after the move"
    return export


if __name__ == "__main__":
    main()
