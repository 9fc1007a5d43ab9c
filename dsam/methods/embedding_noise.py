"""What the baselines share that compare a model's outputs, or put noise on its input embeddings."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Method
from .perturbation import Gradients
from .piece import Outputs
from .step import Step


class OutputMethod(Method):
    """A method that works on the model's outputs: its closures are `ExampleLosses`, or have what `piece.Outputs` names.

    The clean forward draws the dropout masks that plain training would. mask="same" replays them in the forwards with
    noise, so that only the noise differs; "fresh" gives those masks from a stream aside.
    """

    looks_inside = True
    noisy = True

    def compute(self, step: Step) -> tuple[Tensor, Gradients]:
        closures = [closure for piece in step.pieces if (closure := piece.outputs) is not None]
        if len(closures) < len(step):
            raise ValueError(
                f"{type(self).__name__} needs the model's logits and embeddings, which this closure does not give: "
                "pass dsam.ExampleLosses(model, batch)"
            )
        examples = sum(len(closure) for closure in closures)
        total: list[Tensor | None] | None = None
        pieces = []
        for k, closure in enumerate(closures):
            losses, total = self.piece(step, k, closure, examples, total)
            pieces.append(losses.detach())
        assert total is not None
        found = torch.cat(pieces)
        return found, step.joint(found, step.whole(total))

    def piece(
        self, step: Step, k: int, closure: Outputs, examples: int, total: list[Tensor | None] | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """(losses (B_k,) of piece k, `total` plus its part of the gradient: 1/examples for each of its examples)."""
        raise NotImplementedError

    def _require_seen(self, step: Step, sigma: float) -> None:
        """Notes noise that a pass in half precision hardly sees: what the term then measures is mostly rounding."""
        if 0 < sigma < 1e-3 and (step.autocast or any(p.dtype.itemsize < 4 for p in self.params)):
            name = type(self).__name__
            self.note(f"{name}: noise of sigma={sigma:g} is below half precision's rounding, and so is mostly the "
                      "divergence: take sigma=0.001 or more, or float32")  # fmt: skip

    def _noise(self, closure: Outputs, kind: str) -> Tensor:
        """Noise (B, T, d) in at least float32, 0 at padding: "normal" N(0, 1) or "uniform" U(−1, 1).

        Each example draws from its own seed, so that (on the CPU) the noise is the same however the batch is cut.
        """
        size, tokens, width = closure.embedding_shape
        draw = torch.randn if kind == "normal" else torch.rand
        device = self.generator.device
        if device.type == "cpu":
            own, rows = torch.Generator(), []
            for seed in torch.randint(2**62, (size,), generator=self.generator).tolist():
                rows.append(draw(tokens, width, generator=own.manual_seed(seed)))
            noise = torch.stack(rows)
        else:  # at once: a draw for each example would be a kernel each
            noise = draw(size, tokens, width, generator=self.generator, device=device)
        noise = (noise if kind == "normal" else noise.mul_(2).sub_(1)) * closure.token_mask
        return noise.to(torch.promote_types(noise.dtype, self.params[0].dtype))


def add_to_report(step: Step, name: str, value: Tensor) -> None:
    """Adds what a piece contributes to the batch's figure."""
    step.report[name] = step.report.get(name, 0) + value


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL(a‖b) + KL(b‖a) of two sets of logits (B, C), shape (B,); for one output (a regression) (a − b)²."""
    _require_two_axes(a)
    if a.shape[-1] == 1:
        return (a - b).square().squeeze(-1)
    p, q = F.log_softmax(a, -1), F.log_softmax(b, -1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1)


def one_sided(a: Tensor, b: Tensor) -> Tensor:
    """KL(a‖b) of two sets of logits (B, C), shape (B,)."""
    _require_two_axes(a)
    p, q = F.log_softmax(a, -1), F.log_softmax(b, -1)
    return (p.exp() * (p - q)).sum(-1)


def _require_two_axes(logits: Tensor) -> None:
    if logits.ndim != 2:
        raise ValueError(f"outputs of shape (B, C) are compared, and the logits have the shape {tuple(logits.shape)}")


def over_examples(norms: Tensor) -> Tensor:
    """(B,) as (B, 1, 1), kept above 0 for a division."""
    return norms.clamp_min(torch.finfo(norms.dtype).tiny).reshape(-1, 1, 1)


def numbers_at_tokens(closure: Outputs) -> Tensor:
    """How many numbers of its embeddings belong to tokens, for each example, shape (B,)."""
    return closure.token_mask.sum((1, 2)) * closure.embedding_shape[2]


def example_norms(noise: Tensor) -> Tensor:
    """Frobenius norms (B,) of (B, T, d)."""
    return noise.reshape(len(noise), prod(noise.shape[1:])).norm(dim=1)


def require_at_least(smallest: float, **options: float) -> None:
    for name, value in options.items():
        if not value >= smallest:
            raise ValueError(f"{name} must be at least {smallest:g}, got {value}")
