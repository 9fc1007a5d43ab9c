"""A method's step as a CUDA graph: one launch in place of a thousand, which take longer than what they launch."""

import pickle
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from ..methods import ExampleLosses, Method
from ..text import first_line

BUCKET = 16  # tokens: batches are padded to a multiple, since each length has a graph of its own


class Graphs:
    """`backward` is `method.backward` and the clipping, replayed where a batch of the same shape came before.

    The first batch of a shape runs as it always does, which is training and warms up what a capture needs. The next is
    captured. A replay draws new dropout masks and probes each time, as generators that a graph knows do. What a method
    decides or keeps on the host would be frozen in a graph: `Method.graphable` says whether it does neither. Nor can a
    model be captured that waits for the device, or that draws random numbers on the host, as LayerDrop and BigBird's
    blocks do: the run's first repeated shape is watched for both, uncaptured.

    Where no capture is possible, or one fails, that is said once, and all goes on without.
    """

    def __init__(self, method: Method, model: nn.Module, autocast: torch.dtype | None, max_grad_norm: float | None):
        self.method, self.model, self.autocast, self.max_grad_norm = method, model, autocast, max_grad_norm
        self.pool = torch.cuda.graph_pool_handle()
        self.inputs: dict[tuple, dict[str, Tensor]] = {}
        self.captured: dict[tuple, tuple[torch.cuda.CUDAGraph, Tensor, dict, list[Tensor | None]]] = {}
        self.watched = self.failed = False

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
        if seen and not self.watched:
            return self._watch(inputs)
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

    def _watch(self, inputs: dict[str, Tensor]) -> Tensor:
        """A step, and whether it waits for the device, which would spoil a capture and the generators in it, or draws
        on the host, which would be drawn once for all replays."""
        self.watched, host = True, host_state()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                loss = self._step(inputs)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        waits = [one for one in found if "synchronizing" in str(one.message)]
        for one in found:
            if one not in waits:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        if waits:
            where = "/".join(Path(waits[0].filename).parts[-2:])
            self._without(f"a step waits for the device {len(waits)} times, first at {where}:{waits[0].lineno}")
        elif host_state() != host:
            self._without("the model draws random numbers on the host, as LayerDrop does, which a graph would freeze")
        return loss

    def _capture(self, shape: tuple, inputs: dict[str, Tensor]) -> None:
        graph, device = torch.cuda.CUDAGraph(), self.method.params[0].device
        graph.register_generator_state(self.method.generator)
        default = torch.cuda.default_generators[device.index or 0]
        states = [(generator, generator.get_state()) for generator in (default, self.method.generator)]
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                loss = self._step(inputs)
        except RuntimeError as error:
            self._without(first_line(error))
            for generator, state in states:  # which a spoilt capture leaves waiting for its end
                generator.graphsafe_set_state(torch.Generator(device).set_state(state).graphsafe_get_state())
            return
        finally:
            gradient = [p.grad for p in self.method.params]
            for p in self.method.params:
                p.grad = None
        self.captured[shape] = graph, loss, dict(self.method.report), gradient

    def _without(self, why: str) -> None:
        self.failed = True
        self.captured.clear()  # they draw from generators that may be replaced
        print(f"without CUDA graphs: {why}", file=sys.stderr, flush=True)


def host_state() -> bytes:
    """Of the generators that a model may draw from on the host: PyTorch's, Python's and NumPy's."""
    return pickle.dumps((torch.get_rng_state().numpy(), random.getstate(), np.random.get_state()))


def graphs_for(
    method: Method, model: nn.Module, autocast: torch.dtype | None, max_grad_norm: float | None, wanted: bool
) -> Graphs | None:
    """For a run on a GPU whose method can be captured; else None."""
    on_gpu = method.params[0].device.type == "cuda"
    return Graphs(method, model, autocast, max_grad_norm) if wanted and on_gpu and method.graphable else None
