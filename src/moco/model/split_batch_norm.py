"""BatchNorm whose statistics are taken over parts of the batch, as several GPUs would."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.model.encoder import batch_norms


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over `splits` consecutive parts of the batch; one part per imagined GPU.

    While training, each part is normalised by its own mean and variance, and the running statistics move
    towards the mean of the parts' statistics. Buffers have the plain size, so weights load in any
    `nn.BatchNorm2d`. Parts are taken along the batch alone: any memory format works, and the last parts
    are one image smaller where the batch does not divide evenly. In evaluation it is plain BatchNorm.
    """

    splits: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.splits == 1:
            return super().forward(x)
        splits = min(self.splits, max(1, x.shape[0] // 2))
        assert self.running_mean is not None and self.running_var is not None
        means = self.running_mean.repeat(splits, 1)  # S x C, one row a part
        variances = self.running_var.repeat(splits, 1)
        assert self.num_batches_tracked is not None
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


def use_split_batch_norm(network: nn.Module, splits: int) -> nn.Module:
    """Turns every BatchNorm2d of the network, in place, into one with `splits` parts. Names stay."""
    if splits > 1:
        for _, _, layer in list(batch_norms(network)):
            layer.__class__ = SplitBatchNorm2d
            layer.splits = splits  # type: ignore[assignment]
    return network
