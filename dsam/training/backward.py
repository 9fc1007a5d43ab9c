"""The gradient of one batch, as a run takes it."""

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from ..config import Config
from ..glue import Tokenised
from ..methods import ExampleLosses, Method
from .batches import pieces
from .device import to
from .graphs import BUCKET, graphs_for
from .padding_free import PaddingFree


class Backward:
    """A method's backward pass over batches of `examples`: cut into pieces, moved to the device, the gradient clipped;
    one launch of a CUDA graph where that is possible.

    Args:
        whole: the model's outputs depend on padding: all of a batch is padded alike, and to no more than its longest.
        packing: what runs the method's passes without padding: batches are not cut by length.
        wait: for the device, so that a gradient that is not finite raises NonFiniteGradient; else the method's report
            has `finite`.
    """

    def __init__(
        self,
        config: Config,
        examples: Tokenised,
        model: nn.Module,
        method: Method,
        device: torch.device,
        whole: bool = False,
        wait: bool = True,
        packing: PaddingFree | None = None,
    ):
        self.train, self.examples, self.model, self.method, self.device = config.train, examples, model, method, device
        self.whole, self.wait, self.packing = whole, wait, packing
        self.autocast = torch.bfloat16 if config.train.precision == "bfloat16" else None
        wanted = config.device.graphs and not whole
        self.graphs = graphs_for(method, model, self.autocast, config.train.max_grad_norm, wanted)

    def __call__(self, batch: np.ndarray) -> Tensor:
        """The mean loss of the examples `batch`; leaves `.grad` and `method.report`."""
        parts = self.parts(batch)
        if self.graphs is not None and len(parts) == 1:
            return self.graphs.backward(self.examples.batch(parts[0], BUCKET, self.train.max_length))
        width = int(self.examples.lengths[batch].max()) if self.whole else 1
        closures = [
            ExampleLosses(self.model, to(self.examples.batch(part, width), self.device), self.autocast)
            for part in parts
        ]
        with self.packing or nullcontext():
            loss = self.method.backward(closures, wait=self.wait)
        if self.train.max_grad_norm is not None:
            norm = torch.as_tensor(self.method.report["gradient_norm"])
            clip_grads_with_norm_(self.method.params, self.train.max_grad_norm, norm)
        return loss

    def parts(self, batch: np.ndarray) -> list[np.ndarray]:
        """The pieces of the batch, each one pass."""
        by_length = not self.whole and self.packing is None
        return pieces(batch, self.examples.lengths, self.train, self.device, by_length)
