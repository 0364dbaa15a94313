"""What a stage was made from is what its outputs are taken for: settings, inputs and code may change meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_helpers import run_all, signalled

from conftest import Moco, assert_one_line_error, write_params
from moco.methods.step import ContrastStep
from moco.runs import identity
from moco.runs.identity import digest_of
from process_helpers import Started

BEFORE = {
    "data": (), "pretrain": ("data",), "baseline": ("data",), "train": ("data", "pretrain"),
    "request": ("data", "pretrain", "train"), "train_extra": ("data", "pretrain", "train"),
    "finetune": ("data", "pretrain", "train"), "eval": ("data", "pretrain", "train"),
}  # fmt: skip
# For each stage: where it reads images, what it leaves, and a setting that it depends on, with another value.
STAGES: dict[str, tuple[str, str, str, object]] = {
    "data": ("data.prepare", "models/manifest.json", "data__unreadable", 3),
    "pretrain": ("pretrain.open_decoded", "models/encoder.pth", "pretrain__temperature", 0.07),
    "train": ("train.open_decoded", "models/classifier", "train__lr", 0.7),
    "baseline": ("baseline.open_decoded", "reports/baseline/metrics.json", "train__lr", 0.7),
    "finetune": ("finetune.open_decoded", "models/finetuned", "finetune__lr", 0.02),
    "request": ("train.open_decoded", "models/request", "request__budget", 4),
    "train_extra": ("train.open_decoded", "models/classifier_extra", "train__lr", 0.7),
    "eval": ("eval.open_decoded", "reports/eval/metrics.json", "eval__batch_size", 3),
}
LABELLED = {"train_extra__labels": "labels/some.csv", "monitor__suspicious_labels": "warn"}
PUT_BACK = {"pretrain", "train", "baseline", "finetune", "request", "train_extra"}


@contextmanager
def meanwhile(place: str, action: Callable[[], object]) -> Iterator[None]:
    """While the stage reads its images, somebody does something."""
    module, _, name = f"moco.stages.{place}".rpartition(".")
    with pytest.MonkeyPatch.context() as patch:
        real = getattr(__import__(module, fromlist=[name]), name)

        def both(*arguments: Any) -> Any:
            action()
            return real(*arguments)

        patch.setattr(f"{module}.{name}", both)
        yield


def given_labels(project: Path) -> None:
    (project / "labels").mkdir()
    (project / "labels/some.csv").write_text("image,label\n0.png,1\n1.png,2\n")


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's files, which stand for the code that runs."""
    copy = tmp_path / "code/moco"
    shutil.copytree(identity.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(identity, "PACKAGE", copy)
    return copy


def append(path: Path) -> None:
    path.write_text(path.read_text() + "# changed\n")


@pytest.mark.fault("changed-meanwhile", 3)
@pytest.mark.parametrize("stage", STAGES)
def test_a_setting_that_changes_while_a_stage_is_at_work_ends_it_with_an_error(
    moco: Moco, project: Path, code: Path, stage: str
) -> None:
    place, output, key, value = STAGES[stage]
    given_labels(project)
    write_params(project, **LABELLED)
    run_all(moco, *BEFORE[stage])
    with meanwhile(place, lambda: write_params(project, **{**LABELLED, key: value})):
        done = moco(stage)
    name, before = key.replace("__", "."), done.stderr
    assert_one_line_error(done, name, str(value), "[E-STAGE-CHANGED]")
    assert len(done.stderr.splitlines()[-1]) <= 300
    assert digest_of(project / output) == "", "what is not of the new settings does not pass as theirs"
    write_params(project, **LABELLED, tracking__experiment="another", runtime__threads=1)
    runs = {path: digest_of(path) for path in project.glob(f"runs/{stage}/*/metrics.jsonl")}
    done = moco(stage)
    assert done.returncode == 0 and digest_of(project / output), before + done.stderr
    if stage in PUT_BACK:
        assert {path: digest_of(path) for path in project.glob(f"runs/{stage}/*/metrics.jsonl")} == runs
        assert "taken from runs/" in done.stderr
    if "classifier" in output or "finetuned" in output:
        (log,) = runs
        assert digest_of(log.parent / "outputs" / output) == digest_of(project / output)
    # and with the new ones it is made new
    write_params(project, **{**LABELLED, key: value})
    done = moco(stage)
    assert done.returncode == 0 and "taken from" not in done.stderr, done.stderr


@pytest.mark.fault("changed-meanwhile", 3)
def test_code_inputs_and_a_broken_file_that_change_meanwhile_are_named(moco: Moco, project: Path, code: Path) -> None:
    run_all(moco, "data", "pretrain")
    with meanwhile("train.open_decoded", lambda: append(code / "training/linear.py")):
        assert_one_line_error(moco("train"), "moco/training/linear.py", "[E-STAGE-CHANGED]")
    with meanwhile("train.open_decoded", lambda: append(code / "cli/main.py")):
        assert moco("train").returncode == 0, "which decides nothing"
    encoder = (project / "models/encoder.pth").read_bytes()
    with meanwhile("train.open_decoded", lambda: (project / "models/encoder.pth").write_bytes(encoder[:-1] + b"x")):
        write_params(project, train__lr=0.7)
        assert_one_line_error(moco("train"), "models/encoder.pth", "[E-STAGE-CHANGED]")
    (project / "models/encoder.pth").write_bytes(encoder)
    with meanwhile("train.open_decoded", lambda: (project / "params.yaml").write_text("train: {")):
        write_params(project, train__lr=0.6)
        assert_one_line_error(moco("train"), "params.yaml", "not readable as YAML", "[E-STAGE-CHANGED]")


@contextmanager
def pretraining_signalled(step: int) -> Iterator[None]:
    """SIGTERM comes while pretraining is in this step."""
    call = ContrastStep.__call__

    def interrupted(self: ContrastStep, indices: Any, images: Any, fraction: float, number: int) -> Any:
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, indices, images, fraction, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContrastStep, "__call__", interrupted)
        yield


