"""Configuration of curation; presets in `configs/` state only what differs from these defaults.

Numbers default to DINOv2's (appendix A) where it states them and the models are the same.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from runtime.config import config_hash


@dataclass(frozen=True)
class SourceConfig:
    paths: tuple[str, ...] = ()  # folders, tars, parquet files or globs of them, PATH or NAME=PATH: the raw images
    part_size: int = 1024  # images per work unit: what a killed run repeats at most, for each worker


@dataclass(frozen=True)
class SeedsConfig:
    paths: tuple[str, ...] = ()  # curated examples to retrieve around; each top-level subfolder is one seed set


@dataclass(frozen=True)
class GuardConfig:
    paths: tuple[str, ...] = ()  # evaluation sets that the training set must not contain
    threshold: float = 0.45  # cosine from which a pool image is a copy of an evaluation image (DINOv2 A.3)
    k: int = 4  # nearest neighbours looked at, from evaluation image to pool and from pool to evaluation image
    verify_threshold: float = 0.66  # like dedup.verify_threshold, which turns it on; a leak costs more than an image


@dataclass(frozen=True)
class DecodeConfig:
    max_pixels: int = 100_000_000  # larger pictures are refused from their header
    min_side: int = 16  # pixels; pictures with a shorter side are rejected as too small


@dataclass(frozen=True)
class CopyModelConfig:
    model: str = "builtin:copy"  # or bootstrap, export:FOLDER, timm:NAME[@CHECKPOINT], torchscript:FILE (SSCD)
    size: int | None = None  # pixels; images are resized to size x size, aspect ignored; none: the model's own size


@dataclass(frozen=True)
class RetrievalModelConfig:
    model: str = "bootstrap"  # like embed.copy.model
    size: int | None = None  # like embed.copy.size


@dataclass(frozen=True)
class EmbedConfig:
    copy: CopyModelConfig = CopyModelConfig()  # its vectors find near-duplicates and copies of evaluation images
    retrieval: RetrievalModelConfig = RetrievalModelConfig()  # its vectors find the neighbours of seeds
    batch_size: int = 64  # images per forward pass


@dataclass(frozen=True)
class DedupConfig:
    threshold: float = 0.45  # cosine from which a pair is a candidate; of builtin:copy (DINOv2 A.3: 0.6, of SSCD)
    join: Literal["auto", "exact", "knn", "ivf", "ivf_pq"] = "auto"  # how pairs are searched; auto: the planner chooses
    join_seconds: float = 1800.0  # auto: of one core or GPU that the exact join may take, by the planner's stated rates
    join_memory: int = 16_000_000_000  # auto: bytes into which the vectors must fit to be searched in cells
    k: int = 64  # nearest neighbours per image where the join is a k-NN graph (DINOv2 A.3)
    groups: Literal["components", "leader"] = "components"  # leader: every removed image is close to one that is kept
    phash_distance: int = 4  # bits of 64 between perceptual hashes of "the same picture", also mirrored
    verify: bool = True  # an edge must also pass pixel verification: the two pictures are aligned and compared
    verify_threshold: float = 0.72  # local correlation of the aligned pictures (0 to 1) from which it passes
    sure_cosine: float = 0.7  # with verify: a pair of lower cosine must agree the more, by as much as it is lower
    phash_candidates: int = 12  # with verify: pairs also proposed up to this perceptual-hash distance, bits of 64


@dataclass(frozen=True)
class ClusterConfig:
    cells: int = 100_000  # k-means cells of the pool (DINOv2 A.4); fewer where a cell would have fewer than 39 images
    iterations: int = 20  # of k-means
    min_seeds: int = 3  # a cell is retrieved for a seed set when it holds more of its seeds than this (DINOv2 A.4)
    per_cell: int = 10_000  # images from each such cell at most (DINOv2 A.4)
    per_set: int = 1_000_000  # images for each seed set at most (DINOv2 A.4); the cells give in turn
    order: Literal["closest", "random"] = "closest"  # which images of a cell come first; closest to its centroid


@dataclass(frozen=True)
class HierarchicalConfig:
    levels: tuple[int, ...] = ()  # clusters per level, most first; empty: pool/64, then a tenth of the level before
    target: int = 0  # images to draw
    iterations: int = 50  # of each k-means (Vo et al. 2024)
    resampling: int = 10  # times that each level above the first is clustered again, on points near its centroids
    leaf: Literal["random", "closest"] = "random"  # which images of a level-1 cluster are drawn


@dataclass(frozen=True)
class MixtureConfig:
    source: str  # name of a source, or one of: sample, cluster, hierarchical, seeds
    weight: float  # its share of the selection, in proportion to the other weights


@dataclass(frozen=True)
class RetrievalConfig:
    methods: tuple[Literal["sample", "cluster", "hierarchical"], ...] = ("sample",)  # their union is selected
    k: int = 4  # sample: pool images per seed (DINOv2 A.4: 4 for ImageNet-22k, 32 for ImageNet-1k)
    min_similarity: float = 0.0  # sample: cosine below which a neighbour is not retrieved
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    hierarchical: HierarchicalConfig = field(default_factory=HierarchicalConfig)
    keep_seeds: bool = False  # the seeds themselves go into the shards, unless an evaluation set forbids it
    mixture: tuple[MixtureConfig, ...] = ()  # an image counts for the first entry that names it; empty: all is kept
    size: int = 0  # images of the final selection, drawn by seed; 0: as many as the mixture allows without repeating


@dataclass(frozen=True)
class ShardsConfig:
    max_bytes: int = 500_000_000  # size of a shard, headers included; one larger sample still gets its own shard
    max_samples: int = 100_000  # samples of a shard


@dataclass(frozen=True)
class CurateConfig:
    out: str = "runs/curate"  # folder of the result
    seed: int = 0  # of the order of samples in the shards, of clusters and of everything that is drawn
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the embedding model and of pixel verification
    workers: int = 4  # processes that decode, verify and write; 0: this process
    previous: str = ""  # output of an earlier finished run, whose decoding, vectors, pairs and scores are taken over
    source: SourceConfig = field(default_factory=SourceConfig)
    seeds: SeedsConfig = field(default_factory=SeedsConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)


def in_order(config: CurateConfig) -> CurateConfig:
    """The same config with its paths sorted: the order in which sources are given changes no result."""
    return replace(
        config,
        source=replace(config.source, paths=tuple(sorted(config.source.paths))),
        seeds=replace(config.seeds, paths=tuple(sorted(config.seeds.paths))),
        guard=replace(config.guard, paths=tuple(sorted(config.guard.paths))),
    )


def active_methods(config: CurateConfig) -> tuple[str, ...]:
    """The methods of `retrieval` that have something to do: two of them need seeds."""
    return tuple(name for name in config.retrieval.methods if name == "hierarchical" or config.seeds.paths)


def result_hash(config: CurateConfig) -> str:
    """Hash of everything in a config that decides the result."""
    return config_hash(in_order(config), ignore=("out", "workers", "device", "previous"))
