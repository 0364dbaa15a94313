"""The whole of params.yaml: its sections in order, and the keys that have moved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moco.settings.baseline import BaselineConfig
from moco.settings.checkpoint import CheckpointConfig
from moco.settings.data import DataConfig
from moco.settings.eval import EvalConfig
from moco.settings.finetune import FinetuneConfig
from moco.settings.kinds import fields_of
from moco.settings.monitor import MonitorConfig
from moco.settings.pretrain import PretrainConfig
from moco.settings.request import RequestConfig
from moco.settings.runtime import RuntimeConfig
from moco.settings.tracking import TrackingConfig
from moco.settings.train import TrainConfig
from moco.settings.train_extra import TrainExtraConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole of params.yaml."""

    data: DataConfig = field(default_factory=DataConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    request: RequestConfig = field(default_factory=RequestConfig)
    train_extra: TrainExtraConfig = field(default_factory=TrainExtraConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


# Keys of earlier versions, and where their values belong now.
MOVED = {
    "pretrain.features": "train.features",
    "pretrain.holdout": "monitor.holdout",
    "pretrain.monitor_every": "monitor.every",
    "pretrain.knn_neighbours": "monitor.neighbours",
    "pretrain.log_every": "monitor.log_every",
    "pretrain.checkpoint_every": "checkpoint.every",
    "pretrain.keep_checkpoints": "checkpoint.keep",
    "pretrain.steps_back": "checkpoint.max_rollbacks",
    "finetune.checkpoint_every": "checkpoint.every",
    "train_extra.suspicious": "monitor.suspicious_labels",
}


def docs() -> dict[str, str]:
    """Return what every setting is, in a line each, by dotted name."""
    return {name: field.metadata["doc"] for name, field, _ in fields_of(Config(), "")}


def without_setting() -> dict[str, Any]:
    """Return the settings that came later at the values at which all is as it was without them, by dotted name."""
    later = {name: field.metadata["before"] for name, field, _ in fields_of(Config(), "") if "before" in field.metadata}
    return {**later, "pretrain.features": "last"}  # which has moved since
