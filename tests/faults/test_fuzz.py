"""Input of any kind: it is used as what it says, or refused in one line; no traceback, no hang, nothing else."""

from __future__ import annotations

import copy
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import ROOT
from moco.data.decode import read_image
from moco.data.manifest import load_manifest
from moco.data.sources import read_labels
from moco.errors import UserError, one_line
from moco.labels.label_files import read_table
from moco.settings.reading import load, parse
from moco.settings.schema import Config
from moco.tracking.metric_log import metric_history, read_events
from moco.weights import load_weights

TRIES = int(os.environ.get("MOCO_TRIES", "100"))  # of each kind of input; more in `make faults`
often = settings(max_examples=TRIES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DEFAULT = yaml.safe_load((ROOT / "presets/default.yaml").read_text())
SCALARS = (
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["1e-4", ".inf", "null", "auto", "../../etc/passwd", "0x10", "1_000", "!!python/object:os x"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def keys(tree: dict[str, Any], place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in tree.items():
        found.append((*place, name))
        if isinstance(value, dict):
            found += keys(value, (*place, name))
    return found


@st.composite
def parameters(draw: st.DrawFn) -> str:
    """A parameter file with some keys renamed, left out, added or given other values."""
    tree = copy.deepcopy(DEFAULT)
    for place in draw(st.lists(st.sampled_from(keys(DEFAULT)), min_size=1, max_size=3, unique=True)):
        section: Any = tree
        for name in place[:-1]:
            section = section.get(name) if isinstance(section, dict) else None
        if not isinstance(section, dict) or place[-1] not in section:
            continue
        change = draw(st.sampled_from(["value", "rename", "remove", "add"]))
        if change == "value":
            section[place[-1]] = draw(VALUES)
        elif change == "rename":
            section[draw(st.text(max_size=12))] = section.pop(place[-1])
        elif change == "remove":
            del section[place[-1]]
        else:
            section[draw(st.text(max_size=12))] = draw(VALUES)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=draw(st.booleans()))


def numbers(value: Any) -> list[float]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [float(value)]
    if isinstance(value, (tuple, list)):
        return [number for item in value for number in numbers(item)]
    return [number for item in vars(value).values() for number in numbers(item)] if hasattr(value, "__dict__") else []


def refused_in_one_line(error: UserError) -> None:
    shown = one_line(str(error))  # as the command line does
    assert len(shown.splitlines()) == 1 and len(shown) < 1000, shown  # all names of a section may be missing


@pytest.mark.fault("bad-params", TRIES)
@often
@given(parameters())
def test_parameters_of_a_grammar(text: str) -> None:
    try:
        found = parse(text, Path("params.yaml"))
    except UserError as error:
        refused_in_one_line(error)
        assert str(error).startswith("params.yaml")
    else:
        assert isinstance(found, Config) and all(map(math.isfinite, numbers(found)))


@pytest.mark.fault("bad-params", TRIES)
@often
@given(st.text(alphabet="abc:-[]{}#&*!|>'\"%@`, \n\t0é\x00\x85\ud800", max_size=60))
def test_parameters_of_any_text(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text, Path("params.yaml"))
    refused_in_one_line(caught.value)


@pytest.mark.fault("bad-params", 4)
@pytest.mark.parametrize("text", ["team_name: 2021-13-45", "a: 0b_", "[" * 5000, "a: &t {<<: *t}"])
def test_parameters_that_the_reader_of_yaml_stumbles_over(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text, Path("params.yaml"))
    refused_in_one_line(caught.value)


def test_a_folder_is_no_parameter_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load(tmp_path)


@st.composite
def pictures(draw: st.DrawFn) -> bytes:
    """A picture of some format and mode, damaged in some places or cut off, or none at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    mode, form = draw(
        st.sampled_from([("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("L", "PNG"), ("1", "PNG"), ("I;16", "PNG"),
                         ("RGB", "JPEG"), ("CMYK", "JPEG"), ("P", "GIF"), ("RGB", "BMP"), ("RGB", "WEBP"),
                         ("RGB", "PPM"), ("F", "TIFF"), ("RGB", "TIFF"), ("LA", "PNG")])
    )  # fmt: skip
    size = draw(st.sampled_from([(16, 16), (16, 15), (1, 1), (40, 3)]))
    buffer, frames = io.BytesIO(), draw(st.integers(1, 2))
    image = Image.new(mode, size)
    more = {"save_all": True, "append_images": [image.copy()]} if frames == 2 and form in ("GIF", "TIFF", "PNG") else {}
    image.save(buffer, form, **more)
    content = bytearray(buffer.getvalue())
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)):
        content[place] = value
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


@pytest.mark.fault("bad-images", TRIES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::Warning")
@often
@given(content=pictures(), resize=st.sampled_from([None, 8, 16]))
def test_pictures_of_any_bytes(tmp_path: Path, content: bytes, resize: int | None) -> None:
    (tmp_path / "0.png").write_bytes(content)
    size = (resize, resize) if resize else (16, 16)
    try:
        found = read_image(str(tmp_path / "0.png"), size, resize)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert found.dtype == np.uint8 and found.shape == (*size, 3)


@pytest.mark.fault("bad-labels", TRIES)
@often
@given(
    dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.float32, torch.bool, torch.complex64]),
    shape=st.lists(st.integers(0, 4), max_size=3), kind=st.sampled_from(["tensor", "list", "dict", "text", "sparse"]),
    cut=st.integers(0, 1000),
)  # fmt: skip
def test_label_tensors_of_any_kind(tmp_path: Path, dtype: torch.dtype, shape: list[int], kind: str, cut: int) -> None:
    tensor = torch.zeros(shape, dtype=dtype)
    whole = {"tensor": tensor, "list": [1, 2, 3, 4], "dict": {"labels": tensor}, "text": "1234",
             "sparse": torch.zeros(4, dtype=torch.int64).to_sparse()}[kind]  # fmt: skip
    path = tmp_path / "train_label_tensor.pt"
    torch.save(whole, path)
    if cut > 500:
        path.write_bytes(path.read_bytes()[: cut - 500])
    try:
        found = read_labels(path, 4, "train")
    except UserError as error:
        refused_in_one_line(error)
    else:
        assert kind == "tensor" and dtype is torch.int64 and shape == [4] and cut <= 500
        assert found.tolist() == [0] * 4


@pytest.mark.fault("bad-labels", TRIES)
@often
@given(content=st.binary(max_size=80) | st.text(alphabet="image,label\n\r\"'0123.pngé{}[]:\t\x00", max_size=80)
       .map(str.encode), suffix=st.sampled_from([".csv", ".jsonl"]))  # fmt: skip
def test_label_files_of_any_bytes(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"labels{suffix}"
    path.write_bytes(content)
    try:
        read_table(path, lambda _: None)
    except UserError as error:
        refused_in_one_line(error)


@pytest.mark.fault("damaged-checkpoint", TRIES)
@often
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3),
       keep=st.floats(0, 1))  # fmt: skip
def test_weights_that_are_damaged(tmp_path: Path, flips: list[tuple[float, int]], keep: float) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weights": {"a": torch.ones(3, 4), "b": torch.arange(5)}, "epoch": 3}, path)
    content = bytearray(path.read_bytes())
    for place, change in flips:
        content[int(place * len(content))] ^= change
    path.write_bytes(content[: int(keep * len(content))] if keep < 0.5 else content)
    try:
        load_weights(path, "get it elsewhere")
    except UserError as error:
        refused_in_one_line(error)


@pytest.mark.fault("damaged-cache", TRIES)
@often
@given(content=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value, default=str).encode()))
def test_manifests_and_logs_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_manifest(path)
    refused_in_one_line(caught.value)
    path.write_bytes(b'{"event": "metrics", "time": 1, "step": 1, "metrics": {"loss": 2}}\n' + content)
    try:
        assert all("event" in event for event in read_events(path))
        assert metric_history(path)[0]["metrics"] == {"loss": 2}
    except UserError as error:  # a whole line that is an event and has no sense
        refused_in_one_line(error)
