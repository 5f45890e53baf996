"""What can be known wrong before any work: a wrong config, model, path or count then leaves no folder behind."""

from pathlib import Path

import pyarrow as pa

from .backbone import check_model
from .config import CurateConfig
from .embed import embedders
from .items import list_items
from .previous import Previous
from .retrieve import check_counts, check_retrieval


def checked_items(config: CurateConfig) -> tuple[pa.Table, list[str]]:
    """`items.list_items` of a config whose models, `previous` and retrieval can be meant. Raises UserError."""
    check_retrieval(config)
    Previous.of(config)
    for purpose, spec in embedders(config).items():
        check_model(spec.model, Path(config.out), key=f"embed.{purpose}.model")
    table, problems = list_items(config)
    check_counts(config, table["role"].to_pylist())
    return table, problems
