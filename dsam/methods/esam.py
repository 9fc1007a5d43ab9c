"""ESAM: a random part of the weights ascends, and the examples that it hurts most descend."""

import torch
from torch import Tensor

from .perturbation import Gradients, total_norm
from .sam import SAM
from .step import Step, count_of


class ESAM(SAM):
    """ε = (ρ/β) b ⊙ g/‖b ⊙ g‖, b ~ Bernoulli(β) per tensor; descent on the share γ whose losses ε raised most.

    Du et al. 2022, Efficient Sharpness-aware Minimization for Improved Training of Neural Networks, arXiv 2110.03141:
    stochastic weight perturbation and sharpness-sensitive data selection. As we understand the official code, b is
    drawn for whole tensors and the norm is that of the drawn part; one tensor is drawn where b would be zero (ours).
    That code (dydjw9/Efficient_SAM) compares strictly with the ⌊γB⌋-th largest rise, so that ⌊γB⌋ − 1 examples descend:
    `strict=True`; here it is the paper's share γ.
    β = γ = 1 is SAM.

    Cost: the ascent's pass (without the gradients of the tensors not drawn), a no-grad forward of the batch at w + ε
    and a pass over the share γ: (4 + 3γ)/3 passes, or 2 at γ = 1. It needs closures with `subset`, as `ExampleLosses`;
    any other is run in full and its losses selected afterwards: the same gradient, 7/3 passes. The masks of the
    selected examples are those of the ascent only with such a closure or without dropout.

    Args:
        beta: β, in (0, 1].
        gamma: γ, in (0, 1]; at least one example descends.
        strict: one example fewer descends, as in the authors' code.
    """

    passes = 11 / 6

    whole_only = "its selection leaves the processes unequal numbers of examples; take SAM, or GSAM"

    def __init__(
        self, params, rho: float = 0.05, beta: float = 0.6, gamma: float = 0.5, strict: bool = False, **options
    ):
        super().__init__(params, rho, **options)
        for name, value in (("beta", beta), ("gamma", gamma)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
        self.beta, self.gamma, self.less = beta, gamma, int(strict)
        self.passes = 2.0 if gamma == 1 and not strict else (4 + 3 * gamma) / 3

    def compute(self, step: Step) -> tuple[Tensor, Gradients]:
        losses, ascent = step.gradient(ascent=True, only=self._drawn())
        norm = total_norm(ascent)
        step.require_finite(norm, losses, ascent)
        scale = torch.where(norm > 0, self.rho / self.beta / norm, 0)
        step.report["perturbation_norm"] = scale * norm
        with step.at(ascent, scale):
            if self.gamma == 1 and not self.less:
                _, gradient = step.gradient()
            else:
                _, gradient = self._hurt_most(step, losses, norm).gradient()
        return losses, gradient

    def _drawn(self) -> list[bool]:
        drawn = torch.rand(len(self.params), generator=self.host_generator)
        chosen = (drawn < self.beta).tolist()
        if not any(chosen):
            chosen[int(drawn.argmin())] = True
        return chosen

    def _hurt_most(self, step: Step, losses: Tensor, norm: Tensor) -> Step:
        """The step of the examples whose losses ε has raised most from `losses` (B,); the weights are at w + ε."""
        pieces = step.all_losses(ascent=True)
        after = torch.cat(pieces)
        if step.scaler is None:
            step.require_finite(norm, after, [])
        chosen = step.largest(after - losses, self.gamma, self.less)
        step.report["selected"] = float(count_of(self.gamma, len(losses), self.less))
        sizes = [len(piece) for piece in pieces]
        chosen = chosen.cpu()  # the step's one wait for the device: the batch is cut by it
        parts = [(k, part.nonzero().squeeze(1).tolist()) for k, part in enumerate(chosen.split(sizes)) if part.any()]
        return step.restricted(parts, sizes)
