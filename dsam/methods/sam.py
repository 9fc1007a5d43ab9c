"""SAM and ASAM: the gradient at the worst point of a ball around the weights."""

import torch
from torch import Tensor

from .base import Method, require_number
from .perturbation import Gradients, total_norm
from .step import Step


class SAM(Method):
    """ε = ρ g/‖g‖ with g the mean gradient; the step's gradient is the mean gradient at w + ε.

    Foret et al. 2021, Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412, eq. 2.

    Args:
        rho: radius of the ball, ≥ 0; 0 equals plain training bit for bit.
    """

    stateless = True
    passes = 2.0

    def __init__(self, params, rho: float = 0.05, **options):
        super().__init__(params, **options)
        require_number(rho=rho)
        if not rho >= 0:
            raise ValueError(f"rho must be at least 0, got {rho}")
        self.rho = rho
        moves = rho and type(self).by_example is not True  # which adds to the layers' outputs instead
        if moves and (short := sorted({str(p.dtype)[6:] for p in self.params if p.element_size() < 4})):
            self.note(
                f"weights of {', '.join(short)}: ε is rounded to their precision, so that most of them may not move; "
                "float32 weights under autocast (bf16=True) have it exactly"
            )

    def compute(self, step: Step) -> tuple[Tensor, Gradients]:
        losses, ascent = self.ascent(step)
        return losses, self.descent(step, losses, ascent)

    def ascent(self, step: Step) -> tuple[Tensor, Gradients]:
        """(losses at w (B,), the gradient along which to ascend)."""
        return step.gradient(ascent=True, by_rows=self.takes_rows())

    def descent(self, step: Step, losses: Tensor, ascent: Gradients) -> list[Tensor | None]:
        """The mean gradient at w + ε, equation 2; `losses` are those at w."""
        direction, norm = self.direction(ascent)
        step.require_finite(norm, losses, ascent)
        scale = torch.where(norm > 0, self.rho / norm, 0)
        step.report["perturbation_norm"] = scale * (norm if direction is ascent else total_norm(direction))
        with step.at(direction, scale):
            _, gradient = step.gradient()
        return gradient

    def direction(self, gradient: Gradients) -> tuple[Gradients, Tensor]:
        """(d, n) such that ε = ρ d/n."""
        return gradient, total_norm(gradient)

    def takes_rows(self) -> bool:
        """Whether the ascent's gradient of the word embeddings, half of a small encoder's weights, may stay sparse.

        It may where only the norm and the move meet it; a subclass with another direction gets dense gradients.
        """
        return type(self).direction is SAM.direction


class ASAM(SAM):
    """ε = ρ T² g/‖T g‖ with T = |w| + η: a ball that scales with each weight.

    Kwon et al. 2021, ASAM: Adaptive Sharpness-Aware Minimization, arXiv 2102.11600, eq. 7. ρ is about ten times SAM's.
    As in the authors' code (SamsungLabs/ASAM) that is so for the parameters whose names contain "weight", those of
    normalisation layers among them; T = 1 for the others: biases, and what a model names otherwise (XLNet's and
    Funnel's attention matrices), unless `biases=True`. Parameters that are given without their
    model have no names: all are scaled, which `notes` says.

    Args:
        rho: ≥ 0. eta: η, ≥ 0.
        biases: scales all parameters, as the formula has it.
    """

    stateless = True

    def __init__(self, params, rho: float = 0.5, eta: float = 0.01, biases: bool = False, **options):
        super().__init__(params, rho, **options)
        if not eta >= 0:
            raise ValueError(f"eta must be at least 0, got {eta}")
        self.eta = eta
        self._plain: set[int] = set()
        """Positions of the parameters with T = 1."""
        if self.module is not None and not biases:
            names = {id(p): name for name, p in self.module.named_parameters(remove_duplicate=False)}
            self._plain = {i for i, p in enumerate(self.params) if "weight" not in names.get(id(p), "")}
        elif not biases:
            self.note(
                "asam: parameters without names are all scaled, biases too; ASAM(model, …) leaves biases as they are"
            )

    def direction(self, gradient: Gradients) -> tuple[Gradients, Tensor]:
        scaling = {i: g for i, g in enumerate(gradient) if g is not None and i not in self._plain}
        found = list(gradient)
        if not scaling:
            return found, total_norm(found)
        scales = torch._foreach_abs([self.params[i].data for i in scaling])
        torch._foreach_add_(scales, self.eta)
        scaled = torch._foreach_mul(list(scaling.values()), scales)
        for i, own in zip(scaling, scaled, strict=True):
            found[i] = own
        norm = total_norm(found)
        torch._foreach_mul_(scaled, scales)
        return found, norm
