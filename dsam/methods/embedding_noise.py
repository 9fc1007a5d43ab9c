"""What the baselines share that compare a model's outputs, or put noise on its input embeddings."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Closure, Method


class OutputMethod(Method):
    """A method that works on the model's outputs: its closures are `ExampleLosses`, or have what these have:
    `outputs(noise) -> (losses (B,), logits (B, C))`, `embedding_shape`, `token_mask` and `len()`.

    The clean forward draws the dropout masks that plain training would. mask="same" replays them in the forwards with
    noise, so that only the noise differs; "fresh" gives those masks from a stream aside.
    """

    def _backward(self, closures: list[Closure], scaler) -> Tensor:
        for closure in closures:
            if not all(hasattr(closure, name) for name in ("outputs", "embedding_shape", "token_mask", "__len__")):
                raise ValueError(
                    f"{type(self).__name__} needs the model's logits and embeddings, which this closure does not give: "
                    "pass dsam.ExampleLosses(model, batch)"
                )
        examples = sum(len(closure) for closure in closures)
        pieces = [self._piece(closures, k, examples, scaler).detach() for k in range(len(closures))]
        return torch.cat(pieces).mean()

    def _piece(self, closures: list[Closure], k: int, examples: int, scaler) -> Tensor:
        """Adds piece k's part of the gradient to `.grad`, 1/examples for each of its examples; returns its losses."""
        raise NotImplementedError

    def _outputs(self, closures: list[Closure], k: int, noise: Tensor | None = None, other_masks: bool = False):
        """(losses (B_k,), logits (B_k, C)) of piece k; the first call of a step draws the masks."""
        self.report["forwards"] += 1 / len(closures)
        if self._states[k] is None:
            self._states[k] = self.random.get()
            return closures[k].outputs(noise)
        if self.mask == "same" and not other_masks:
            with self.random.replay(self._states[k]):
                return closures[k].outputs(noise)
        seed = int(torch.randint(2**62, (), generator=self.generator, device=self.generator.device))
        with self.random.aside(seed):
            return closures[k].outputs(noise)

    def _descend_from(self, loss: Tensor, scaler, passes: float) -> None:
        """Adds the gradient of the scalar `loss`, whose graph holds so many (shares of) forward passes, to `.grad`."""
        (scaler.scale(loss) if scaler is not None else loss).backward()
        self.report["backwards"] += passes

    def _noise(self, closure: Closure, kind: str) -> Tensor:
        """Noise (B, T, d) in float32, 0 at padding: "normal" N(0, 1) or "uniform" U(−1, 1).

        Each example draws from its own seed, so that (on the CPU) the noise is the same however the batch is cut.
        """
        size, tokens, width = closure.embedding_shape
        device = self.generator.device
        seeds = torch.randint(2**62, (size,), generator=self.generator, device=device).tolist()
        own, rows = torch.Generator(device), []
        for seed in seeds:
            own.manual_seed(seed)
            if kind == "normal":
                rows.append(torch.randn(tokens, width, generator=own, device=device))
            else:
                rows.append(torch.rand(tokens, width, generator=own, device=device).mul_(2).sub_(1))
        return torch.stack(rows) * closure.token_mask


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL(a‖b) + KL(b‖a) of two sets of logits (B, C), shape (B,); for one output (a regression) (a − b)²."""
    if a.shape[-1] == 1:
        return (a - b).square().squeeze(-1)
    p, q = F.log_softmax(a, -1), F.log_softmax(b, -1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1)


def over_examples(norms: Tensor) -> Tensor:
    """(B,) as (B, 1, 1), kept above 0 for a division."""
    return norms.clamp_min(torch.finfo(norms.dtype).tiny).reshape(-1, 1, 1)


def numbers_at_tokens(closure: Closure) -> Tensor:
    """How many numbers of its embeddings belong to tokens, for each example, shape (B,)."""
    return closure.token_mask.sum((1, 2)) * closure.embedding_shape[2]


def example_norms(noise: Tensor) -> Tensor:
    """Frobenius norms (B,) of (B, T, d)."""
    return noise.reshape(len(noise), prod(noise.shape[1:])).norm(dim=1)


def require_at_least(smallest: float, **options: float) -> None:
    for name, value in options.items():
        if not value >= smallest:
            raise ValueError(f"{name} must be at least {smallest:g}, got {value}")
