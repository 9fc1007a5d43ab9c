"""SMART: the outputs may not change with the worst small noise on the embeddings."""

import torch
from torch import Tensor

from .embedding_noise import OutputMethod, add_to_report, divergence, one_sided, over_examples, require_at_least
from .gradients import outside_autocast
from .piece import Outputs
from .step import Step


class SMART(OutputMethod):
    """ℓ + λ max_{‖δ‖∞ ≤ ε} D(f(x), f(x + δ)), D the symmetric KL, for a regression (f − f̃)².

    Jiang et al. 2019, SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language Models, arXiv
    1911.03437, eqs. 1–2 and the inner loop of algorithm 1: δ ~ N(0, σ²), then `steps` times δ ← Π[δ + η g/‖g‖∞] with
    g = ∇_δ D. **The Bregman proximal point (momentum) half of SMART is left out.** ‖g‖∞ is taken per example, not per
    batch, so that the result does not depend on how a batch is cut. The gradient of D flows through both outputs.

    ascent="code" is what the authors' code does (namisan/mt-dnn, mt_dnn/perturbation.py since 2020), which differs. The
    ascent is one-sided, on 2 Σ_c p̃_c (logit p̃_c − logit p_c) with these differences held constant, p̃ the noisy output.
    The new δ is δ + η g over its largest number **in each token** plus 1e-6, and so about 1 there whatever η is.
    Nothing is projected. Each KL of the penalty sends its gradient through its second output alone.

    2 + steps passes; those of the inner loop need no gradient of the weights and are cheaper than they count.

    Args:
        weight: λ, ≥ 0; 0 is plain training.
        steps: ascent steps, ≥ 1.
        step_size: η. radius: ε, without effect in "code". sigma: σ. All ≥ 0.
        ascent: "paper" or "code".
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
        ascent: str = "paper",
        **options,
    ):
        super().__init__(params, **options)
        require_at_least(0, weight=weight, step_size=step_size, radius=radius, sigma=sigma)
        require_at_least(1, steps=steps)
        if ascent not in ("paper", "code"):
            raise ValueError(f"ascent must be 'paper' or 'code', got {ascent!r}")
        self.ascent = ascent
        self.weight, self.steps, self.step_size, self.radius, self.sigma = weight, steps, step_size, radius, sigma
        self.passes = 2.0 + steps

    def piece(
        self, step: Step, k: int, closure: Outputs, examples: int, total: list[Tensor | None] | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        losses, logits = step.outputs(k)
        self._require_seen(step, self.sigma)
        noise = self.sigma * self._noise(closure, "normal")
        code = self.ascent == "code"
        for _ in range(self.steps):
            noise.requires_grad_()
            _, noisy = step.outputs(k, noise)
            target = logits.detach()
            far = _as_in_code(noisy, target) if code else divergence(target, noisy)
            scale = step.scale_of_one(examples)  # or half precision's smallest numbers become 0
            with step.reruns_undone(), outside_autocast(noise.device):
                (gradient,) = torch.autograd.grad(far.sum() * scale, noise)
            gradient = gradient / scale
            step.report["backwards"] += step.costs[k]
            if code:
                ahead = noise.detach() + self.step_size * gradient
                noise = ahead / (ahead.abs().amax(2, keepdim=True) + 1e-6)
            else:
                unit = gradient / over_examples(gradient.abs().amax((1, 2)))
                noise = (noise.detach() + self.step_size * unit).clamp(-self.radius, self.radius)
        _, noisy = step.outputs(k, noise)
        apart = divergence(logits, noisy)
        if code and logits.shape[-1] > 1:
            apart = one_sided(logits.detach(), noisy) + one_sided(noisy.detach(), logits)
        loss = (losses + self.weight * apart).sum() / examples
        total, _ = step.differentiate(total, loss, 2 * step.costs[k])
        add_to_report(step, "divergence", apart.detach().sum() / examples)
        return losses, total


def _as_in_code(noisy: Tensor, clean: Tensor) -> Tensor:
    """What the authors' code ascends on, shape (B,): not quite a KL, since it has odds in place of probabilities."""
    if noisy.shape[-1] == 1:
        return (noisy - clean).square().squeeze(-1)
    p, q = noisy.softmax(-1), clean.softmax(-1)
    log_odds = [-((1 / (x.detach() + 1e-6) - 1 + 1e-6).log()) for x in (p, q)]
    return 2 * (p * (log_odds[0] - log_odds[1])).sum(-1)
