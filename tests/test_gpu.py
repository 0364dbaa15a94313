"""What only a GPU can show: that nothing waits for it, that it computes what the processor does, that runs on it
continue to the same bits. Run by whoever has one: `python -m pytest tests/test_gpu.py`."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import Moco, assert_one_line_error, write_dataset, write_params
from moco.data.batches import Fetcher, step_generator
from moco.encoders.split_batch_norm import kernels, use_split_batch_norm
from moco.methods.step import ContrastStep
from moco.out_of_memory import GPU
from moco.settings import reading as params
from moco.settings.pretrain import PretrainConfig
from moco.tracking.metric_log import metric_history
from moco.training.numerics import choose_device, set_up
from moco.views.views import Views, recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU = torch.device("cpu")
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


VARIANTS: list[dict[str, object]] = [
    {},
    {"loss": "symmetric", "batch_norm": "split", "splits": 4, "shuffle": True},
    {"accumulate": 2, "resolutions": [0.75, 1.0], "resolution_changes": [0.5]},
]
Configure = Callable[..., PretrainConfig]


@pytest.fixture
def config(tmp_path: Path) -> Configure:
    """Settings of pretraining, through the parameter file."""

    def made(**changes: object) -> PretrainConfig:
        shared = {"batch_size": 64, "queue": 256, "width": 16, "augmentation": "v2", "lr": 0.06}
        write_params(tmp_path, **{f"pretrain__{name}": value for name, value in (shared | changes).items()})
        return params.load(tmp_path / "params.yaml").pretrain

    return made


def images(count: int, size: int = 32) -> Tensor:
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    return (smooth * 255).byte().permute(0, 2, 3, 1).contiguous()


def contrast(
    section: PretrainConfig, device: torch.device, precision: torch.dtype, size: int = 32, graphs: bool = True
) -> ContrastStep:
    chosen = recipe(section.augmentation, section.crop_scale, section.blur_sigma)
    return ContrastStep(section, Views(chosen, size, MEAN, STD, device), device, precision, cuda_graphs=graphs)


def losses(step: ContrastStep, count: int, size: int = 32) -> list[float]:
    batch = images(64, size)
    return [float(step(np.arange(64), batch, 0.0, number)["loss"]) for number in range(count)]


@pytest.fixture
def gpu() -> torch.device:
    device = choose_device("auto")
    assert device.type == "cuda"
    set_up(device, 0)
    return device


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("name", ["v1", "v2", "v2_no_blur", "crop"])
def test_views_are_those_of_the_processor(gpu: torch.device, name: str, size: int) -> None:
    batch, chosen = images(100, size), recipe(name, (0.2, 1.0), (0.1, 2.0))
    made = []
    for device in (CPU, gpu):
        views = Views(chosen, size, MEAN, STD, device)
        made.append(views.augment(views.to_unit(batch), step_generator(0, 0)).cpu())
    # TensorFloat-32 keeps ten bits, more than an image of eight has. Hue jumps where two channels are equal.
    difference = (made[0] - made[1]).abs()
    assert difference.mean() < 1e-3
    assert (difference > 0.02).float().mean() < 1e-3


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(128, 64, 32, 32), (32, 96, 7, 7), (16, 512, 2, 2)])
def test_batch_norm_is_that_of_the_processor(gpu: torch.device, shape: tuple[int, ...], precision: torch.dtype) -> None:
    assert callable(kernels()), kernels()
    own, right = (use_split_batch_norm(nn.Sequential(nn.BatchNorm2d(shape[1])), 8) for _ in range(2))
    for name, values in own.named_parameters():
        torch.nn.init.uniform_(values, 0.5, 2)
        right.get_parameter(name).data.copy_(values)
    own.to(gpu)
    right.double()
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1).to(precision)
    weigh = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(precision)
    there = x.to(gpu).contiguous(memory_format=torch.channels_last).requires_grad_()
    here = x.double().requires_grad_()
    outputs = own(there), right(here)
    for output, images in zip(outputs, (there, here), strict=True):
        (output * weigh.to(images)).sum().backward()
    tolerance = 1e-5 if precision is torch.float32 else 1e-2
    pairs = [
        outputs,
        (there.grad, here.grad),
        *zip(own.state_dict().values(), right.state_dict().values(), strict=True),
    ]
    pairs += [(a.grad, b.grad) for a, b in zip(own.parameters(), right.parameters(), strict=True)]
    for found, wanted in pairs:
        assert found is not None and wanted is not None
        assert (found.detach().cpu().double() - wanted).norm() <= tolerance * wanted.double().norm()


@pytest.mark.parametrize("changes", VARIANTS)
def test_no_step_waits_for_the_gpu(gpu: torch.device, config: Configure, changes: dict[str, object]) -> None:
    step, batches = contrast(config(**changes), gpu, torch.bfloat16), Fetcher(images(512).numpy(), pin=True)
    numbers = (np.arange(first, first + 64) for first in range(0, 512, 64))
    try:
        for number, batch in enumerate(batches.batches(numbers)):
            if number == 3:  # kernels are chosen, memory is there
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Synchronization debug mode")
                    torch.cuda.set_sync_debug_mode("error")
            step(*batch, 0.9 if number % 2 else 0.1, number)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", VARIANTS)
def test_graphs_learn_what_calls_do(
    gpu: torch.device, config: Configure, changes: dict[str, object], precision: torch.dtype
) -> None:
    torch.backends.cudnn.benchmark = False  # the same kernels for both; until the next test's set_up
    replayed, called = (contrast(config(**changes), gpu, precision, graphs=graphs) for graphs in (True, False))
    start = {name: value.clone() for name, value in called.model.state_dict().items()}
    batch, tolerance = images(64), 1e-3 if precision is torch.float32 else 0.05
    for number in range(8):
        fraction = 0.9 if number % 3 == 2 else 0.1  # where sizes change: from one to the other and back
        pair = [step(np.arange(64), batch, fraction, number) for step in (replayed, called)]
        assert float(pair[0]["loss"]) == pytest.approx(float(pair[1]["loss"]), rel=tolerance), number
        if number == 3:  # as when a run is taken up, and when it is monitored
            replayed.load_state(copy.deepcopy(replayed.state()))
            replayed.model.query_encoder.eval()(torch.zeros(2, 3, 32, 32, device=gpu))
    moved, apart = [], []
    for name, value in replayed.model.state_dict().items():
        if value.is_floating_point():
            other = called.model.state_dict()[name]
            moved.append((other - start[name]).flatten())
            apart.append((value - other).flatten())
    assert torch.cat(apart).norm() < 10 * tolerance * torch.cat(moved).norm(), "of the way that weights and queue went"


def test_the_loss_is_that_of_the_processor(gpu: torch.device, config: Configure) -> None:
    """In fp32 without TensorFloat-32, the same; in bf16 and fp16 it stays close."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # until the next test's set_up
    expected = losses(contrast(config(), CPU, torch.float32), 5)
    assert losses(contrast(config(), gpu, torch.float32), 5) == pytest.approx(expected, rel=1e-3)
    for precision in (torch.bfloat16, torch.float16):
        assert losses(contrast(config(), gpu, precision), 5) == pytest.approx(expected, rel=0.05)


