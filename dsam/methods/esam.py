"""ESAM: a random part of the weights ascends, and the examples that it hurts most descend."""

import torch
from torch import Tensor

from .base import Closure
from .losses import restricted
from .perturbation import total_norm
from .sam import SAM


class ESAM(SAM):
    """ε = (ρ/β) b ⊙ g/‖b ⊙ g‖, b ~ Bernoulli(β) per tensor; descent on the share γ whose losses ε raised most.

    Du et al. 2022, Efficient Sharpness-aware Minimization for Improved Training of Neural Networks, arXiv 2110.03141:
    stochastic weight perturbation and sharpness-sensitive data selection. As we understand the official code, b is
    drawn for whole tensors and the norm is that of the drawn part; one tensor is drawn where b would be zero (ours).
    β = γ = 1 is SAM.

    Cost: the ascent's pass (without the gradients of the tensors not drawn), a no-grad forward of the batch at w + ε
    and a pass over the share γ: (4 + 3γ)/3 passes, or 2 at γ = 1. It needs closures with `subset`, as `ExampleLosses`;
    any other is run in full and its losses selected afterwards: the same gradient, 7/3 passes. The masks of the
    selected examples are those of the ascent only with such a closure or without dropout.

    Args:
        beta: β, in (0, 1].
        gamma: γ, in (0, 1]; at least one example descends.
    """

    passes = 11 / 6

    def __init__(self, params, rho: float = 0.05, beta: float = 0.6, gamma: float = 0.5, **options):
        super().__init__(params, rho, **options)
        for name, value in (("beta", beta), ("gamma", gamma)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
        self.beta, self.gamma = beta, gamma
        self.passes = 2.0 if gamma == 1 else (4 + 3 * gamma) / 3

    def _ascent_gradient(self, closures: list[Closure]):
        drawn = torch.rand(len(self.params), generator=self.generator, device=self.generator.device)
        chosen = (drawn < self.beta).tolist()
        if not any(chosen):
            chosen[int(drawn.argmin())] = True
        self.losses, gradient = self._gradient(closures, [p for p, c in zip(self.params, chosen, strict=True) if c])
        given = iter(gradient)
        return self.losses, [next(given) if c else None for c in chosen]

    def _direction(self, gradient):
        return gradient, total_norm(gradient)

    def _backward(self, closures: list[Closure], scaler) -> Tensor:
        rho = self.rho
        try:
            self.rho = rho / self.beta
            return super()._backward(closures, scaler)
        finally:
            self.rho, self.losses = rho, None

    def _descend(self, closures: list[Closure], scaler, weights: Tensor | None = None) -> Tensor:
        examples = len(self.losses)
        count = max(1, int(self.gamma * examples + 1e-9))
        if count == examples:
            return super()._descend(closures, scaler, weights)
        with torch.no_grad():
            pieces = [self._forward(closures, k, ascent=True) for k in range(len(closures))]
        after = torch.cat(pieces)
        if scaler is None:
            self._require_finite(self.report["perturbation_norm"], after.mean())
        chosen = torch.zeros(examples, dtype=torch.bool, device=self.losses.device)
        chosen[(after - self.losses).topk(count).indices] = True
        selected, states, cost = [], [], 0.0
        for k, (closure, part) in enumerate(zip(closures, chosen.split([len(p) for p in pieces]), strict=True)):
            if part.any():
                selected.append(restricted(closure, part.nonzero().squeeze(1).tolist()))
                states.append(self._states[k])
                cost += (int(part.sum()) if hasattr(closure, "subset") else len(part)) / examples
        spent = dict(self.report)
        self._states = states
        super()._descend(selected, scaler)
        self.report |= {"forwards": spent["forwards"] + cost, "backwards": spent["backwards"] + cost}
        self.report["selected"] = float(count)
        return self.losses.mean()
