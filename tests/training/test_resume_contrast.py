"""Contrastive training taken up from a file goes on to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from conftest import tiny_params
from moco.data.batches import EpochSampler, Fetcher
from moco.methods.step import ContrastStep, build_model
from moco.settings import reading as params
from moco.settings.pretrain import PretrainConfig
from moco.views.views import Views, recipe
from moco.weights import load_weights, save_weights

CPU = torch.device("cpu")
STEPS, SIZE, BATCH = 6, 16, 8
VARIANTS = {
    "simclr": {"method": "simclr"},
    "plain": {"batch_norm": "plain", "shuffle": False, "loss": "asymmetric"},
    "plain-symmetric": {"batch_norm": "plain", "shuffle": False, "loss": "symmetric", "queue": 20},
    "split-shuffle": {"batch_norm": "split", "shuffle": True, "loss": "asymmetric", "queue": 20},
    "split-shuffle-symmetric": {"batch_norm": "split", "shuffle": True, "loss": "symmetric", "queue": 10},
    "pyramid": {"stages": 4, "convolutions": 1},
    "progressive": {"resolutions": [0.5, 0.75, 1.0], "resolution_changes": [0.3, 0.7]},
    "linear-head-cosine-momentum": {"head": "linear", "momentum_schedule": "cosine", "warmup": 0.3},
}
IMAGES = np.random.default_rng(0).integers(0, 256, (20, SIZE, SIZE, 3)).astype(np.uint8)


@pytest.fixture(autouse=True)
def one_thread(few_threads: None) -> None:
    """Tensors this small lose time with more."""
    torch.set_num_threads(1)


def make_config(folder: Path, **changes: object) -> PretrainConfig:
    """Through the parameter file, as a user sets it."""
    path = folder / "params.yaml"
    names = {f"pretrain__{name}": value for name, value in {"batch_size": BATCH, "lr": 0.3, **changes}.items()}
    path.write_text(yaml.safe_dump(tiny_params(**names)))
    return params.load(path).pretrain


def make_step(config: PretrainConfig, precision: torch.dtype = torch.float32) -> ContrastStep:
    chosen = recipe(config.augmentation, config.crop_scale, config.blur_sigma)
    return ContrastStep(config, Views(chosen, SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), CPU), CPU, precision)


def batches(config: PretrainConfig, first: int) -> Iterator[tuple[int, np.ndarray, Tensor]]:
    """(number, indices, images) from the step `first` on, over several epochs."""
    sampler, fetcher = EpochSampler(np.arange(len(IMAGES)), BATCH, config.seed), Fetcher(IMAGES, pin=False)
    number = first
    while number < STEPS:
        epoch, batch = divmod(number, sampler.batches_per_epoch)
        for indices, images in fetcher.batches(sampler.epoch(epoch, batch)):
            yield number, indices, images
            number += 1
            if number == STEPS:
                return


def train(step: ContrastStep, first: int = 0, end: int = STEPS) -> list[float]:
    losses = []
    for number, indices, images in batches(step.config, first):
        if number >= end:
            break
        losses.append(float(step(indices, images, number / STEPS, number)["loss"]))
    return losses


def bits(value: Any, prefix: str = "") -> dict[str, Any]:
    """Everything in nested containers by its place; tensors as their bytes."""
    if isinstance(value, Tensor):
        return {prefix: (str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes())}
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in bits(inner, f"{prefix}/{name}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in bits(inner, f"{prefix}/{i}").items()}
    return {prefix: value}


def assert_same(a: ContrastStep, b: ContrastStep) -> None:
    first, second = bits(a.state()), bits(b.state())
    assert set(first) == set(second)
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_from_a_file_the_run_goes_on_to_the_same_bits(variant: str, stop: int, tmp_path: Path) -> None:
    config = make_config(tmp_path, **VARIANTS[variant])
    straight = make_step(config)
    losses = train(straight)
    before = make_step(config)
    early = train(before, end=stop)
    save_weights(tmp_path / "state.pth", before.state())
    torch.manual_seed(999)  # what another process's global generator happens to be
    after = make_step(config)
    after.load_state(load_weights(tmp_path / "state.pth", ""))
    assert_same(after, before)
    assert early + train(after, first=stop) == losses
    assert_same(after, straight)


def test_the_state_holds_what_a_run_consists_of(tmp_path: Path) -> None:
    step = make_step(make_config(tmp_path))
    fresh = bits(step.state())
    train(step, end=2)
    names = bits(step.state())
    for part in ("model/query_encoder.conv1.weight", "model/key_encoder.conv1.weight", "model/queue", "model/cursor"):
        assert f"/{part}" in names and names[f"/{part}"] != fresh[f"/{part}"], part
    assert [name for name in names if "running_mean" in name and "key_encoder" in name]
    count = len(list(step.model.encoder.parameters()))
    buffers = [name for name in names if name.endswith("momentum_buffer")]
    assert len(buffers) == count, "one velocity for every weight that is trained"


@pytest.mark.parametrize("part", ["optimizer", "queue", "cursor", "key_encoder"])
def test_a_state_without_one_part_goes_on_differently(part: str, tmp_path: Path) -> None:
    """Each part matters: the comparison above would notice its loss."""
    config = make_config(tmp_path, **VARIANTS["split-shuffle"])
    straight, before = make_step(config), make_step(config)
    train(straight)
    train(before, end=3)
    after = make_step(config)
    fresh, state = after.state(), before.state()
    if part == "optimizer":
        state["optimizer"] = fresh["optimizer"]
    else:
        fresh_part = {name: value.clone() for name, value in fresh["model"].items() if name.startswith(part)}
        state["model"] = {**state["model"], **fresh_part}
    after.load_state(state)
    train(after, first=3)
    with pytest.raises(AssertionError):
        assert_same(after, straight)


def test_a_run_is_a_function_of_its_seed(tmp_path: Path) -> None:
    first, again, other = (make_step(make_config(tmp_path, seed=seed)) for seed in (1, 1, 2))
    losses = train(first)
    torch.manual_seed(7)
    assert train(again) == losses
    assert_same(first, again)
    assert train(other) != losses


def test_a_state_without_loss_scaling_is_taken_by_a_device_that_scales(tmp_path: Path) -> None:
    """From a GPU with bf16 to one with fp16 alone, as a requeued job may meet it."""
    config = make_config(tmp_path)
    state, after = make_step(config).state(), make_step(config)
    assert state["scaler"] == {}
    after.scaler = torch.amp.GradScaler("cpu", enabled=True)
    after.load_state(state)
    assert after.scaler.state_dict() != {}


def test_building_a_model_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_model(make_config(tmp_path))
    assert torch.equal(torch.rand(3), expected)


def test_learning_rate_is_scaled_with_the_batch_and_follows_its_schedule(tmp_path: Path) -> None:
    config = make_config(tmp_path, lr=0.64, schedule="cosine", warmup=0.0)
    step = make_step(config)
    number, indices, images = next(iter(batches(config, 0)))
    assert step(indices, images, 0.0, number)["lr"] == pytest.approx(0.02)  # 0.64 * 8 / 256
    assert step(indices, images, 0.5, 1)["lr"] == pytest.approx(0.01)
    before = [p.detach().clone() for p in step.model.encoder.parameters()]
    assert step(indices, images, 1.0, 2)["lr"] == pytest.approx(0, abs=1e-9)
    after = step.model.encoder.parameters()
    assert all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("variant", ["plain", "split-shuffle"])
def test_weights_stay_channels_last_and_the_queue_unit_length(variant: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, **VARIANTS[variant])
    step = make_step(config)
    train(step, end=3)
    save_weights(tmp_path / "state.pth", step.state())
    again = make_step(config)
    again.load_state(load_weights(tmp_path / "state.pth", ""))
    train(again, first=3)
    for module in again.model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
    lengths = again.model.queue.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_bf16_trains_with_fp32_weights_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    config = make_config(tmp_path, **VARIANTS["split-shuffle-symmetric"])
    straight = make_step(config, torch.bfloat16)
    losses = train(straight)
    assert all(np.isfinite(losses)) and losses != train(make_step(config))
    assert {p.dtype for p in straight.model.parameters()} == {torch.float32}
    assert straight.model.queue.dtype is torch.float32
    before, after = make_step(config, torch.bfloat16), make_step(config, torch.bfloat16)
    train(before, end=3)
    save_weights(tmp_path / "state.pth", before.state())
    after.load_state(load_weights(tmp_path / "state.pth", ""))
    train(after, first=3)
    assert_same(after, straight)


@pytest.mark.parametrize("loss", ["asymmetric", "symmetric"])
def test_a_batch_in_parts_learns_what_the_whole_one_with_split_statistics_learns(loss: str, tmp_path: Path) -> None:
    """accumulate 2 with two splits (one for each part) against both splits at once: the same step, in less memory."""
    same = {"shuffle": True, "loss": loss}
    wanted = make_step(make_config(tmp_path, batch_norm="split", splits=2, **same))
    found = make_step(make_config(tmp_path, batch_norm="split", splits=2, accumulate=2, **same))
    plain = make_step(make_config(tmp_path, batch_norm="plain", **same))
    for number, indices, images in batches(wanted.config, 0):
        losses = [float(step(indices, images, 0.1, number)["loss"]) for step in (wanted, found, plain)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] != pytest.approx(losses[0], rel=1e-4), "else statistics play no part here"
    torch.testing.assert_close(found.model.queue, wanted.model.queue, atol=1e-4, rtol=0)
    theirs = dict(wanted.model.query_encoder.named_parameters())
    for name, weight in found.model.query_encoder.named_parameters():
        torch.testing.assert_close(weight, theirs[name], atol=2e-4, rtol=1e-3)
    right = dict(wanted.model.query_encoder.named_buffers())
    for name, value in found.model.query_encoder.named_buffers():
        if name.endswith("running_var"):  # parts are weighed a little differently; without care they count twice
            assert (value - right[name]).norm() < 0.05 * (right[name] - 1).norm(), name


def test_views_of_a_step_have_the_size_of_its_place_in_the_run(tmp_path: Path) -> None:
    step = make_step(make_config(tmp_path, resolutions=[0.5, 0.75, 1.0], resolution_changes=[0.3, 0.7]))
    seen: list[tuple[int, ...]] = []
    for encoder in (step.model.encoder, step.model.key_encoder):
        encoder.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    for number, fraction in enumerate((0.0, 0.29, 0.3, 0.69, 0.7, 1.0)):
        step(np.arange(BATCH), torch.from_numpy(IMAGES[:BATCH]), fraction, number)
    sides = [SIZE // 2] * 2 + [SIZE * 3 // 4] * 2 + [SIZE] * 2
    assert seen == [(BATCH, 3, side, side) for side in sides for _ in range(2)]
