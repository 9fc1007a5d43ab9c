"""SAM-ON: only the normalisation layers are perturbed."""

from torch import Tensor, nn

from .perturbation import Gradients
from .sam import SAM
from .step import Step


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
        self.norms: list[bool] | None = None
        if self.module is not None:
            layers = [m for m in self.module.modules() if "Norm" in type(m).__name__ or isinstance(m, _NORMS)]
            found = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
            self.norms = [id(p) in found for p in self.params]
            if not any(self.norms):
                raise ValueError("sam_on perturbs normalisation layers and the module has none with trainable weights")

    def ascent(self, step: Step) -> tuple[Tensor, Gradients]:
        if self.norms is None:
            raise ValueError("sam_on has to know the normalisation layers: pass the module, not its parameters")
        return step.gradient(ascent=True, only=self.norms)


_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
