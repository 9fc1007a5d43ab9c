"""What a method's constructor takes, and what is said of the rest."""

import inspect
from typing import Any

from torch.optim import Optimizer

from ..errors import did_you_mean
from .weighting import WEIGHTINGS

NO_OPTIMIZER = (
    "a method is not an optimizer and takes none; it stands in for loss.backward(), and the optimizer is made beside it"
)
OF_OPTIMIZERS = ("base_optimizer", "optimizer", "lr", "momentum", "nesterov", "betas", "weight_decay")
"""What other SAM code takes for the optimizer within; a method may have an option of such a name (MomentumSAM)."""

ADAPTIVE = "ASAM(model, rho=0.5) is the adaptive SAM"


class Constructed:
    """Refuses what a constructor does not take before Python does, which would name the base that it came to.

    A base of `Method` with no constructor of its own. The signatures of classes are their constructors', which older
    versions of Python 3.11 would not tell of a class that inherits its own.
    """

    __signature__: inspect.Signature

    def __init_subclass__(cls, **named):
        super().__init_subclass__(**named)
        constructor = inspect.signature(cls.__init__)
        cls.__signature__ = constructor.replace(parameters=list(constructor.parameters.values())[1:])

    def __new__(cls, *args, **options):  # without any where an instance is copied or unpickled
        if cls.__init__.__module__.startswith(f"{__package__}."):  # a subclass's may take what it does not name
            _require_taken(cls, args, options)
        return super().__new__(cls)


def _require_taken(cls: Any, args: tuple, options: dict[str, Any]) -> None:
    """TypeError for an optimizer, and for what is no option of `cls`."""
    known: dict[str, tuple[Any, Any]] = {}
    collect(cls, known)
    if "weighting" in known:
        given = dict(zip(inspect.signature(cls).parameters, args, strict=False)) | options
        weighting = given.get("weighting", known["weighting"][1])
        kind = WEIGHTINGS.get(weighting) if isinstance(weighting, str) else None
        if kind is None:
            return  # the constructor says what is wrong with that, or with options beside a weighting that is made
        collect(kind, known)
    unknown = [name for name in options if name not in known and name != "params"]
    adaptive = "adaptive" in unknown
    wrapped = [_shown(value) for value in args if _is_optimizer(value)]
    wrapped += [
        f"{name}={_shown(value)}"
        for name, value in options.items()
        if _is_optimizer(value) or (name in unknown and name in OF_OPTIMIZERS)
    ]
    if wrapped:
        raise TypeError(f"{cls.__name__} got {wrapped[0]}: {NO_OPTIMIZER}{f'; {ADAPTIVE}' if adaptive else ''}")
    if adaptive:
        raise TypeError(f"unknown option 'adaptive' of {cls.__name__}; {ADAPTIVE}")
    if unknown:
        raise TypeError(f"unknown option '{unknown[0]}' of {cls.__name__}; {did_you_mean(unknown[0], known)}")


def _is_optimizer(value: object) -> bool:
    return issubclass(value if isinstance(value, type) else type(value), Optimizer)


def _shown(value: object) -> str:
    """An optimizer by its class: an instance prints all its groups, in several lines."""
    kind = value if isinstance(value, type) else type(value)
    return kind.__name__ if _is_optimizer(value) else repr(value)


def collect(cls: type, options: dict[str, tuple[Any, Any]]) -> None:
    """Adds {option: (type, default)} of the constructor of `cls` and, where it passes `**options` on, of its bases."""
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        for p in parameters:
            if p.default is not inspect.Parameter.empty:
                options.setdefault(p.name, (p.annotation, p.default))
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
