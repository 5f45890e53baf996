"""Curation as a chain of jobs: stages whose units can be shared out become arrays, what lies between them single jobs.

    items -> decode x N -> decode, exact -> embed x N -> embed, index -> join x N -> join -> verify x N
          -> verify, dedup, guard, retrieve -> shards x N -> shards, manifest, report

A task does its share of a stage's units. The single job after an array does what is missing of them, which is nothing
where all went well, concludes the stage and opens the next one.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from curation.run import PARALLEL, STAGES, unfinished
from runtime.chain import Driver, Link, Queued, chained_parameters, submit_chain
from runtime.errors import UserError
from runtime.launch import Resources, Submitted, submit

from .pipeline import CurateRunConfig, curation_part

ON_DEVICE = {"exact", "embed", "index", "join", "verify"}  # the stages that use config.device
NAME = "troodon-curate"


def curation_chain(
    config: CurateRunConfig, command: Sequence[str], *, tasks: int, at_once: int | None, resources: Resources
) -> tuple[Link, ...]:
    """The jobs that finish a curation. Raises UserError when the output folder belongs to another config.

    command: `curate CONFIG key=value ...`. Links without a stage of ON_DEVICE, and all where device is cpu, ask for no
    GPU. A chain that begins with an array begins with the stage before it, which opens the array's.
    """

    def link(name: str, stages: Sequence[str], shares: int | None = None) -> Link:
        alone = (*command, "--stages", ",".join(stages))
        needs_device = config.device != "cpu" and ON_DEVICE & set(stages)
        own = resources if needs_device else dataclasses.replace(resources, gpus=None)
        if shares is None:
            return Link(name, (alone,), own)
        return Link(name, tuple((*alone, "--share", f"{index}/{shares}") for index in range(shares)), own, at_once)

    left = unfinished(curation_part(config))
    if left and left[0] in PARALLEL:
        left = (STAGES[STAGES.index(left[0]) - 1], *left)
    links: list[Link] = []
    together: list[str] = []  # stages of the single job to come
    for position, stage in enumerate(left):
        if stage in PARALLEL and position:
            links.append(link(_title(together), together))
            links.append(link(stage, [stage], tasks))
            together = []
        together.append(stage)
    return (*links, link(_title(together), together)) if together else ()


def _title(stages: Sequence[str]) -> str:
    return f"after-{stages[0]}" if stages[0] in PARALLEL else stages[0]


def plan_lines(links: Sequence[Link], *, cluster: str, logs: Path) -> list[str]:
    """The chain in words, one line per job and one for what sbatch is told."""
    lines = [f"{len(links)} jobs on {cluster}, each after the one before has ended well; logs: {logs}"]
    for position, link in enumerate(links):
        lines.append(f"{link.title}: troodon {' '.join(link.commands[0])}")
        if cluster == "slurm":
            told = chained_parameters(link, f"{NAME}-{link.name}", links[position - 1].title if position else None)
            extra = told.pop("slurm_additional_parameters")
            words = {key.removeprefix("slurm_"): value for key, value in told.items() if value is not None} | extra
            lines.append("  " + " ".join(f"{key}={value}" for key, value in words.items()))
    return lines


def submit_slurm(links: Sequence[Link], *, logs: Path) -> tuple[Queued, ...]:
    """Hand the chain over to SLURM."""
    from .cli import main

    return submit_chain(main, links, name=NAME, logs=logs)


def start_local(links: Sequence[Link], *, logs: Path, resources: Resources) -> Submitted:
    """One job of this machine that runs the chain; the logs of the tasks lie beside its own."""
    driver = Driver((sys.executable, "-m", "tools.cli"), tuple(links), str(logs.absolute()))
    return submit(driver, (), name=NAME, cluster="local", logs=logs, resources=resources)


def check(args: argparse.Namespace) -> None:
    """Raises UserError for options of a chain that make no sense."""
    if args.job != "curate":
        raise UserError(f"--tasks: goes with --verb curate, whose stages have units; {args.job} is one job")
    if args.tasks < 1 or (args.at_once is not None and args.at_once < 1):
        raise UserError(f"--tasks {args.tasks} --at-once {args.at_once}: both must be above zero")
