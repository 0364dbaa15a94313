"""Section `pretrain`: momentum contrast (arXiv 1911.05722, 2003.04297), or another method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from moco.settings.kinds import Count, Fraction, NotNegative, Positive, PositiveFraction, Range, Seed, setting
from moco.settings.optimization import OptimizationConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(OptimizationConfig):
    """Self-supervised pretraining."""

    method: Literal["moco_v2", "simclr"] = setting(
        "moco_v2", "moco_v2 | simclr (negatives from the batch; no queue, no momentum encoder)", before="moco_v2"
    )
    encoder: str = setting(
        "small_resnet", "small_resnet | resnet18 | resnet50 | convnext_tiny | … (torchvision's ResNets and ConvNeXts)"
    )
    stem: Literal["imagenet", "small"] = setting(
        "small", "small: 3x3, stride 1, for images below about 64 pixels | imagenet: 7x7 and pooling"
    )
    width: Annotated[int, Range(1, 4096)] = setting(16, "small_resnet: channels of the stem; each stage doubles them")
    stages: Annotated[int, Range(1, 6)] = setting(3, "small_resnet: stages, each of which halves the resolution")
    convolutions: Annotated[int, Range(1, 2)] = setting(
        2, "small_resnet: 3x3 convolutions in a stage, 1 or 2", before=2
    )
    head: Literal["mlp", "linear"] = setting("mlp", "projection: mlp (v2) | linear (v1)")
    dim: Annotated[int, Range(1, 65536)] = setting(128, "width of the embedding")
    queue: Count = setting(4096, "keys in the queue; any length")
    momentum: Fraction = setting(
        0.99, "of the key encoder; 0.999 for long runs on large sets, 0.99 for short runs"
    )  # fmt: skip
    momentum_schedule: Literal["constant", "cosine"] = setting("constant", "constant | cosine (rises to 1)")
    # Logits divided by it must fit a float16.
    temperature: Annotated[float, Range(1e-3, 1e3)] = setting(0.2, "of the softmax; 0.07 in v1, 0.2 in v2")
    loss: Literal["asymmetric", "symmetric"] = setting(
        "asymmetric", "asymmetric | symmetric (both views are queries: twice the work for each image)"
    )
    batch_norm: Literal["plain", "split", "sync"] = setting(
        "plain", "plain | split (statistics of each of `splits` parts) | sync (of all processes; CUDA alone)"
    )
    splits: Count = setting(2, "split: parts of the batch, as that many GPUs would have")
    shuffle: bool = setting(
        False, "shuffle the order of keys, so that BatchNorm does not give the answer away; for split"
    )  # fmt: skip
    augmentation: Literal["v1", "v2", "v2_no_blur"] = setting(
        "v2_no_blur", "v1 | v2 | v2_no_blur (at small sizes v2's blur is narrower than a pixel)"
    )
    crop_scale: tuple[PositiveFraction, PositiveFraction] = setting(
        (0.3, 1.0), "smallest and largest fraction of the area of a crop; v1 and v2: [0.2, 1.0]"
    )
    blur_sigma: tuple[Positive, Positive] = setting(
        (0.1, 2.0), "pixels of an image of 224 pixels; scaled to the real size"
    )
    resolutions: tuple[PositiveFraction, ...] = setting(
        (1.0,),
        "sides of views as fractions of the images', small ones first: they cost less and teach as much early on",
        before=(1.0,),
    )
    resolution_changes: tuple[Fraction, ...] = setting(
        (), "fractions of the run at which the next resolution begins", before=()
    )
    epochs: Count = setting(24, "passes over the unlabelled images, in whole batches: the rest sits out each time")
    minutes: Positive | None = setting(
        None, "wall-clock; the run ends at whichever of epochs and minutes comes first; null: epochs alone"
    )
    batch_size: Annotated[int, Range(2)] = setting(128, "images")
    accumulate: Count = setting(
        1, "micro-batches that a batch is split into where memory does not hold it whole", before=1
    )
    lr: Positive = setting(0.12, "per 256 images; short runs take more than the 0.03 of MoCo's long runs")
    weight_decay: NotNegative = setting(0.0005, "MoCo's CIFAR demo; 1e-4 for sets like ImageNet")
    warmup: Fraction = setting(0.02, "fraction of the run in which lr rises from 0")
    subset: PositiveFraction = setting(1.0, "use a random fraction of the unlabelled images")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "auto | fp32 | bf16 | fp16 (CUDA). auto: bf16 or fp16 where the hardware is fast at it"
    )
    seed: Seed = setting(0, "of weights, order and views")
