"""FreeLB: adversarial noise on the embeddings, whose every ascent step also trains."""

from torch import Tensor

from .base import Closure
from .embedding_noise import (
    OutputMethod,
    example_norms,
    numbers_at_tokens,
    over_examples,
    require_at_least,
)
from .gradients import buffers_kept


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

    def _piece(self, closures: list[Closure], k: int, examples: int, scaler) -> Tensor:
        closure = closures[k]
        noise = self._noise(closure, "uniform") * (self.init / over_examples(numbers_at_tokens(closure)).sqrt())
        noise = self._bounded(noise).requires_grad_()
        first, _ = self._outputs(closures, k, noise)
        losses = first
        for step in range(self.steps):
            if step:
                with buffers_kept(self.module):
                    losses, _ = self._outputs(closures, k, noise)
            self._descend_from(losses.sum() / (examples * self.steps), scaler, 1 / len(closures))
            if step + 1 < self.steps:
                gradient = noise.grad.nan_to_num(0, 0, 0)  # the parameters' gradients show what is not finite
                largest = gradient.abs().amax((1, 2), keepdim=True)
                unit = gradient / over_examples(largest)  # first, lest a tiny gradient's square vanish
                unit = unit / over_examples(example_norms(unit))
                noise = self._bounded(noise.detach() + self.step_size * unit).requires_grad_()
        norm = example_norms(noise.detach()).sum() / examples
        self.report["noise_norm"] = self.report.get("noise_norm", 0) + norm
        return first

    def _bounded(self, noise: Tensor) -> Tensor:
        if not self.max_norm:
            return noise
        return noise * (self.max_norm / over_examples(example_norms(noise))).clamp_max(1)
