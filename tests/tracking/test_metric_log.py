"""The metric log survives what happens to files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moco.errors import UserError
from moco.settings.tracking import TrackingConfig
from moco.tracking.metric_log import MetricLog, as_text, metric_history, read_events
from moco.tracking.origin import UNKNOWN
from moco.tracking.run import Run

TRACKING = TrackingConfig(uri="", experiment="e", registered_model="m")


def steps(path: Path) -> list[int]:
    return [line["step"] for line in metric_history(path)]


def write(path: Path, *numbers: int) -> None:
    log = MetricLog(path)
    for number in numbers:
        log.write("metrics", step=number, metrics={"loss": 1 / number})
    log.close()


def test_lines_are_plain_json_with_event_and_time(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", 1)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert event["event"] == "metrics" and event["metrics"] == {"loss": 1.0}
    assert abs(event["time"] - (tmp_path / "metrics.jsonl").stat().st_mtime) < 5


def test_later_processes_append(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", 1, 2)
    write(tmp_path / "metrics.jsonl", 3)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]


def test_steps_after_a_resume_point_count_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, 3, 4)
    log = MetricLog(path)
    log.write("resume", step=2)
    log.close()
    write(path, 3, 4, 5)
    assert steps(path) == [1, 2, 3, 4, 5]


def test_a_full_disk_is_a_user_error_and_does_not_hide_the_one_before(tmp_path: Path) -> None:
    """/dev/full is the kernel's own full disk."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    said: list[str] = []
    log = MetricLog(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: No space left"):
        log.write("metrics", step=1, metrics={})
    log.file.close()
    with pytest.raises(UserError, match="first"), Run(tmp_path, "train", TRACKING, said.append) as record:
        record.started = True
        raise UserError("first")
    assert "No space left" in said[0]


def test_a_file_is_kept_with_the_run_as_it_was(tmp_path: Path) -> None:
    """The next run overwrites its place, perhaps before MLflow has it."""
    with Run(tmp_path / "run", "train", TRACKING, print) as record:
        (tmp_path / "model_sub.pth").write_text("ours")
        record.model([tmp_path / "model_sub.pth"], {}, (32, 32))
        (tmp_path / "model_sub.pth").write_text("another's")
    (event,) = [e for e in read_events(record.path) if e["event"] == "model"]
    assert [(tmp_path / "run" / file).read_text() for file in event["files"]] == ["ours"]


def test_taking_up_a_run_makes_the_steps_after_its_state_void(tmp_path: Path) -> None:
    for first, last in ((0, 4), (2, 6)):
        with Run(tmp_path, "pretrain", TRACKING, print) as record:
            record.start({}, UNKNOWN, first)
            for step in range(first + 1, last):
                record.log({"loss": float(first)}, step)
    assert [(line["step"], line["metrics"]["loss"]) for line in metric_history(tmp_path / "metrics.jsonl")] == [
        (1, 0), (2, 0), (3, 2), (4, 2), (5, 2)
    ]  # fmt: skip


def test_a_line_torn_by_a_crash_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    path.write_bytes(path.read_bytes()[:-10])
    write(path, 2, 3)
    assert steps(path) == [1, 2, 3]
    assert len(list(read_events(path))) == 3


def test_a_run_that_starts_again_without_a_state_makes_its_first_steps_void(tmp_path: Path) -> None:
    for accuracy in (0.1, 0.2):
        with Run(tmp_path / "run", "finetune", TRACKING, print) as run:
            run.start({}, UNKNOWN)
            run.log({"held_out_accuracy": accuracy}, 0)
    assert [line["metrics"] for line in metric_history(run.path)] == [{"held_out_accuracy": 0.2}]


def test_settings_that_are_lists_read_as_the_lists_of_params_yaml() -> None:
    assert [as_text(value) for value in ((), (1.0,), (0.2, 1.0), "(word)", 3)] == [
        "[]", "[1.0]", "[0.2, 1.0]", "[word]", "3"
    ]  # fmt: skip


def test_what_a_start_could_not_write_is_written_by_the_next(tmp_path: Path) -> None:
    """The disk may have been full between the first line and the files that say how to make the run again."""
    begun = replace(UNKNOWN, files={"params.yaml": b"first"})
    for again in (replace(UNKNOWN, files={}), begun, replace(begun, files={"params.yaml": b"later"})):
        with Run(tmp_path, "pretrain", TRACKING, print) as record:
            record.start({}, again)
    assert (tmp_path / "origin/params.yaml").read_bytes() == b"first"
    assert [e["path"] for e in read_events(record.path) if e["event"] == "artifact"] == ["origin/params.yaml"]
