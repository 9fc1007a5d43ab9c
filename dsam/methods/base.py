"""What every method is: a backward pass whose gradient is computed from a step."""

import numbers
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import Note
from .compiled import is_compiled, uncompiled
from .options import NO_OPTIMIZER, Constructed
from .perturbation import Gradients, RandomState
from .piece import Closure
from .step import Overflowed, Step, mistakes_named, require_reached


class Method(Constructed):
    """What replaces `loss.backward()`: `method.backward(closure)` leaves the step's gradient in `.grad`.

    Afterwards the weights are bit for bit what they were, and buffers (batch-norm statistics) are what one clean
    pass leaves; the optimizer, scheduler, clipping and scaler stay plain PyTorch.

    Args:
        params: the parameters to train, all of which are perturbed, or a module; what is left out gets no gradient at
            all. With a module its buffers are protected too, and the methods that look inside the model (exact
            per-example norms) can.
        mask: "same" gives the descent the dropout masks of the ascent; "fresh" draws new ones. Either way ρ = 0
            draws the same masks as plain training.
        seed: of the method's own random draws (probes, fresh masks); it never touches PyTorch's default generator.

    After each `backward`, `report` holds what happened as floats or 0-dim tensors: forwards, backwards (each over
    the whole batch), gradient_norm, and whatever the method adds. `notes` says what it does otherwise than was asked.
    """

    passes = 1.0
    """Forward-backward passes per step, in units of one training pass over the batch."""

    stateless = False
    """Whether a step keeps nothing on the host and decides nothing there, so that a CUDA graph can replay it. Said by
    each class for itself: a subclass that does not say so is not."""

    local_only = ""
    """Why the method cannot ascend on the joint batch of several processes; empty where it can."""

    looks_inside = False
    """Whether its passes put hooks into the model's layers, which what torch.compile made of them does not see."""

    noisy = False
    """Whether it adds noise to the word embeddings, where the model looks them up (`ExampleLosses.outputs`)."""

    by_example = False
    """Whether its passes take single examples' gradients from what goes into and out of the layers, (B, T, …)."""

    whole_only = ""
    """Why the method cannot work where several processes each hold a part of the weights; empty where it can."""

    def __init__(self, params: nn.Module | Iterable[nn.Parameter], *, mask: str = "same", seed: int = 0):
        if mask not in ("same", "fresh"):
            raise ValueError(f"mask must be 'same' or 'fresh', got {mask!r}")
        self.module = params if isinstance(params, nn.Module) else None
        given = _parameters(params)
        self.params = [p for p in given if p.requires_grad]
        self._frozen = [p for p in given if not p.requires_grad]
        if not self.params:
            raise ValueError("no parameter requires a gradient")
        self.mask, self.seed = mask, seed
        self.random = RandomState(self.params)
        self._generator: torch.Generator | None = None
        self._host_generator: torch.Generator | None = None
        self.report: dict[str, float | Tensor] = {}
        self.notes: list[str] = []
        self.given_up: dict[str, str] = {}
        """Ways that the model, or one of its passes, did not allow -> why; not tried again, after a restart either."""
        self.checked: set[str] = set()  # what one step has found to be in order, and no other looks at again

    @property
    def generator(self) -> torch.Generator:
        """Of the method's own draws, on the device where the parameters are now."""
        device = self.params[0].device
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device)
            self._generator.manual_seed(self.seed)
        return self._generator

    @property
    def graphable(self) -> bool:
        """Whether a CUDA graph of one step is that of all others: masks from a stream aside begin anew by the host."""
        return vars(type(self)).get("stateless", False) and self.mask == "same"

    @property
    def host_generator(self) -> torch.Generator:
        """Of draws that the host needs as numbers (seeds, which parameters): `generator` itself on a CPU, and beside
        one on another device a CPU's own, so that nobody waits for the device to draw them."""
        if self.generator.device.type == "cpu":
            return self.generator
        if self._host_generator is None:
            self._host_generator = torch.Generator().manual_seed(self.seed)
        return self._host_generator

    def backward(
        self,
        closure: Closure | Sequence[Closure],
        scaler: torch.amp.GradScaler | None = None,
        *,
        wait: bool = True,
    ) -> Tensor:
        """Adds the step's gradient to `.grad`, dense, and returns the mean loss at w (0-dim, detached).

        Args:
            closure: returns the batch's losses, shape (B,); or a sequence of such closures, one for each
                micro-batch of one batch: the result is that of the undivided batch.
            scaler: scales the losses of every pass, and `.grad` is left scaled. A gradient that is not finite is then
                left there for the scaler to skip.
            wait: False does not wait for the device to learn whether loss and gradient are finite: nothing is raised,
                `report["finite"]` (0-dim, bool) tells, and `.grad` holds whatever came. Who steps without having read
                it must have the step undone on the device, as a fused optimizer does by its `found_inf`.

        Raises:
            NonFiniteGradient: a loss or gradient is not finite. Weights and `.grad` are as they were.
            TypeError, ValueError: a closure that is none, returns no per-example losses or changes `.grad`; or
                parameters that the loss does not depend on.
        """
        self._beside_others()
        return self.take(Step(self, closure, scaler, wait))

    def take(self, step: Step) -> Tensor:
        """`backward` for a step that is made already."""
        self._require_same_parameters()
        self._require_one_device(step)
        self.report = step.report
        try:
            with mistakes_named(), self._seeing_hooks(step) if self.looks_inside else nullcontext():
                losses, gradient = self.compute(step)
        except Overflowed as overflow:
            losses, gradient = overflow.losses, overflow.gradient
        require_reached(gradient, self.params)
        loss = step.finish(losses, gradient)
        self.commit(step)
        return loss

    def commit(self, step: Step) -> None:
        """Called once a step's gradient stands in `.grad`, for what is learnt only from steps that are taken."""

    def compute(self, step: Step) -> tuple[Tensor, Gradients]:
        """(losses at w (B,), the step's gradient, one tensor for each of `params`, None where none came)."""
        raise NotImplementedError

    def _seeing_hooks(self, step: Step) -> AbstractContextManager:
        """All of the step, lest compiled passes draw other masks than the others."""
        models = [self.module, *(piece.model for piece in step.pieces)]
        if any(is_compiled(model) for model in models if model is not None):
            self.note(f"{type(self).__name__} looks into the layers, and so the compiled model runs uncompiled")
        return uncompiled()

    def give_up(self, way: str, why: object) -> None:
        """Goes on without `way` from now on: "layers" or "at once" of the classes that have one, and override this."""
        self.given_up[way] = str(why)

    def note(self, line: str) -> None:
        """Says once what is done otherwise than was asked; `notes` keeps it."""
        if line not in self.notes:
            self.notes.append(line)
            warnings.warn(line, Note, stacklevel=3)

    def _beside_others(self) -> None:
        """`torch.autograd.grad` calls none of DistributedDataParallel's hooks: each process would train a model of its
        own."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        if self.module is not None and any(isinstance(m, DistributedDataParallel) for m in self.module.modules()):
            raise ValueError(
                "a method of a DistributedDataParallel reduces nothing: give the method the network within, and "
                "Distributed(method, model) the whole (dsam.integrations)"
            )
        self.note(
            f"{dist.get_world_size()} processes train, and this gradient is of this one's batch alone: "
            "Distributed(method, model) makes it that of all (dsam.integrations)"
        )

    def _require_one_device(self, step: Step) -> None:
        """ValueError for a model on several GPUs of this process, whose masks would not be replayed on each."""
        if any(isinstance(m, torch.nn.DataParallel) for m in (self.module, *(piece.model for piece in step.pieces))):
            raise ValueError("DataParallel over several GPUs is not supported: start one process per GPU with torchrun")
        if "device" in self.checked:
            return
        if len(places := sorted({str(p.device) for p in (*self.params, *self._frozen)})) > 1:
            raise ValueError(f"the parameters are on several devices ({', '.join(places)}): methods take those of one")
        self.checked.add("device")

    def _require_same_parameters(self) -> None:
        if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in self.params):
            raise ValueError(
                "a parameter has a hook that runs once its gradient is accumulated (register_post_accumulate_grad_hook,"
                " as of an optimizer that steps inside the backward pass): a method assigns .grad when the step is "
                "whole, and it would not run; remove it, and step after backward"
            )
        given = {id(p) for p in (*self.params, *self._frozen)}
        if self.module is not None and {id(p) for p in self.module.parameters()} != given:
            raise ValueError(
                "the module has other parameters than when the method was made (a layer or a parametrization came "
                "since): make it anew, with the state_dict of the old one where it has one"
            )
        if any(p.requires_grad for p in self._frozen) or not all(p.requires_grad for p in self.params):
            raise ValueError(
                "parameters were frozen or unfrozen after the method was made: make it anew, with the state_dict of "
                "the old one where it has one"
            )

    def state_dict(self) -> dict:
        """What a resumed run needs so that the method goes on exactly as it would have."""
        state: dict = {"generator": self.generator.get_state()}
        if self.given_up:
            state["given_up"] = dict(self.given_up)
        return state if self.host_generator is self.generator else state | {"host": self.host_generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Takes up what `state_dict` gave. ValueError where that was another method's, or another kind of device's."""
        own, given = (set(of) - {"host", "given_up"} for of in (self.state_dict(), state))
        # A subclass may keep something only once it has it; one that keeps nothing more knows all that there is.
        if own - given or (given - own and type(self).load_state_dict is Method.load_state_dict):
            raise ValueError(f"the state of {type(self).__name__} has {sorted(own)}, and this one {sorted(given)}")
        try:
            self.generator.set_state(state["generator"])
            if "host" in state:
                self.host_generator.set_state(state["host"])
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"the method's state is of another kind of device: {error}") from None
        for way, why in state.get("given_up", {}).items():
            self.give_up(way, why)

    def _like_params(self, tensors: Gradients) -> list[Tensor | None]:
        """One tensor for each parameter, where that lies now and in its precision. ValueError where they don't fit."""
        sizes = [None if t is None else t.shape for t in tensors]
        if len(sizes) != len(self.params) or any(
            size not in (None, p.shape) for size, p in zip(sizes, self.params, strict=True)
        ):
            raise ValueError(f"the state of {type(self).__name__} is of other parameters than this one's")
        return [None if t is None else t.to(p.device, p.dtype) for t, p in zip(tensors, self.params, strict=True)]


class Plain(Method):
    """The gradient of the mean loss: what `loss.mean().backward()` gives."""

    stateless = True

    def compute(self, step: Step) -> tuple[Tensor, Gradients]:
        return step.gradient()


def require_number(**options: object) -> None:
    """TypeError where an option is no number, as where what makes an optimizer stands in rho's place."""
    for name, value in options.items():
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}: {NO_OPTIMIZER}")


def _parameters(params: nn.Module | Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Each once. TypeError for parameter groups, named parameters and what else is none."""
    if isinstance(params, Tensor):
        raise TypeError("params must be a module or an iterable of parameters, got one tensor: [parameter]")
    found: dict[int, nn.Parameter] = {}
    for p in params.parameters() if isinstance(params, nn.Module) else params:
        if isinstance(p, dict):
            raise TypeError("params must be parameters, not groups of them: groups belong to the optimizer")
        if isinstance(p, tuple):
            raise TypeError("params must be parameters, not pairs with names: model.parameters(), or the model itself")
        if not isinstance(p, Tensor):
            raise TypeError(f"params must be a module or an iterable of parameters, got a {type(p).__name__} in it")
        found[id(p)] = p
    return list(found.values())
