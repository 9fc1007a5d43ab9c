"""R3F: the outputs may not change with a little noise on the embeddings."""

from torch import Tensor

from .embedding_noise import OutputMethod, add_to_report, divergence, require_at_least
from .piece import Outputs
from .step import Step


class R3F(OutputMethod):
    """ℓ + λ [KL(p‖p̃) + KL(p̃‖p)], p̃ the output with noise z on the embeddings, z ~ N(0, σ²) or U(−σ, σ).

    Aghajanyan et al. 2020, Better Fine-Tuning by Reducing Representational Collapse, arXiv 2008.03156, eqs. 4–6. As in
    the authors' code (fairseq, examples/rxf), the gradient flows through both outputs, but the noisy one's stops at the
    word embeddings, and a regression, which the paper leaves open, has no such term: plain training, which `notes`
    says. That code draws fresh dropout masks for the second forward (mask="fresh"), which then differ far more than
    the noise does; the default here compares under the same masks. Two passes.

    Args:
        weight: λ, ≥ 0; 0 is plain training.
        sigma: σ, ≥ 0. The paper's 1e-5 leaves the divergence near float32's rounding under the same masks.
        noise: "normal" or "uniform".
        through_embeddings: the noisy output's gradient reaches the table of words, as the formula has it.
        regression: gives a regression the term (f − f̃)².
    """

    passes = 2.0

    def __init__(
        self,
        params,
        weight: float = 1.0,
        sigma: float = 1e-5,
        noise: str = "uniform",
        through_embeddings: bool = False,
        regression: bool = False,
        **options,
    ):
        super().__init__(params, **options)
        require_at_least(0, weight=weight, sigma=sigma)
        if noise not in ("normal", "uniform"):
            raise ValueError(f"noise must be 'normal' or 'uniform', got {noise!r}")
        self.weight, self.sigma, self.noise = weight, sigma, noise
        self.through_embeddings, self.regression = through_embeddings, regression

    def piece(
        self, step: Step, k: int, closure: Outputs, examples: int, total: list[Tensor | None] | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        losses, logits = step.outputs(k)
        if logits.shape[-1] == 1 and not self.regression:
            self.note(
                "r3f: a regression has no such term in the authors' code (regression=true adds one): this is plain"
            )
            total, _ = step.differentiate(total, losses.sum() / examples, step.costs[k])
            return losses, total
        self._require_seen(step, self.sigma)
        noise = self.sigma * self._noise(closure, self.noise)
        _, noisy = step.outputs(k, noise, detached=not self.through_embeddings)
        apart = divergence(logits, noisy)
        loss = (losses + self.weight * apart).sum() / examples
        total, _ = step.differentiate(total, loss, 2 * step.costs[k])
        add_to_report(step, "divergence", apart.detach().sum() / examples)
        return losses, total
