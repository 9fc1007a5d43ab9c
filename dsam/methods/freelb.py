"""FreeLB: adversarial noise on the embeddings, whose every ascent step also trains."""

from torch import Tensor

from .embedding_noise import (
    OutputMethod,
    add_to_report,
    example_norms,
    numbers_at_tokens,
    over_examples,
    require_at_least,
)
from .piece import Outputs
from .step import Step


class FreeLB(OutputMethod):
    """(1/K) Σ_t ∇ℓ(x + δ_t), t < K: δ_0 uniform, δ_{t+1} = Π[δ_t + α ∇_δ ℓ/‖∇_δ ℓ‖] per example, Π onto ‖δ‖ ≤ ε.

    Zhu et al. 2019, FreeLB: Enhanced Adversarial Training for Natural Language Understanding, arXiv 1909.11764,
    algorithm 1: δ_0 = U(−init, init)/√N with N the numbers at the example's tokens, Frobenius norms. K passes. One
    dropout mask for all steps (§3.3 of the paper) is mask="same". The returned loss is that with δ_0: the clean input
    is never run, unless init = 0.

    Args:
        steps: K, ≥ 1.
        step_size: α, ≥ 0. With α = init = 0 plain training, K times.
        init: bound of δ_0 times √N, ≥ 0.
        max_norm: ε, ≥ 0; 0 leaves δ unbounded.
    """

    passes = 3.0

    def __init__(
        self,
        params,
        steps: int = 3,
        step_size: float = 0.1,
        init: float = 0.1,
        max_norm: float = 0.0,
        **options,
    ):
        super().__init__(params, **options)
        require_at_least(0, step_size=step_size, init=init, max_norm=max_norm)
        require_at_least(1, steps=steps)
        self.steps, self.step_size, self.init, self.max_norm = steps, step_size, init, max_norm
        self.passes = float(steps)

    def piece(
        self, step: Step, k: int, closure: Outputs, examples: int, total: list[Tensor | None] | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        noise = self._noise(closure, "uniform") * (self.init / over_examples(numbers_at_tokens(closure)).sqrt())
        noise = self._bounded(noise).requires_grad_()
        first: Tensor | None = None
        for ascent in range(self.steps):
            losses, _ = step.outputs(k, noise)
            first = losses if first is None else first
            loss = losses.sum() / (examples * self.steps)
            total, (slope,) = step.differentiate(total, loss, step.costs[k], also=[noise])
            if ascent + 1 < self.steps:
                gradient = slope.nan_to_num(0, 0, 0)  # the parameters' gradients show what is not finite
                largest = gradient.abs().amax((1, 2), keepdim=True)
                unit = gradient / over_examples(largest)  # first, lest a tiny gradient's square vanish
                unit = unit / over_examples(example_norms(unit))
                noise = self._bounded(noise.detach() + self.step_size * unit).requires_grad_()
        assert first is not None and total is not None
        add_to_report(step, "noise_norm", example_norms(noise.detach()).sum() / examples)
        return first, total

    def _bounded(self, noise: Tensor) -> Tensor:
        if not self.max_norm:
            return noise
        return noise * (self.max_norm / over_examples(example_norms(noise))).clamp_max(1)
