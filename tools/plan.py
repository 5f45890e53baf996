"""The plan of a curation as lines of text."""

from pathlib import Path

from curation.config import CurateConfig
from curation.plan import StagePlan, free_space, plan
from runtime.files import human_bytes
from runtime.progress import clock


def plan_lines(config: CurateConfig) -> list[str]:
    """A table of the stages, what their memory is made of, and the disk needed and free."""
    stages = plan(config)
    table = [("stage", "units", "items", "memory/task", "time here", "disk")] + [_row(stage) for stage in stages]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    known = sum(stage.seconds or 0.0 for stage in stages)
    needed, free = sum(stage.disk for stage in stages), free_space(Path(config.out))
    lines.append(
        f"together: {clock(known)} with workers={config.workers}, without the stages marked ?; counts are the most"
    )
    lines += [f"  {stage.stage}: memory = {stage.formula}; time: {stage.basis}" for stage in stages]
    verdict = "enough" if needed <= free else "NOT ENOUGH"
    lines.append(f"disk: at most {human_bytes(needed)} in {config.out}, {human_bytes(free)} free there: {verdict}")
    return lines


def _row(stage: StagePlan) -> tuple[str, ...]:
    return (
        stage.stage,
        str(stage.units),
        f"{stage.count} {stage.what}",
        human_bytes(stage.memory),
        "?" if stage.seconds is None else clock(stage.seconds),
        human_bytes(stage.disk),
    )
