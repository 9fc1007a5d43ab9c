"""R-Drop: two dropout masks have to agree."""

from torch import Tensor

from .embedding_noise import OutputMethod, add_to_report, divergence, require_at_least
from .piece import Outputs
from .step import Step


class RDrop(OutputMethod):
    """ℓ¹ + ℓ² + α ½[KL(p¹‖p²) + KL(p²‖p¹)] with two dropout masks; for a regression the KL part is (f¹ − f²)².

    Liang, Wu et al. 2021, R-Drop: Regularized Dropout for Neural Networks, arXiv 2106.14448, eqs. 1–3. The sum of two
    losses has twice plain training's gradient, so that gradient clipping cuts it sooner. The authors' code for GLUE
    (dropreg/R-Drop, BERT) sums the losses likewise, but takes the mean of these over the batch and the sum of the KL
    parts with α = ½: this formula at α = B/2, and α = 1 for a regression.

    Two passes. The second mask is always another one: `mask` has no effect. Without dropout it is plain training with
    twice the gradient, which `notes` says. The returned loss is that of the first mask, which is plain training's.

    Args:
        alpha: ≥ 0.
        average: the two losses are averaged in place of summed: half of this gradient at half of α.
    """

    passes = 2.0
    looks_inside = noisy = False

    def __init__(self, params, alpha: float = 1.0, average: bool = False, **options):
        super().__init__(params, **options)
        require_at_least(0, alpha=alpha)
        self.alpha, self.average = alpha, average

    def piece(
        self, step: Step, k: int, closure: Outputs, examples: int, total: list[Tensor | None] | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        before = self.random.mark()
        losses, logits = step.outputs(k)
        if self.random.mark().equals(before):  # on the host, which waits for no device
            self.note("rdrop: the model draws no dropout, so that this is plain training in twice the time")
        others, other_logits = step.outputs(k, other_masks=True)
        apart = divergence(logits, other_logits)
        share = 1.0 if logits.shape[-1] == 1 else 0.5
        both = (losses + others) / 2 if self.average else losses + others
        loss = (both + self.alpha * share * apart).sum() / examples
        total, _ = step.differentiate(total, loss, 2 * step.costs[k])
        add_to_report(step, "divergence", apart.detach().sum() / examples)
        return losses, total
