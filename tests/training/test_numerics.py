"""Device, precision and what is shown while training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from moco.accel.processor import is_fast_at_bf16
from moco.errors import UserError
from moco.training.numerics import autocast, choose_device, choose_precision, set_up
from moco.training.progress import ProgressDisplay, clock

CPU = torch.device("cpu")
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")


def test_auto_takes_the_best_device_that_works() -> None:
    device = choose_device("auto")
    assert torch.zeros(1, device=device).sum().item() == 0
    assert device.type == "cuda" if torch.cuda.is_available() else device.type in ("cpu", "mps")


@NO_CUDA
def test_a_job_whose_gpu_cannot_be_used_ends_instead_of_training_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for none in ("", "NoDevFiles", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert choose_device("auto").type in ("cpu", "mps")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert choose_device("auto").type in ("cpu", "mps"), "the submitter's own, in a job without GPUs"
    monkeypatch.setenv("SLURM_JOB_GPUS", "1")
    with pytest.raises(UserError, match=r"given GPU 1, .* driver .* --nv.*moco doctor.*'cpu'"):
        choose_device("auto")
    assert choose_device("cpu") == CPU
    monkeypatch.delenv("SLURM_JOB_ID")
    assert choose_device("auto").type in ("cpu", "mps"), "somebody's own setting on a machine without a GPU"


@NO_CUDA
@pytest.mark.fault("environment", 6)
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_a_variable_that_names_no_gpu_of_a_machine_with_gpus_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "0000:01:00.0").mkdir()
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr("moco.training.numerics.GPUS", tmp_path)
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert choose_device("auto").type == "cpu"
    for wrong in ("abc", "7", "GPU-0123", "a" * 400):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", wrong)
        with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES") as caught:
            choose_device("auto")
        assert caught.value.code == "E-DEVICE-VISIBLE" and wrong[:20] in str(caught.value)
        assert choose_device("cpu") == CPU


def test_a_named_device_is_taken() -> None:
    assert choose_device("cpu") == CPU


@NO_CUDA
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7", "xpu"])
def test_an_absent_device_is_one_line_that_names_it(name: str) -> None:
    with pytest.raises(UserError, match=rf"runtime\.device: '{name}' cannot be used here: .+; try 'auto'") as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gpu", "", "cpu0", "cuda:x", "tpu", "meta"])
def test_an_unknown_device_is_one_line_that_names_it(name: str) -> None:
    with pytest.raises(UserError, match=rf"runtime\.device: '{name}' cannot be used here: .+; try 'auto'") as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)


def test_a_wanted_precision_is_taken() -> None:
    assert choose_precision("fp32", CPU) is torch.float32
    assert choose_precision("bf16", CPU) is torch.bfloat16
    assert choose_precision("fp16", torch.device("cuda")) is torch.float16


def test_fp16_is_refused_without_cuda() -> None:
    with pytest.raises(UserError, match=r"precision: fp16 needs a CUDA GPU"):
        choose_precision("fp16", CPU)


def test_auto_precision_on_a_cpu_follows_its_instructions() -> None:
    expected = torch.bfloat16 if is_fast_at_bf16() else torch.float32
    assert choose_precision("auto", CPU) is expected
    assert choose_precision("auto", torch.device("mps")) is torch.float32


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16),
                                                      ((9, 0), torch.bfloat16)])  # fmt: skip
def test_auto_precision_on_a_gpu_follows_its_generation(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", torch.device("cuda")) is expected


def test_autocast_changes_products_in_bf16_and_nothing_in_fp32() -> None:
    a = torch.randn(4, 4)
    with autocast(CPU, torch.float32):
        assert not torch.is_autocast_enabled("cpu")
        assert torch.equal(a @ a, torch.matmul(a, a)) and (a @ a).dtype is torch.float32
    with autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype is torch.bfloat16
    assert (a @ a).dtype is torch.float32


def test_threads_are_set_or_left() -> None:
    before = torch.get_num_threads()
    set_up(CPU, 0)
    assert torch.get_num_threads() == before
    set_up(CPU, 1)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (-3, "0:00"), (59.9, "0:59"), (61, "1:01"), (3599, "59:59"), (3723, "1:02:03")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_file_gets_plain_lines_with_rate_and_remaining_time(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay("pretrain", terminal=False) as display:
        display.start(0.25)
        display.began -= 100  # as if it had run so long
        display.last_line -= 20
        display.update(0.375, 1234.4, "loss 3.210")
        display.began -= 100
        display.last_line -= 20
        display.update(0.5, 1500.0, "loss 2.000")
        display.update(1.0, 1500.0, "loss 1.000")
    out, err = capsys.readouterr()
    assert out == ""
    assert not re.search(r"[^\n\x20-\x7e]", err), "no control characters"
    lines = err.splitlines()
    assert len(lines) == 3
    assert "pretrain:" in lines[0] and "38%" in lines[0] and "1,234 images/s" in lines[0] and "loss 3.210" in lines[0]
    # A quarter took 200 s since the start at a quarter: half of the whole is left, 400 s.
    assert re.search(r"50% 1,500 images/s 6:4\d left", lines[1]), lines[1]
    assert "100%" in lines[2] and "0:00 left" in lines[2]


def test_lines_in_a_file_are_rare_but_the_last_one_comes(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay("train", terminal=False) as display:
        for i in range(1, 101):
            display.update(i / 100, 10.0, "")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 2 and "100%" in lines[-1]


def test_an_error_inside_the_display_passes_through() -> None:
    for terminal in (True, False):
        with pytest.raises(ValueError, match="inner"), ProgressDisplay("x", terminal=terminal) as display:
            display.update(0.5, 1.0, "")
            raise ValueError("inner")


def test_a_chosen_gpu_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams, graphs and page-locked memory are those of the current device."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    try:
        set_up(torch.device("cuda", 1), 0)
        set_up(torch.device("cuda"), 0)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
    assert chosen == [torch.device("cuda", 1)]
