"""How hard the contrastive task is for each image of the pool."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.errors import UserError
from moco.model.encoder import build_encoder
from moco.model.momentum_contrast import with_head
from moco.settings.schema import Config
from moco.stages.contrast import pretraining_views
from moco.stages.train import FEATURE_BATCH, Inputs
from moco.training import features
from moco.training.numerics import choose_precision

BLOCK = 4096  # images whose similarities with the negatives are held at a time


def contrastive_losses(config: Config, inputs: Inputs, count: int, seed: int) -> Tensor:
    """InfoNCE (arXiv 1911.05722, equation 1) of every image of the pool, N: the mean over all ordered pairs of `count`
    random views of it. One encoder, in evaluation mode, makes queries and keys; the negatives are as many other images
    as the queue held, in one view.

    Raises UserError where the encoder's file has no projection.
    """
    section, encoder, device = config.pretrain, inputs.encoder, inputs.device
    if not encoder.projection:
        raise UserError("models/encoder.pth: has no projection, which strategy loss needs; run `moco pretrain` again")
    network = with_head(build_encoder(encoder.architecture, 1), section.dim, section.head == "mlp")
    try:
        network.load_state_dict({**encoder.weights, **encoder.projection})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"models/encoder.pth: not made with pretrain.dim and head as they are: {reason}") from None
    network.to(device).to(memory_format=torch.channels_last)
    images = inputs.splits["unlabeled"].images
    views = pretraining_views(section, inputs.manifest, device)
    precision = choose_precision(section.precision, device)
    generator = torch.Generator().manual_seed(seed)

    def embed() -> Tensor:
        found = features.extract(
            network, images, lambda batch: views(views.to_unit(batch), generator), batch_size=FEATURE_BATCH,
            device=device, precision=precision,
        )  # fmt: skip
        return F.normalize(found, dim=1)

    embedded = [embed() for _ in range(count)]
    others = torch.randperm(len(images), generator=generator)[: section.queue]
    negatives = embedded[0][others].to(device)
    total = torch.zeros(len(images))
    for first in range(0, len(images), BLOCK):
        parts = [each[first : first + BLOCK].to(device) for each in embedded]
        own = others.to(device) == torch.arange(first, first + len(parts[0]), device=device)[:, None]
        for query in parts:
            # An image is no negative of its own.
            against = (query @ negatives.T / section.temperature).masked_fill(own, -torch.inf).logsumexp(1)
            for key in parts:
                if key is not query:
                    positive = (query * key).sum(1) / section.temperature
                    total[first : first + BLOCK] += (torch.logaddexp(positive, against) - positive).cpu()
    return total / (count * (count - 1))
