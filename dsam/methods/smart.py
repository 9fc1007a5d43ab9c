"""SMART: the outputs may not change with the worst small noise on the embeddings."""

import torch
from torch import Tensor

from .embedding_noise import OutputMethod, add_to_report, divergence, over_examples, require_at_least
from .piece import Outputs
from .step import Step


class SMART(OutputMethod):
    """ℓ + λ max_{‖δ‖∞ ≤ ε} D(f(x), f(x + δ)), D the symmetric KL, for a regression (f − f̃)².

    Jiang et al. 2019, SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language Models, arXiv
    1911.03437, eqs. 1–2 and the inner loop of algorithm 1: δ ~ N(0, σ²), then `steps` times δ ← Π[δ + η g/‖g‖∞] with
    g = ∇_δ D. **The Bregman proximal point (momentum) half of SMART is left out.** ‖g‖∞ is taken per example, not per
    batch, so that the result does not depend on how a batch is cut. The gradient of D flows through both outputs.

    2 + steps passes; those of the inner loop need no gradient of the weights and are cheaper than they count.

    Args:
        weight: λ, ≥ 0; 0 is plain training.
        steps: ascent steps, ≥ 1.
        step_size: η. radius: ε. sigma: σ. All ≥ 0.
    """

    passes = 3.0

    def __init__(
        self,
        params,
        weight: float = 1.0,
        steps: int = 1,
        step_size: float = 1e-3,
        radius: float = 1e-5,
        sigma: float = 1e-5,
        **options,
    ):
        super().__init__(params, **options)
        require_at_least(0, weight=weight, step_size=step_size, radius=radius, sigma=sigma)
        require_at_least(1, steps=steps)
        self.weight, self.steps, self.step_size, self.radius, self.sigma = weight, steps, step_size, radius, sigma
        self.passes = 2.0 + steps

    def piece(
        self, step: Step, k: int, closure: Outputs, examples: int, total: list[Tensor | None] | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        losses, logits = step.outputs(k)
        noise = self.sigma * self._noise(closure, "normal")
        for _ in range(self.steps):
            noise.requires_grad_()
            _, noisy = step.outputs(k, noise)
            (gradient,) = torch.autograd.grad(divergence(logits.detach(), noisy).sum(), noise)
            step.report["backwards"] += step.costs[k]
            unit = gradient / over_examples(gradient.abs().amax((1, 2)))
            noise = (noise.detach() + self.step_size * unit).clamp(-self.radius, self.radius)
        _, noisy = step.outputs(k, noise)
        apart = divergence(logits, noisy)
        loss = (losses + self.weight * apart).sum() / examples
        total, _ = step.differentiate(total, loss, 2 * step.costs[k])
        add_to_report(step, "divergence", apart.detach().sum() / examples)
        return losses, total
