"""A small pool cut from the embedded image set, with its truth, and an embedding model of random weights."""

import csv
import io
import json
import tarfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from curation.config import (
    CurateConfig,
    EmbedConfig,
    GuardConfig,
    RetrievalModelConfig,
    SeedsConfig,
    SourceConfig,
)
from runtime.files import locate
from runtime.tars import group_samples, scan_tar

NUM_GROUPS, NUM_LEAKS, NUM_OTHERS = 12, 8, 24


def read_csv(name: str) -> list[dict[str, str]]:
    with locate(f"embedded:truth/{name}").open(newline="") as file:
        return list(csv.DictReader(file))


def export_weights(*, dim: int, depth: int, num_patches: int, patch_size: int, num_registers: int) -> dict:
    """Random weights under the names of the public DINOv2 checkpoints."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    weights = {
        "cls_token": draw(1, 1, dim),
        "pos_embed": draw(1, 1 + num_patches, dim),
        "mask_token": draw(1, dim),
        "patch_embed.proj.weight": draw(dim, 3, patch_size, patch_size),
        "patch_embed.proj.bias": draw(dim),
        "norm.weight": 1 + draw(dim),
        "norm.bias": draw(dim),
    }
    if num_registers:
        weights["register_tokens"] = draw(1, num_registers, dim)
    shapes = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for block in range(depth):
        for name, shape in shapes.items():
            weights[f"blocks.{block}.{name}.weight"] = draw(*shape)
            weights[f"blocks.{block}.{name}.bias"] = draw(shape[0])
        for name in ("norm1", "norm2"):
            weights[f"blocks.{block}.{name}.weight"] = 1 + draw(dim)
            weights[f"blocks.{block}.{name}.bias"] = draw(dim)
        for name in ("ls1", "ls2"):
            weights[f"blocks.{block}.{name}.gamma"] = 1 + draw(dim)
    return weights


@pytest.fixture(scope="session")
def export(tmp_path_factory) -> Path:
    """An export folder: ViT of width 64, 2 blocks, patches of 16, 64 px."""
    folder = tmp_path_factory.mktemp("export")
    weights = export_weights(dim=64, depth=2, num_patches=16, patch_size=16, num_registers=2)
    save_file({f"backbone.{name}": weight for name, weight in weights.items()}, folder / "model.safetensors")
    shape = {"dim": 64, "depth": 2, "num_heads": 2, "patch_size": 16, "image_size": 64, "num_registers": 2}
    shape |= {"ffn": "mlp", "mlp_ratio": 4.0, "layerscale": True}
    card = {"format": 1, "kind": "backbone", "model": shape}
    (folder / "card.json").write_text(json.dumps(card | {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}))
    return folder


@pytest.fixture(scope="session")
def pack(tmp_path_factory) -> Path:
    """`pool/a.tar`, `pool/loose/*.jpg` with sidecars, `pool/loose/odd*`, `eval/`, `seeds/`, and `truth.json`."""
    folder = tmp_path_factory.mktemp("pack")
    samples = {}
    for tar in sorted(locate("embedded:pool").glob("*.tar")):
        data = tar.read_bytes()
        for sample in group_samples(scan_tar(tar)[0])[0]:
            samples[sample[0].key] = {m.extension: data[m.offset : m.offset + m.length] for m in sample}
    groups = defaultdict(list)
    for row in read_csv("duplicates.csv"):
        groups[row["group"]].append(row["key"])
    leaks = {row["key"]: row["eval_file"] for row in read_csv("leaks.csv")}
    planted = [keys for keys in groups.values() if not set(keys) & set(leaks)][:NUM_GROUPS]
    leaked = dict(list(leaks.items())[:NUM_LEAKS])
    special = {key for keys in groups.values() for key in keys} | set(leaks)
    others = [key for key in samples if key not in special][:NUM_OTHERS]
    chosen = sorted({key for keys in planted for key in keys} | set(leaked) | set(others))

    (folder / "pool" / "loose").mkdir(parents=True)
    with tarfile.open(folder / "pool" / "a.tar", "w") as tar:
        for key in chosen[::2]:
            for extension, data in samples[key].items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    for key in chosen[1::2]:
        for extension, data in samples[key].items():
            (folder / "pool" / "loose" / f"{key}.{extension}").write_bytes(data)
    for name in ("truncated_half.jpg", "empty.jpg", "not_found.jpg"):
        (folder / "pool" / "loose" / f"odd_{name}").write_bytes(locate(f"embedded:corrupt/files/{name}").read_bytes())
    wanted = {name.removeprefix("eval/") for name in leaked.values()}
    unleaked = sorted(f"test/{path.parent.name}/{path.name}" for path in locate("embedded:eval/test").rglob("00*.jpg"))
    for name in [*sorted(wanted), *unleaked[:12]]:
        (folder / "eval" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "eval" / name).write_bytes(locate(f"embedded:eval/{name}").read_bytes())
    for path in sorted(locate("embedded:seeds").rglob("00[12].jpg")):
        (folder / "seeds" / path.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / "seeds" / path.parent.name / path.name).write_bytes(path.read_bytes())
    (folder / "truth.json").write_text(json.dumps({"groups": planted, "leaks": leaked, "others": others}))
    return folder


@pytest.fixture(scope="session")
def config(pack, export) -> CurateConfig:
    """Curation of the pack in this process; `out` is to be replaced."""
    return replace(
        CurateConfig(device="cpu", workers=0),
        source=SourceConfig(paths=(f"{pack}/pool/a.tar", f"{pack}/pool/loose"), part_size=20),
        guard=GuardConfig(paths=(f"{pack}/eval",), k=4),
        seeds=SeedsConfig(paths=(f"{pack}/seeds",)),
        embed=EmbedConfig(
            retrieval=RetrievalModelConfig(f"export:{export}", 64),
            batch_size=16,
        ),
        dedup=replace(CurateConfig().dedup, k=4),
    )