@pytest.mark.fault("other-code", 3)
@pytest.mark.parametrize(
    ("stage", "stop"),
    [("pretrain", pretraining_signalled(7)), ("finetune", signalled(4))],
    ids=["pretrain", "finetune"],
)
def test_an_interrupted_run_whose_code_has_changed_is_continued_on_purpose_only(
    moco: Moco, project: Path, code: Path, stage: str, stop: Any
) -> None:
    run_all(moco, *BEFORE[stage])
    with stop:
        assert moco(stage).returncode == 128 + signal.SIGTERM
    (log,) = project.glob(f"runs/{stage}/*/metrics.jsonl")
    lines = log.read_bytes()
    changed = code / ("methods/momentum_contrast.py" if stage == "pretrain" else "training/supervised.py")
    append(changed)
    (state,) = sorted(path.relative_to(project) for path in log.parent.glob("checkpoint_*.pth"))[-1:]
    saved = (project / state).read_bytes()
    done = moco(stage)
    assert_one_line_error(done, f"moco/{changed.relative_to(code)}", f"`moco {stage} --resume {state}`", "[E-RUN-CODE]")
    assert len(done.stderr.splitlines()[-1]) <= 300
    assert log.read_bytes().count(b'"loss"') == lines.count(b'"loss"') and (project / state).read_bytes() == saved
    done = moco(stage, "--resume", str(state))
    assert done.returncode == 0 and "other code" in done.stderr and changed.name in done.stderr, done.stderr
    assert b'"resume"' in log.read_bytes() and (log.parent / "done").exists()
    newest = sorted(log.parent.glob("checkpoint_*.pth"))[-1]
    name = f"moco/{changed.relative_to(code)}"
    assert torch.load(newest, weights_only=True)["code"][name] == identity.sha256(changed)
    assert "taken from" in moco(stage).stderr, "and the result is the plain command's too"


