"""A method's step as a CUDA graph: one launch in place of a thousand, which take longer than what they launch."""

import sys

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from ..methods import ExampleLosses, Method
from ..text import first_line

BUCKET = 16  # tokens: batches are padded to a multiple, since each length has a graph of its own


class Graphs:
    """`backward` is `method.backward` and the clipping, replayed where a batch of the same shape came before.

    The first batch of a shape runs as it always does, which is training and warms up what a capture needs. The second
    is captured. A replay draws new dropout masks and probes each time, as generators that a graph knows do. What a
    method decides or keeps on the host would be frozen in a graph: `Method.graphable` says whether it does neither.

    Where a capture fails, that is said once, and all goes on without.
    """

    def __init__(self, method: Method, model: nn.Module, autocast: torch.dtype | None, max_grad_norm: float | None):
        self.method, self.model, self.autocast, self.max_grad_norm = method, model, autocast, max_grad_norm
        self.pool = torch.cuda.graph_pool_handle()
        self.inputs: dict[tuple, dict[str, Tensor]] = {}
        self.captured: dict[tuple, tuple[torch.cuda.CUDAGraph, Tensor, dict, list[Tensor | None]]] = {}
        self.failed = False

    def backward(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss of a batch that still lies on the host; leaves `.grad`, clipped, and `method.report`."""
        shape = tuple((name, tuple(value.shape)) for name, value in batch.items())
        seen = shape in self.inputs
        if not seen:
            device = self.method.params[0].device
            self.inputs[shape] = {name: torch.empty_like(value, device=device) for name, value in batch.items()}
        inputs = self.inputs[shape]
        for name, value in batch.items():
            inputs[name].copy_(value.pin_memory(), non_blocking=True)
        if seen and not self.failed and shape not in self.captured:
            self._capture(shape, inputs)
        if shape not in self.captured:
            return self._step(inputs)
        graph, loss, report, gradient = self.captured[shape]
        graph.replay()
        self.method.report = dict(report)
        for p, g in zip(self.method.params, gradient, strict=True):
            p.grad = g
        return loss.clone()  # read when the next replay may have overwritten it

    def _step(self, inputs: dict[str, Tensor]) -> Tensor:
        loss = self.method.backward(ExampleLosses(self.model, inputs, self.autocast), wait=False)
        if self.max_grad_norm is not None:
            norm = torch.as_tensor(self.method.report["gradient_norm"])
            clip_grads_with_norm_(self.method.params, self.max_grad_norm, norm)
        return loss

    def _capture(self, shape: tuple, inputs: dict[str, Tensor]) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.method.generator)
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                loss = self._step(inputs)
        except RuntimeError as error:
            self.failed = True
            print(f"without CUDA graphs: {first_line(error)}", file=sys.stderr, flush=True)
            return
        finally:
            gradient = [p.grad for p in self.method.params]
            for p in self.method.params:
                p.grad = None
        self.captured[shape] = graph, loss, dict(self.method.report), gradient


def graphs_for(
    method: Method, model: nn.Module, autocast: torch.dtype | None, max_grad_norm: float | None, wanted: bool
) -> Graphs | None:
    """For a run on a GPU whose method can be captured; else None."""
    on_gpu = method.params[0].device.type == "cuda"
    return Graphs(method, model, autocast, max_grad_norm) if wanted and on_gpu and method.graphable else None
