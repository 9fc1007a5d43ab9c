"""SAM-ON: only the normalisation layers are perturbed."""

from torch import nn

from .base import Closure
from .perturbation import total_norm
from .sam import SAM


class SAMON(SAM):
    """ε = ρ g_N/‖g_N‖ in the parameters N of the normalisation layers (scale and shift), 0 in all others.

    Müller, Vlaar, Rolnick, Hein 2023, Normalization Layers Are All That Sharpness-Aware Minimization Needs, arXiv
    2306.04226. Two passes, the first without the weights' gradients outside N. The descent is in all parameters. The
    paper finds a larger ρ best than for SAM, hence the default (ours).

    Args:
        params: the module: its layers whose class is called …Norm… are N. Bare parameters cannot say which they
            are: `backward` then raises a ValueError.
    """

    def __init__(self, params, rho: float = 0.5, **options):
        super().__init__(params, rho, **options)
        self.norms: set[int] | None = None
        if self.module is not None:
            layers = [m for m in self.module.modules() if "Norm" in type(m).__name__ or isinstance(m, _NORMS)]
            found = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
            self.norms = found & {id(p) for p in self.params}
            if not self.norms:
                raise ValueError("sam_on perturbs normalisation layers and the module has none with trainable weights")

    def _ascent_gradient(self, closures: list[Closure]):
        if self.norms is None:
            raise ValueError("sam_on has to know the normalisation layers: pass the module, not its parameters")
        chosen = [p for p in self.params if id(p) in self.norms]
        losses, gradient = self._gradient(closures, chosen)
        given = iter(gradient)
        return losses, [next(given) if id(p) in self.norms else None for p in self.params]

    def _direction(self, gradient):
        return gradient, total_norm(gradient)


_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
