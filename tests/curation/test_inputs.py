"""Wrong inputs of a curation: each is named in a few lines, by the plan too, before there is an output folder."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.config import (
    CopyModelConfig,
    CurateConfig,
    EmbedConfig,
    HierarchicalConfig,
    MixtureConfig,
    RetrievalConfig,
    RetrievalModelConfig,
    SeedsConfig,
    SourceConfig,
)
from curation.inputs import checked_items
from curation.plan import plan
from curation.run import curate
from runtime.errors import UserError


def sources(*paths: str) -> dict:
    return {"source": SourceConfig(paths)}


def retrieval(**settings) -> dict:
    return {"retrieval": RetrievalConfig(**settings)}


def copy_model(name: str) -> dict:
    return {"embed": EmbedConfig(copy=CopyModelConfig(name))}


@pytest.fixture
def four(pack, tmp_path, monkeypatch) -> CurateConfig:
    """Four images in `images`, two of them once more, and parquet files without images, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("images", 4), ("other/images", 2)):
        Path(name).mkdir(parents=True)
        for path in sorted((pack / "pool" / "loose").glob("0*.jpg"))[:count]:
            Path(name, path.name).write_bytes(path.read_bytes())
    Path("junk.parquet").write_bytes(b"no parquet at all " * 50)
    pq.write_table(pa.table({"caption": ["a", "b"]}), "captions.parquet")
    return CurateConfig(out="out", device="cpu", workers=0, source=SourceConfig(("images",)))


HIERARCHICAL = {"methods": ("hierarchical",)}
WRONG = {
    "junk parquet": (sources("junk.parquet"), r"source\.paths: no image in junk.parquet.*not readable as parquet: "),
    "other parquet": (sources("captions.parquet"), r"no image in .*; captions.parquet: no column of images among"),
    "one name": (
        sources("images", "other/images"),
        r"source\.paths: images and other/images are both called 'images'\n  give them names: source",
    ),
    "previous": ({"previous": "absent"}, r"previous: absent is not a finished curation \(no folder\)\n  finish that"),
    "torchscript": (copy_model("torchscript:no.pt"), r"embed\.copy\.model: no checkpoint file no.pt\n.*/no.pt"),
    "builtin": (copy_model("builtin:cpy"), r"embed\.copy\.model: 'builtin:cpy'; expected builtin:copy, bootstrap, "),
    "export": (copy_model("export:images"), r"embed\.copy\.model: no export in images .*\n  give the folder of"),
    "timm": (copy_model("timm:vit_tin_patch16_224"), r"timm has no model 'vit_tin_patch16_224'; did you mean vit_tiny"),
    "target": (
        retrieval(hierarchical=HierarchicalConfig(target=5), **HIERARCHICAL),
        r"retrieval\.hierarchical\.target: 5 images wanted, the sources hold 4 images\n  give at most 4",
    ),
    "levels": (
        retrieval(hierarchical=HierarchicalConfig(target=2, levels=(5, 2)), **HIERARCHICAL),
        r"retrieval\.hierarchical\.levels: 5 clusters wanted, the sources hold 4 images\n  give at most 4",
    ),
    "size": (retrieval(size=5), r"retrieval\.size: 5 images wanted, the sources hold 4 images\n  give at most 4"),
    "mixture": (
        retrieval(mixture=(MixtureConfig("image", 1.0),)),
        r"retrieval\.mixture: no source or method 'image'; did you mean images\?\n  sources: images; methods .*: none",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named_before_there_is_a_folder(four, change, message):
    before = sorted(Path().rglob("*"))
    for verb in (curate, plan):
        with pytest.raises(UserError, match=message) as error:
            verb(replace(four, **change))
        assert len(str(error.value).splitlines()) <= 3
    assert sorted(Path().rglob("*")) == before


def test_what_is_just_possible_is_no_error(four):
    """As many images as there are, seeds counted where they pass; settings of methods that are not used."""
    seeded = replace(four, seeds=SeedsConfig(("other/images",)))
    embed = EmbedConfig(retrieval=RetrievalModelConfig("bootstrap"))  # trained when its turn comes
    options = HierarchicalConfig(target=4, levels=(4,))
    for settings in (
        RetrievalConfig(methods=("hierarchical",), hierarchical=options, size=4),
        RetrievalConfig(hierarchical=HierarchicalConfig(target=500, levels=(500,))),
        RetrievalConfig(keep_seeds=True, size=6, mixture=(MixtureConfig("seeds", 1.0), MixtureConfig("images", 1.0))),
    ):
        named = replace(seeded, source=SourceConfig(("images",)), seeds=SeedsConfig(("mine=other/images",)))
        table, problems = checked_items(replace(named, retrieval=settings, embed=embed))
        assert (table["role"].to_pylist(), problems) == (["pool"] * 4 + ["seed"] * 2, [])
