"""The metric log survives what happens to files."""

from __future__ import annotations

import json
from pathlib import Path

from moco.tracking.metric_log import MetricLog, metric_history, read_events


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


def test_a_line_torn_by_a_crash_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    path.write_bytes(path.read_bytes()[:-10])
    write(path, 2, 3)
    assert steps(path) == [1, 2, 3]
    assert len(list(read_events(path))) == 3
