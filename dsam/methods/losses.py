"""Per-example losses of a Hugging Face classifier: the closure that methods call."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses (B,) in float32: cross-entropy for integer labels (B,) and logits (B, C), squared error for float ones."""
    logits = logits.float()
    if labels.is_floating_point():
        return (logits.reshape(len(labels)) - labels.float()).square()
    return F.cross_entropy(logits, labels, reduction="none")


class ExampleLosses:
    """Calling it runs `model` on `batch` and returns its per-example losses, shape (B,).

    Args:
        model: a Hugging Face sequence classifier (one output is a regression).
        batch: its inputs and `labels`.
        autocast: the precision of the forward pass, e.g. torch.bfloat16; None is that of the weights.

    `logits` (B, C), detached, are those of the latest call.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor], autocast: torch.dtype | None = None):
        self.model = model
        self.inputs = {name: value for name, value in batch.items() if name != "labels"}
        self.labels = batch["labels"]
        self.autocast = autocast
        self.logits: Tensor | None = None

    def __call__(self) -> Tensor:
        return self._losses(self.autocast)

    def in_float32(self) -> Tensor:
        """The losses without autocast: differences of bfloat16 losses are mostly rounding."""
        return self._losses(None)

    def _losses(self, precision: torch.dtype | None) -> Tensor:
        with torch.autocast(self.labels.device.type, precision, enabled=precision is not None):
            logits = self.model(**self.inputs).logits
        self.logits = logits.detach()
        return example_losses(logits, self.labels)

    def __len__(self) -> int:
        return len(self.labels)
