"""BatchNorm whose statistics are taken over parts of the batch, as several GPUs would."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.encoders.encoder import batch_norms


@functools.cache
def kernels() -> Callable[..., Tensor] | str:
    """Return this project's BatchNorm for the GPU in use, or the reason why there is none.

    Without it PyTorch's BatchNorm does its work, slower. Both the forward and the backward pass are tried, as both are
    compiled here for the first time.
    """
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # triton announces changes of its next version
            from moco.accel.batch_norm_kernels import batch_norm

            precisions = [torch.float32, torch.float16]
            if torch.cuda.is_bf16_supported(including_emulation=False):
                precisions.append(torch.bfloat16)
            for precision, parts in itertools.product(precisions, (1, 2)):
                images = torch.zeros(4, 16, 2, 2, device="cuda", dtype=precision, requires_grad=True)
                ones = [torch.ones(16, device="cuda") for _ in range(4)]
                rows = images.contiguous(memory_format=torch.channels_last)
                batch_norm(rows, *ones, parts=parts, momentum=0.1, eps=1e-5).sum().backward()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler, a driver or a GPU that it does not know: each fails in its own way
        return (str(error).strip() or type(error).__name__).partition("\n")[0]
    return batch_norm


def on_gpu(x: Tensor) -> bool:
    """Return whether a tensor is on a CUDA device."""
    return x.is_cuda


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over `splits` consecutive parts of the batch; one part per imagined GPU.

    While training, each part is normalised by its own mean and variance, and the running statistics move
    towards the mean of the parts' statistics. Buffers have the plain size, so weights load in any
    `nn.BatchNorm2d`. Parts are taken along the batch alone: any memory format works, and the last parts
    are one image smaller where the batch does not divide evenly. In evaluation it is plain BatchNorm. On a GPU, with
    `own_kernels`, channels-last images in equal parts go through kernels of this project's own, also in one part.
    """

    # Always kept, so that none of them is None.
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, num_features: int, splits: int = 1, own_kernels: bool = True, eps: float = 1e-5,
        momentum: float | None = 0.1, affine: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, affine)
        self.splits, self.own_kernels = splits, own_kernels

    @classmethod
    def of(cls, layer: nn.BatchNorm2d, splits: int, own_kernels: bool) -> SplitBatchNorm2d:
        """Return a layer with the settings of `layer` that shares its parameters and buffers."""
        found = cls(layer.num_features, splits, own_kernels, layer.eps, layer.momentum, layer.affine)
        found._parameters, found._buffers, found.training = layer._parameters, layer._buffers, layer.training
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised images: N x C x H x W, as x."""
        splits = min(self.splits, max(1, x.shape[0] // 2))
        if self.training and self._suits_kernels(x, splits) and callable(quick := kernels()):
            self.num_batches_tracked.add_(1)
            return quick(x, self.weight, self.bias, self.running_mean, self.running_var, parts=splits,
                         momentum=self.momentum, eps=self.eps)  # fmt: skip
        if not self.training or splits == 1:
            return super().forward(x)
        means = self.running_mean.repeat(splits, 1)  # S x C, one row a part
        variances = self.running_var.repeat(splits, 1)
        self.num_batches_tracked.add_(1)
        # As nn.BatchNorm2d: without a momentum, the average over all batches so far.
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        # Not tensor_split, whose backward pass fills a whole batch with zeros for each part, and adds them up.
        sizes = [x.shape[0] // splits + (i < x.shape[0] % splits) for i in range(splits)]
        parts = [
            F.batch_norm(part, means[i], variances[i], self.weight, self.bias, True, momentum, self.eps)
            for i, part in enumerate(x.split(sizes))
        ]
        with torch.no_grad():
            self.running_mean.copy_(means.mean(0))
            self.running_var.copy_(variances.mean(0))
        return torch.cat(parts)

    def _suits_kernels(self, x: Tensor, splits: int) -> bool:
        if not self.own_kernels or not on_gpu(x) or x.shape[0] % splits or self.momentum is None:
            return False
        several = x.numel() > splits * x.shape[1]  # numbers in each channel of a part: one has no variance
        return several and x.dtype is not torch.float64 and x.is_contiguous(memory_format=torch.channels_last)


def use_split_batch_norm(network: nn.Module, splits: int, own_kernels: bool = True) -> nn.Module:
    """Replace every BatchNorm2d of the network by a SplitBatchNorm2d with `splits` parts. Names and tensors stay."""
    for parent, name, layer in list(batch_norms(network)):
        setattr(parent, name, SplitBatchNorm2d.of(layer, splits, own_kernels))
    return network