@pytest.mark.fault("other-code")
def test_with_the_old_code_back_an_interrupted_run_goes_on(moco: Moco, project: Path, code: Path) -> None:
    run_all(moco, "data", "pretrain")
    whole = (project / "models/encoder.pth").read_bytes()
    shutil.rmtree(project / "runs/pretrain")
    with pretraining_signalled(7):
        assert moco("pretrain").returncode == 128 + signal.SIGTERM
    file = code / "views/views.py"
    text = file.read_text()
    append(file)
    assert_one_line_error(moco("pretrain"), "moco/views/views.py", "[E-RUN-CODE]")
    file.write_text(text)
    assert moco("pretrain").returncode == 0 and (project / "models/encoder.pth").read_bytes() == whole


@pytest.mark.fault("other-code")
def test_a_state_of_a_version_that_did_not_record_its_code_is_refused_in_one_line(moco: Moco, project: Path) -> None:
    run_all(moco, "data")
    with pretraining_signalled(7):
        assert moco("pretrain").returncode == 128 + signal.SIGTERM
    state = sorted(project.glob("runs/pretrain/*/checkpoint_*.pth"))[-1]
    content = torch.load(state, weights_only=True)
    del content["code"]
    torch.save(content, state)
    state.with_suffix(".pth.sha256").write_text(f"{identity.sha256(state)}  {state.name}\n")
    assert_one_line_error(moco("pretrain"), "did not record its code", "--resume", "[E-RUN-CODE]")
    assert moco("pretrain", "--resume", str(state)).returncode == 0


def test_a_run_without_a_state_whose_code_has_changed_is_begun_beside_it(moco: Moco, project: Path, code: Path) -> None:
    """Else its record would have the commit of a process that made nothing of it."""
    run_all(moco, "data", "pretrain")
    with meanwhile("train.classify", lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert moco("train").returncode == 128 + signal.SIGTERM
    append(code / "training/linear.py")
    assert moco("train").returncode == 0
    first, second = sorted(project.glob("runs/train/*"), key=lambda path: len(path.name))
    assert second.name == f"{first.name}-2" and (second / "done").exists() and not (first / "done").exists()


@pytest.mark.slow
@pytest.mark.fault("two-jobs")
def test_two_trainings_at_once_do_not_mix_their_outputs(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain")
    write_params(project, train__epochs=200_000)
    first = Started(project, "train")
    deadline = time.monotonic() + 100
    while not list(project.glob("runs/train/*/metrics.jsonl")):
        assert first.runs() and time.monotonic() < deadline
        time.sleep(0.02)
    other = project / "other.yaml"
    write_params(project)
    (project / "params.yaml").rename(other)
    sign = json.loads((project / "runs/locks/train/holder").read_text())
    done = moco("train", "--params", str(other))
    assert_one_line_error(done, f"process {sign['pid']} on {sign['host']}", "`moco train`", "[E-RUN-BUSY]")
    assert moco("eval", "--params", str(other)).returncode == 1, "there is no classifier yet"
    first.send_signal(signal.SIGTERM)
    first.finish()
    assert not (project / "models/classifier").exists()
    assert moco("train", "--params", str(other)).returncode == 0


def test_a_run_keeps_what_it_made_itself_whatever_lies_in_the_shared_folder_later(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain", "train")
    (log,) = project.glob("runs/train/*/metrics.jsonl")
    made = digest_of(log.parent / "classifier")
    weights = (project / "models/classifier/model_sub.pth").read_bytes()
    write_params(project, train__lr=0.9)
    run_all(moco, "train")
    for path in (project / "models/classifier").iterdir():
        path.write_bytes(b"somebody's")
    assert digest_of(log.parent / "classifier") == made
    assert (log.parent / "outputs/models/classifier/model_sub.pth").read_bytes() == weights
    assert (log.parent / "classifier/model_sub.pth").read_bytes() == weights
