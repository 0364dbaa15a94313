"""Work of a GPU as CUDA graphs: hundreds of small kernels are started by one call.

At the sizes of this project's images a GPU finishes a kernel before the processor has started the next one; replayed,
it waits for nothing. A graph works in memory of its own, on tensors of the shapes that it was captured with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moco.errors import AloneError
from moco.out_of_memory import full_memory
from moco.views.views import Views

WARM_UP = 3  # calls before a capture, in which libraries choose their kernels


def _warm_up(call: Callable[[], object]) -> None:
    """Run the call on a stream of its own, as a capture does.

    What a library sets up for the stream in use must not be part of a graph.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside), warnings.catch_warnings():
        # The first that autograd's thread does on the GPU.
        warnings.filterwarnings("ignore", "Attempting to run cuBLAS")
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(aside)


def _capture(call: Callable[[], Any], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Return the graph of a call, and what the call returned: tensors that every replay fills anew.

    Raises AloneError, or the error that says that the memory is full.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: other threads pin memory meanwhile, which would end a capture of any other kind.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = call()
    except RuntimeError as error:
        raise _cause(error) from None
    return graph, result


def _cause(error: BaseException) -> BaseException:
    """Return the error that ended a capture: the end of a broken capture raises another one, which hides it."""
    while not full_memory(error) and error.__context__ is not None:
        error = error.__context__
    if full_memory(error):
        return error
    reason = str(error).partition("\n")[0]
    return AloneError(f"a CUDA graph cannot be captured here: {reason}; set runtime.cuda_graphs: false")


class _Passes:
    """An encoder's passes for one slot and shape. gradient: the backward pass too, with regard to the parameters."""

    def __init__(self, network: nn.Module, precision: torch.dtype, sample: Tensor, gradient: bool) -> None:
        self.network, self.precision = network, precision
        chosen = {name: p for name, p in network.named_parameters() if p.requires_grad} if gradient else {}
        self.parameters = list(chosen.values())
        # Other tensors in the same memory: autograd binds a parameter to the stream on which it meets it first, and the
        # parameters' own must not be one of a capture.
        self.leaves = {name: p.detach().requires_grad_() for name, p in chosen.items()}
        leaves = list(self.leaves.values())
        self.images = torch.empty_like(sample).copy_(sample)
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}

        def both() -> None:
            output = self._forward()
            if gradient:
                torch.autograd.grad(output, leaves, torch.zeros_like(output), allow_unused=True)

        _warm_up(both)
        for name, buffer in network.named_buffers():  # running statistics, which the warm-up moved
            buffer.copy_(buffers[name])
        self.forward_graph, output = _capture(self._forward)
        self.output_gradient = torch.zeros_like(output)
        self.gradients: tuple[Tensor | None, ...] = ()
        if gradient:
            self.backward_graph, self.gradients = _capture(
                lambda: torch.autograd.grad(output, leaves, self.output_gradient, allow_unused=True),
                self.forward_graph.pool(),
            )
        self.output = output.detach()

    def _forward(self) -> Tensor:
        # Without its cache of weights in low precision, which would be those of another graph or of none.
        mixed = self.precision is not torch.float32
        with torch.autocast("cuda", self.precision if mixed else None, enabled=mixed, cache_enabled=False):
            output: Tensor = functional_call(self.network, self.leaves, self.images)
        return output


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passes: _Passes, images: Tensor, *parameters: Tensor) -> Tensor:
        ctx.passes = passes
        passes.images.copy_(images)
        passes.forward_graph.replay()
        output: Tensor = passes.output.detach()
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        passes: _Passes = ctx.passes
        passes.output_gradient.copy_(gradients[0])
        passes.backward_graph.replay()
        # Copied: a parameter keeps the tensor that it is given, and the next replay writes into this one.
        present = iter(torch._foreach_mul([g for g in passes.gradients if g is not None], 1.0))
        return None, None, *(None if g is None else next(present) for g in passes.gradients)


class GraphedEncoder:
    """An encoder in training mode, called as the encoder is. A shape's first call captures it, with its real images.

    The output is valid until the next call of the same `slot`, and so is the chance of a backward pass: a second call
    before the first one's backward pass takes another slot. Every slot and shape keeps memory of its own. Raises
    AloneError where nothing can be captured.
    """

    def __init__(self, network: nn.Module, precision: torch.dtype) -> None:
        self.network, self.precision = network, precision
        self.shapes: dict[tuple[Any, ...], _Passes] = {}

    def __call__(self, images: Tensor, slot: int = 0) -> Tensor:
        """Return the encoder's outputs for images, B x 3 x H x W, by a replay of the graph for this slot and shape."""
        gradient = torch.is_grad_enabled()
        shape = slot, gradient, images.shape, images.stride()
        if shape not in self.shapes:
            with torch.autocast("cuda", enabled=False):
                self.shapes[shape] = _Passes(self.network, self.precision, images, gradient)
        passes = self.shapes[shape]
        output: Tensor = _Call.apply(passes, images, *passes.parameters)
        return output


class GraphedViews:
    """Views of one recipe, called as `Views` are: the same but for rounding, as every operation is done for every
    image, and is neutral where it was not drawn. Raises AloneError where nothing can be captured."""

    def __init__(self) -> None:
        self.shapes: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor, Views]] = {}

    def __call__(
        self, views: Views, unit: Tensor, generator: torch.Generator, first: int = 0, total: int | None = None
    ) -> Tensor:
        """Return what `views` itself returns for the same arguments, but for rounding; see `Views.__call__`."""
        table = views.draw(unit, generator, first, total).packed().pin_memory().to(unit.device, non_blocking=True)
        shape = unit.shape, views.size
        if shape not in self.shapes:
            images, numbers = unit.clone(), table.clone()

            def made() -> Tensor:
                return views.normalise(views.augment_branchless(images, numbers))

            _warm_up(made)
            self.shapes[shape] = (*_capture(made), images, numbers, views)
        graph, result, images, numbers, _ = self.shapes[shape]
        images.copy_(unit)
        numbers.copy_(table)
        graph.replay()
        return result.clone()
