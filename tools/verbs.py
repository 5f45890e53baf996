"""The verbs: for each its arguments, its example and the call into the room that does the work."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import EXIT_DONE, UserError

if TYPE_CHECKING:
    from runtime.signals import StopRequest

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def add_verbs(verbs: Any) -> None:
    """Add every verb to argparse's subparsers."""
    verb = add(
        verbs,
        "pretrain",
        pretrain,
        "train a backbone on WebDataset shards; goes on by itself where its output folder stands",
        "troodon pretrain tiny data.shards=[runs/mine/curate/shards] out=runs/pretrain\n"
        "torchrun --nproc-per-node 2 -m tools.cli pretrain tiny data.shards=[...] out=runs/pretrain",
        needs_torch=True,
    )
    takes_config(verb)
    verb = add(
        verbs,
        "distill",
        distill,
        "distil a frozen teacher export into smaller students",
        "troodon distill my.yaml teacher=runs/pretrain/exports/step-00012500 out=runs/students",
        needs_torch=True,
    )
    takes_config(verb)

    verb = add(
        verbs,
        "export",
        export,
        "write a model folder (model.safetensors, card.json) from a run, a checkpoint or another export",
        "troodon export runs/mine/pretrain --format backbone models/mine",
        needs_torch=True,
    )
    verb.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder, checkpoint folder or export folder")
    verb.add_argument("out", metavar="OUT", help="folder to write")
    verb.add_argument(
        "--format", required=True, choices=("backbone", "teacher"), help="backbone alone, or teacher with its heads"
    )

    verb = add(
        verbs,
        "launch",
        launch,
        "run a verb as a job of this machine or of a SLURM cluster",
        "troodon launch quickstart --cluster local --wait out=runs/quick\n"
        "troodon launch my.yaml --cluster slurm --verb pretrain --processes 8 --gpus 8 --cpus 12 --partition gpu",
    )
    takes_config(verb)
    verb.add_argument("--cluster", required=True, choices=("local", "slurm"))
    verb.add_argument("--verb", dest="job", default="pretrain", choices=("pretrain",), help="what to run")
    verb.add_argument("--hours", type=float, default=24.0, help="time limit; asked to stop shortly before (24)")
    verb.add_argument("--processes", type=int, default=1, help="processes of one pretraining, all on one node (1)")
    verb.add_argument("--cpus", type=int, help="slurm: cores of each process")
    verb.add_argument("--gpus", type=int, help="slurm: GPUs of the node")
    verb.add_argument("--memory", type=float, help="slurm: GB of the node")
    verb.add_argument("--partition", help="slurm: partition")
    verb.add_argument(
        "--slurm", action="append", default=[], metavar="KEY=VALUE", help="slurm: a further sbatch option, repeatable"
    )
    verb.add_argument("--wait", action="store_true", help="show the job's log until it ends, exit as it exits")

    verb = add(verbs, "doctor", doctor, "say what this machine and installation offer", "troodon doctor --json")
    verb.add_argument("--json", action="store_true", help="one JSON object instead of text")


def add(
    verbs: Any, name: str, function: Callable[..., int], what: str, example: str, *, needs_torch: bool = False
) -> argparse.ArgumentParser:
    """A verb with its one-line description, its example and --debug."""
    verb = verbs.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog="example:\n  " + example.replace("\n", "\n  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verb.set_defaults(verb_function=function, needs_torch=needs_torch)
    return verb


def takes_config(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", metavar="CONFIG", help="YAML file, or the name of a preset in configs/")
    verb.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="values that win over the file's")
    verb.add_argument("--dry-run", action="store_true", help="print the resolved config and the plan, do nothing")


def load_config(verb: str, args: argparse.Namespace) -> Any:
    """The resolved config of a verb. Raises UserError."""
    from runtime.config import load

    return load(schema(verb), args.config, args.overrides)


def schema(verb: str) -> type:
    """The dataclass that a verb's config fills."""
    if verb == "pretrain":
        from pretrain.config import PretrainConfig

        return PretrainConfig
    from distill.config import DistillConfig

    return DistillConfig


def pretrain(args: argparse.Namespace, stop: StopRequest) -> int:
    config = load_config("pretrain", args)
    if args.dry_run:
        from pretrain.build import describe

        return show_plan(config, [describe(config)])
    from pretrain.train import pretrain

    print(pretrain(config, stop=stop))
    return EXIT_DONE


def distill(args: argparse.Namespace, stop: StopRequest) -> int:
    config = load_config("distill", args)
    if args.dry_run:
        return show_plan(config, [f"student {student.name}: {student.arch}" for student in config.students])
    from distill.train import distill

    for name, folder in distill(config, stop=stop).items():
        print(f"{name} {folder}")
    return EXIT_DONE


def show_plan(config: Any, plan: list[str]) -> int:
    """Print the resolved config as YAML, the plan as comments below it."""
    from runtime.config import to_yaml

    print(to_yaml(config) + "".join(f"# {line}\n" for line in plan), end="")
    return EXIT_DONE


def export(args: argparse.Namespace, _: StopRequest) -> int:
    from pretrain.export import convert

    print(convert(Path(args.checkpoint), Path(args.out), args.format))
    return EXIT_DONE


def launch(args: argparse.Namespace, stop: StopRequest) -> int:
    """Check the config as the verb itself would, then submit the same command."""
    from runtime.launch import Resources, follow, require, submit
    from runtime.progress import say

    config = load_config(args.job, args)
    if args.processes > 1 and args.job != "pretrain":
        raise UserError(f"--processes: {args.processes} processes are for --verb pretrain; {args.job} takes one")
    if args.processes < 1 or args.hours <= 0:
        raise UserError(f"--processes {args.processes} --hours {args.hours}: both must be above zero")
    resources = Resources(
        hours=args.hours,
        processes=args.processes,
        cpus=args.cpus,
        gpus=args.gpus,
        memory=args.memory,
        partition=args.partition,
        extra=tuple(args.slurm),
    )
    command = [args.job, args.config, *args.overrides]
    logs = Path(f"{config.out}.jobs")  # beside the run's folder, which the job itself claims
    if args.dry_run:
        return show_plan(
            config, [f"job: troodon {' '.join(command)}", f"on {args.cluster}, {resources}", f"logs: {logs}"]
        )
    require(args.cluster)
    from .cli import main

    job = submit(main, command, name=f"troodon-{args.job}", cluster=args.cluster, logs=logs, resources=resources)
    print(job.job_id, flush=True)
    say(job.describe())
    if not args.wait:
        return EXIT_DONE
    status = follow(job, stop=stop)
    if status is None:
        say(f"job {job.job_id} goes on without this terminal")
        return EXIT_INTERRUPTED
    return status


def doctor(args: argparse.Namespace, _: StopRequest) -> int:
    from .doctor import report

    return report(as_json=args.json)
