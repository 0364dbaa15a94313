"""Settings: one frozen section per stage. `moco.params` reads them, once, from params.yaml.

There are no defaults in the code, so that the file that DVC tracks and MLflow shows is the whole truth. Units
and sources of values are written in params.yaml.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Range:
    """Allowed values of a number: low <= value <= high, or low < value where `open_low` is set."""

    low: float
    high: float = float("inf")
    open_low: bool = False

    def problem(self, value: float) -> str | None:
        too_low = value <= self.low if self.open_low else value < self.low
        if not too_low and value <= self.high:
            return None
        bound = f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        return f"must be {bound}" + ("" if self.high == float("inf") else f" and at most {self.high:g}")


@dataclass(frozen=True)
class Without:
    """Allowed texts: not empty, and without any of these characters."""

    characters: str

    def problem(self, value: str) -> str | None:
        if value.strip() and not set(value) & set(self.characters):
            return None
        return f"must be a name without {' '.join(self.characters)}"


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, open_low=True)]
Seed = Annotated[int, Range(0, 1 << 20)]
Positive = Annotated[float, Range(0, open_low=True)]
NotNegative = Annotated[float, Range(0)]
ModelName = Annotated[str, Without("/:.%\"'")]  # as MLflow has it for logged models
Schedule = Literal["cosine", "step", "constant"]


@dataclass(frozen=True)
class GeneratedConfig:
    """Images drawn by `moco.data.generated`."""

    seed: Seed
    size: Annotated[int, Range(32, 256)]
    unlabeled: Count
    train_per_class: Annotated[int, Range(2)]
    val_per_class: Count
    pack: bool


@dataclass(frozen=True)
class DataConfig:
    """Where images come from."""

    source: Literal["generated", "squashfs", "folder", "classes", "cifar10", "stl10"]
    path: str
    mounted: str
    copy_to_scratch: bool
    download: bool
    classes: Annotated[int, Range(2)] | None
    resize: Annotated[int, Range(8, 1024)] | None
    labelled: Count | None
    unreadable: CountOrZero
    exclude_val: bool
    max_pixels: Count
    generated: GeneratedConfig


@dataclass(frozen=True)
class PretrainConfig:
    """Momentum contrast."""

    encoder: str
    stem: Literal["imagenet", "small"]
    width: Annotated[int, Range(1, 4096)]
    stages: Annotated[int, Range(1, 6)]
    convolutions: Annotated[int, Range(1, 2)]
    head: Literal["mlp", "linear"]
    dim: Annotated[int, Range(1, 65536)]
    queue: Count
    momentum: Share
    momentum_schedule: Literal["constant", "cosine"]
    temperature: Annotated[float, Range(1e-3, 1e3)]  # logits divided by it must fit a float16
    loss: Literal["asymmetric", "symmetric"]
    batch_norm: Literal["plain", "split", "sync"]
    splits: Count
    shuffle: bool
    augmentation: Literal["v1", "v2", "v2_no_blur"]
    crop_scale: tuple[PositiveShare, PositiveShare]
    blur_sigma: tuple[Positive, Positive]
    resolutions: tuple[PositiveShare, ...]
    resolution_changes: tuple[Share, ...]
    epochs: Count
    minutes: Positive | None
    batch_size: Annotated[int, Range(2)]
    accumulate: Count
    lr: Positive
    sgd_momentum: Share
    weight_decay: NotNegative
    schedule: Schedule
    warmup: Share
    milestones: tuple[Share, ...]
    subset: PositiveShare
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    holdout: PositiveShare
    monitor_every: Count
    knn_neighbours: Count
    checkpoint_every: Count
    keep_checkpoints: Count
    steps_back: CountOrZero
    log_every: Count
    seed: Seed


@dataclass(frozen=True)
class TrainConfig:
    """Linear classifier on frozen features."""

    solver: Literal["lbfgs", "sgd"]
    epochs: Count
    batch_size: Count
    lr: Positive
    sgd_momentum: Share
    weight_decay: NotNegative
    schedule: Schedule
    warmup: Share
    milestones: tuple[Share, ...]
    features: Literal["last", "pyramid"]
    feature_scaling: Literal["standardize", "none"]
    views: Count
    holdout: PositiveShare
    refit: bool
    seed: Seed


@dataclass(frozen=True)
class EvalConfig:
    """Scoring through submission.py and model_sub.pth."""

    batch_size: Count
    calibration_bins: Annotated[int, Range(2, 100)]
    team_id: int
    team_name: str
    email_address: str


@dataclass(frozen=True)
class SupervisedConfig:
    """Training of all weights on the labels."""

    epochs: Count
    minutes: Positive | None
    batch_size: Annotated[int, Range(2)]
    lr: Positive
    sgd_momentum: Share
    weight_decay: NotNegative
    schedule: Schedule
    warmup: Share
    milestones: tuple[Share, ...]
    crop_scale: tuple[PositiveShare, PositiveShare]
    seed: Seed


@dataclass(frozen=True)
class BaselineConfig(SupervisedConfig):
    """What the labels give without pretraining, for comparison."""


@dataclass(frozen=True)
class FinetuneConfig(SupervisedConfig):
    """All weights of the linear classifier, trained further."""

    classifier: Literal["classifier", "classifier_extra"]
    start: Literal["classifier", "encoder"]
    layer_decay: PositiveShare
    label_smoothing: Share
    mixup: NotNegative
    batch_norm: Literal["batch", "frozen"]
    pool: CountOrZero
    confidence: Share
    holdout: PositiveShare
    checkpoint_every: Count


@dataclass(frozen=True)
class RequestConfig:
    """Which images of the pool somebody is asked to label."""

    strategy: Literal[
        "maxherding", "uncertainty_herding", "typiclust", "kmedoids", "margin", "coreset", "loss", "random"
    ]
    budget: CountOrZero
    dimensions: Count
    bandwidth: Annotated[float, Range(1e-6, 1e6)]  # of distances between features of unit length
    loss_views: Annotated[int, Range(2)]
    answers: Literal["people", "generator"]
    seed: Seed


@dataclass(frozen=True)
class TrainExtraConfig:
    """Labels beside those of train; all else is in section train."""

    labels: str | None
    suspicious: Literal["refuse", "warn"]


@dataclass(frozen=True)
class RuntimeConfig:
    """The machine at hand. Nothing here is meant to change a result, so no stage is rerun for it."""

    device: str
    threads: Annotated[int, Range(0, 1024)]  # far beyond the cores, libgomp dies of a segmentation fault
    deterministic: bool
    cuda_graphs: bool
    gpu_kernels: bool
    scratch: str


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow."""

    uri: str
    offline: bool
    experiment: str
    registered_model: ModelName
    pictures: bool


@dataclass(frozen=True)
class Config:
    """The whole of params.yaml."""

    data: DataConfig
    pretrain: PretrainConfig
    train: TrainConfig
    eval: EvalConfig
    baseline: BaselineConfig
    finetune: FinetuneConfig
    request: RequestConfig
    train_extra: TrainExtraConfig
    runtime: RuntimeConfig
    tracking: TrackingConfig


# Keys that have moved to the section of the stage that uses them.
MOVED = {"pretrain.features": "train.features"}

# Settings that change what is looked at or kept, not what is learned: they do not make another run of it.
HOUSEKEEPING = {
    "pretrain.monitor_every", "pretrain.knn_neighbours", "pretrain.checkpoint_every",
    "pretrain.keep_checkpoints", "pretrain.steps_back", "pretrain.log_every", "pretrain.holdout",
    "finetune.checkpoint_every", "train_extra.suspicious",
}  # fmt: skip


def flatten(section: Any, prefix: str) -> dict[str, Any]:
    """{'pretrain.lr': 0.06, ...} of a section or of several nested ones."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{prefix}.{field.name}"))
        else:
            flat[f"{prefix}.{field.name}"] = value
    return flat
