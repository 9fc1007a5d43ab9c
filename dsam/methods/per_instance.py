"""Per-instance SAM, exactly, in two batched passes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .examples_apart import batch_norms, require_examples_apart, require_own_gradients, require_sound
from .m_sam import GroupSAM
from .per_example import PerExampleGradients, Unsupported
from .perturbation import Gradients
from .sam import SAM
from .step import Step


class PerInstance(SAM):
    """The mean of the SAM gradients of single examples: mean_i ∇ℓ_i(w + ρ g_i/‖g_i‖). Exact; what δ-SAM approximates.

    In the words of δ-SAM's abstract (Zhou et al. 2022, arXiv 2112.08772); m-SAM with m = 1, and with `GroupSAM(m=1)`
    that is 2B small passes. Here it is two batched ones: the first keeps each layer's inputs and output gradients, of
    which g_i consists, and in the second they move the layer's outputs as ε_i would (`PerExampleGradients.perturbed`).

    That needs a model that consists of Linear, Conv2d, LayerNorm, GroupNorm and Embedding modules and their kin as far
    as it is trained (docs/methods.md). Others are run one example at a time, which `notes` says. ValueError where the
    examples depend on one another (batch norm).
    """

    m = 1  # of the slow way

    stateless = True

    looks_inside = True
    by_example = True
    whole_only = "it looks into the layers; take SAM or DeltaSAM"

    def __init__(self, params: nn.Module, rho: float = 0.05, **options):
        super().__init__(params, rho, **options)
        if self.module is None:
            raise ValueError("PerInstance looks inside the model: PerInstance(model, …), or GroupSAM(params, m=1)")
        self._norms = batch_norms(self.module)
        require_examples_apart(self._norms)
        self.singly = False
        try:
            PerExampleGradients(self.module, self.params)
        except Unsupported as why:
            self.give_up("at once", why)

    def give_up(self, way: str, why: object) -> None:
        super().give_up(way, why)
        self.singly = True
        self.note(f"per_instance runs one example at a time, which takes longer: {why}")

    @property
    def local_only(self) -> str:  # type: ignore[override]
        return GroupSAM.local_only if self.singly else ""

    @property
    def graphable(self) -> bool:
        return super().graphable and not self.singly

    def compute(self, step: Step) -> tuple[Tensor, Gradients]:
        require_examples_apart(self._norms)
        if not self.singly:
            try:
                return self._at_once(step)
            except Unsupported as why:  # of the first step that meets it, which begins anew with the same masks
                require_sound(step, why)
                self.give_up("at once", why)
                step.report |= {"forwards": 0.0, "backwards": 0.0}
        if not step.alone:
            raise ValueError(f"PerInstance cannot ascend on the joint batch ({self.local_only}); use ascent='local'")
        found = GroupSAM.compute(self, step)  # type: ignore[arg-type]
        step.report.pop("groups")
        step.report["example_gradient_norm"] = step.report.pop("group_gradient_norm")
        return found

    def _at_once(self, step: Step) -> tuple[Tensor, Gradients]:
        assert self.module is not None
        gradients = PerExampleGradients(self.module, self.params)
        losses: list[Tensor] = []
        norms: list[Tensor] = []

        @contextmanager
        def at_its_worst(k: int) -> Iterator[None]:
            """Inside, each example of piece k is at its own w + ρ g_i/‖g_i‖."""
            with gradients.record():
                found = step.losses(k, ascent=True)
            gradients.backward(found, step.scale_of_one(len(found)))
            require_own_gradients(step, k, gradients)
            step.report["backwards"] += step.costs[k]
            losses.append(found.detach())
            norms.append(gradients.squared_norms().sqrt())
            try:
                # 0 where the gradient is 0; a norm that is not finite goes on into the gradient and is found there.
                with gradients.perturbed(torch.where(norms[k] == 0, 0, self.rho / norms[k])):
                    yield
            finally:
                gradients.clear()

        _, gradient = step.gradient(around=at_its_worst)
        own = torch.cat(norms)
        step.report["example_gradient_norm"] = own.mean()
        return torch.cat(losses), gradient
