"""Settings: one frozen section per stage, read once from params.yaml.

Every key must be present in the file and known here: there are no defaults in the code, so that the file
that DVC tracks and MLflow shows is the whole truth. Units and sources of values are written in params.yaml.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from moco.errors import UserError


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


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, open_low=True)]
Seed = Annotated[int, Range(0, 1 << 20)]
Positive = Annotated[float, Range(0, open_low=True)]
NotNegative = Annotated[float, Range(0)]
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
    generated: GeneratedConfig


@dataclass(frozen=True)
class PretrainConfig:
    """Momentum contrast."""

    encoder: str
    stem: Literal["imagenet", "small"]
    width: Count
    stages: Annotated[int, Range(1, 6)]
    head: Literal["mlp", "linear"]
    dim: Count
    queue: Count
    momentum: Share
    momentum_schedule: Literal["constant", "cosine"]
    temperature: Positive
    loss: Literal["asymmetric", "symmetric"]
    batch_norm: Literal["plain", "split", "sync"]
    splits: Count
    shuffle: bool
    augmentation: Literal["v1", "v2", "v2_no_blur"]
    crop_scale: tuple[PositiveShare, PositiveShare]
    blur_sigma: tuple[Positive, Positive]
    epochs: Count
    minutes: Positive | None
    batch_size: Annotated[int, Range(2)]
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
    log_every: Count
    seed: Seed


@dataclass(frozen=True)
class TrainConfig:
    """Linear classifier on frozen features."""

    epochs: Count
    batch_size: Count
    lr: Positive
    sgd_momentum: Share
    weight_decay: NotNegative
    schedule: Schedule
    warmup: Share
    milestones: tuple[Share, ...]
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
class BaselineConfig:
    """What the labels give without pretraining, for comparison."""

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
    monitor_every: Count
    seed: Seed


@dataclass(frozen=True)
class RuntimeConfig:
    """The machine at hand. Nothing here is meant to change a result, so no stage is rerun for it."""

    device: str
    threads: CountOrZero
    scratch: str


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow."""

    uri: str
    experiment: str
    registered_model: str


@dataclass(frozen=True)
class Config:
    """The whole of params.yaml."""

    data: DataConfig
    pretrain: PretrainConfig
    train: TrainConfig
    eval: EvalConfig
    baseline: BaselineConfig
    runtime: RuntimeConfig
    tracking: TrackingConfig


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """' (did you mean X?)' where a known word is close, else ''."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


class _Reader:
    """Turns a parsed YAML tree into dataclasses; errors name file, line and key."""

    def __init__(self, path: Path, lines: dict[str, int]) -> None:
        self.path, self.lines = path, lines

    def fail(self, key: str, problem: str) -> typing.NoReturn:
        parent = key
        while parent and parent not in self.lines:
            parent = parent.rpartition(".")[0]
        place = f"{self.path}:{self.lines[parent]}" if parent else str(self.path)
        raise UserError(f"{place}: {key}: {problem}")

    def section(self, kind: type[Any], value: Any, key: str) -> Any:
        if not isinstance(value, dict):
            self.fail(key or "(top)", "expected a section of keys")
        hints = typing.get_type_hints(kind, include_extras=True)
        prefix = f"{key}." if key else ""
        for name in value:
            if name not in hints:
                self.fail(f"{prefix}{name}", f"unknown key{nearest(str(name), hints)}")
        missing = [name for name in hints if name not in value]
        if missing:
            wanted = ", ".join(missing)
            self.fail(key or "(top)", f"missing: {wanted}; copy it from presets/default.yaml")
        return kind(**{name: self.value(hint, value[name], prefix + name) for name, hint in hints.items()})

    def value(self, hint: Any, value: Any, key: str) -> Any:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            return self.section(typing.cast(type[Any], hint), value, key)
        if origin is Annotated:
            result = self.value(arguments[0], value, key)
            problem = arguments[1].problem(result)
            return self.fail(key, f"{value} {problem}") if problem else result
        if origin in (types.UnionType, typing.Union):
            return None if value is None else self.value(arguments[0], value, key)
        if origin is Literal:
            if value not in arguments:
                choices = ", ".join(map(str, arguments))
                self.fail(key, f"'{value}' is not one of {choices}{nearest(str(value), arguments)}")
            return value
        if origin is tuple:
            return self.tuple(arguments, value, key)
        return self.plain(hint, value, key)

    def tuple(self, arguments: tuple[Any, ...], value: Any, key: str) -> Any:
        if not isinstance(value, list):
            self.fail(key, f"expected a list, found {value!r}")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(value) != len(arguments):
            self.fail(key, f"expected a list of {len(arguments)} numbers, found {len(value)}")
        result = tuple(self.value(hint, item, key) for hint, item in zip(arguments, value, strict=True))
        if len(arguments) == 2 and result[0] > result[1]:
            self.fail(key, f"{value}: the smaller number comes first")
        return result

    def plain(self, hint: type[Any], value: Any, key: str) -> Any:
        if hint is float and isinstance(value, str):
            with contextlib.suppress(ValueError):  # PyYAML reads 1e-4 (no dot) as text
                value = float(value)
        if hint is float and type(value) is int:
            value = float(value)
        if type(value) is not hint or (hint is float and not abs(value) < float("inf")):
            names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
            self.fail(key, f"expected {names[hint]}, found {value!r}")
        return value


def _lines(node: yaml.Node, key: str = "") -> dict[str, int]:
    """Line of every key of the tree, by its dotted name."""
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for name, child in node.value:
            dotted = f"{key}.{name.value}" if key else str(name.value)
            lines[dotted] = name.start_mark.line + 1
            lines.update(_lines(child, dotted))
    return lines


def load(path: Path) -> Config:
    """Reads and checks a parameter file. Raises UserError, one line, for anything that is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run this in the project's folder or pass --params") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f"{path}:{line + 1}" if line is not None else str(path)
        raise UserError(f"{where}: not readable as YAML: {getattr(error, 'problem', error)}") from None
    config: Config = _Reader(path, _lines(node) if node else {}).section(Config, tree, "")
    return config


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