def test_fp16_leaves_out_a_step_that_overflows(gpu: torch.device, config: Configure) -> None:
    step = contrast(config(), gpu, torch.float16)
    losses(step, 1)
    before = [parameter.clone() for parameter in step.model.encoder.parameters()]
    step.scaler.update(float(2**40))
    losses(step, 1)
    after = list(step.model.encoder.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert step.scaler.get_scale() == 2**39
    saved = step.state()
    other = contrast(config(), gpu, torch.float16)
    other.load_state(saved)
    assert other.scaler.get_scale() == 2**39


def test_a_state_moves_between_gpu_and_processor(gpu: torch.device, config: Configure) -> None:
    there, here = contrast(config(), gpu, torch.float16), contrast(config(), CPU, torch.float32)
    losses(there, 3)
    here.load_state(there.state())
    assert losses(here, 1) == pytest.approx(losses(there, 1), rel=0.05)
    there.load_state(here.state())
    assert np.isfinite(losses(there, 1)).all()


def test_every_stage_runs_and_tells_of_the_gpu(project: Path, moco: Moco) -> None:
    write_params(project, runtime__device="auto", pretrain__precision="auto")
    for stage in ("data", "pretrain", "train", "finetune", "baseline", "eval", "request"):
        done = moco(stage)
        assert done.returncode == 0, f"{stage}: {done.stderr}"
    done = moco("profile", "--steps", "3")
    assert torch.cuda.get_device_name() in done.stdout and "GB were in use" in done.stdout, done.stderr
    (log,) = (project / "runs/pretrain").glob("*/metrics.jsonl")
    assert torch.cuda.get_device_name() in log.read_text()
    # The scorer reads the delivered model where there is no GPU.
    code = "import torch; torch.load('models/classifier/model_sub.pth', map_location='cpu', weights_only=True)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize("graphs", [True, False])
def test_memory_that_is_full_is_one_line(project: Path, moco: Moco, graphs: bool) -> None:
    """The weights fit, and the activations of a batch do not."""
    shutil.rmtree(project / "dataset")
    write_dataset(project / "dataset", unlabeled=512, size=64)
    write_params(project, runtime__device="auto", runtime__cuda_graphs=graphs, pretrain__width=32,
                 pretrain__batch_size=512)  # fmt: skip
    assert moco("data").returncode == 0
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + (256 << 20)  # each of the first activations takes 268 MB
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        done = moco("pretrain")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_one_line_error(done, GPU, "asked for", "pretrain.batch_size", "runtime.cuda_graphs: false")


def start(project: Path, stage: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "moco.cli", stage]
    return subprocess.Popen(words, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_interrupted_run_continues_to_the_same_bits(tmp_path: Path, precision: str) -> None:
    """With runtime.deterministic, as the README says."""
    encoders, histories = [], []
    for interrupted in (False, True):
        project = tmp_path / f"interrupted-{interrupted}"
        write_dataset(project / "dataset", unlabeled=400)
        write_params(project, runtime__device="auto", runtime__deterministic=True, pretrain__precision=precision,
                     pretrain__epochs=12, pretrain__width=16, pretrain__batch_size=40)  # fmt: skip
        data = start(project, "data")
        _, said = data.communicate(timeout=120)
        assert data.returncode == 0, said
        process = start(project, "pretrain")
        if interrupted:
            while not list(project.glob("runs/pretrain/*/checkpoint_002.pth")):
                assert process.poll() is None
                time.sleep(0.002)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=120)
            assert process.returncode == 128 + signal.SIGTERM, said
            process = start(project, "pretrain")
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        assert ("continuing from" in said) is interrupted
        (log,) = project.glob("runs/pretrain/*/metrics.jsonl")
        histories.append([(line["step"], line["metrics"].get("loss")) for line in metric_history(log)])
        encoders.append((project / "models/encoder.pth").read_bytes())
    assert histories[0] == histories[1]
    assert encoders[0] == encoders[1]
