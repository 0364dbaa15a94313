"""Kernels of BatchNorm against PyTorch's in double precision, part by part: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conftest import write_params
from moco.encoders import split_batch_norm
from moco.methods.step import missing_kernels
from moco.settings import reading as params

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(6, 5, 5, 4), (6, 70, 9, 8), (6, 48, 13, 11), (12, 3, 1, 1), (24, 16, 7, 7)]
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


def layer(channels: int) -> nn.BatchNorm2d:
    """In double precision; none of its weights and statistics at its start value."""
    torch.manual_seed(0)
    made = nn.BatchNorm2d(channels, device=DEVICE, dtype=torch.float64)
    for values in (made.weight, made.bias, made.running_mean, made.running_var):
        assert values is not None
        values.data.uniform_(0.5, 2)
    return made


def expected(plain: nn.BatchNorm2d, x: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output, running mean and variance; gradients gather in `plain` and `x`."""
    outputs, means, variances = [], [], []
    for part in x.chunk(parts):
        own = copy.deepcopy(plain)
        own.weight, own.bias = plain.weight, plain.bias
        outputs.append(own(part))
        assert own.running_mean is not None and own.running_var is not None
        means.append(own.running_mean)
        variances.append(own.running_var)
    return torch.cat(outputs), torch.stack(means).mean(0), torch.stack(variances).mean(0)


@pytest.mark.parametrize(("parts", "programs"), [(1, 8), (3, 1024), (3, 8)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_double_precision_on_every_part(
    shape: tuple[int, ...], parts: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means are some ten times the deviations, where a difference of sums of squares loses digits."""
    kernels = pytest.importorskip("moco.accel.batch_norm_kernels", reason="triton comes with PyTorch for GPUs alone")
    monkeypatch.setattr(kernels, "PROGRAMS", programs)  # 8: each program has several tiles
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3 + 100
    x = (x + 2 * torch.arange(shape[0])[:, None, None, None]).to(DEVICE).contiguous(memory_format=torch.channels_last)
    weigh = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    plain, single = layer(shape[1]), layer(shape[1]).float()
    exact = x.double().requires_grad_()
    wanted, *statistics = expected(plain, exact, parts)
    (wanted * weigh).sum().backward()
    x.requires_grad_()
    found = kernels.batch_norm(
        x, single.weight, single.bias, single.running_mean, single.running_var, parts=parts, momentum=0.1, eps=1e-5
    )
    (found * weigh).sum().backward()
    assert found.is_contiguous(memory_format=torch.channels_last)
    for got, right in (
        (found, wanted), (x.grad, exact.grad), (single.weight.grad, plain.weight.grad),
        (single.bias.grad, plain.bias.grad), (single.running_mean, statistics[0]), (single.running_var, statistics[1]),
    ):  # fmt: skip
        torch.testing.assert_close(got.double(), right, rtol=1e-3, atol=2e-4)


def test_where_a_gpu_has_no_kernels_one_line_says_why(tmp_path: Path) -> None:
    split_batch_norm.kernels.cache_clear()
    write_params(tmp_path)
    config, gpu = params.load(tmp_path / "params.yaml").pretrain, torch.device("cuda")
    assert missing_kernels(config, torch.device("cpu"), True) is None, "they are for GPUs"
    assert missing_kernels(config, gpu, False) is None, "they are not wanted"
    assert missing_kernels(replace(config, batch_norm="sync"), gpu, True) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a CUDA that finds no driver
        found = missing_kernels(config, gpu, True)
    if torch.cuda.is_available():
        assert found is None
    else:
        assert found is not None and len(found) > 10 and "\n" not in found
