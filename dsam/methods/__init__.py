"""How a step's gradient is formed: each method replaces `loss.backward()`."""

import inspect
from typing import Any

from .ae_sam import AESAM
from .base import Method, Plain
from .delta_sam import DeltaSAM
from .esam import ESAM
from .freelb import FreeLB
from .fsam import FSAM
from .gsam import GSAM
from .looksam import LookSAM
from .losses import ExampleLosses, example_losses
from .m_sam import GroupSAM
from .msam import MomentumSAM
from .per_instance import PerInstance
from .piece import Closure
from .r3f import R3F
from .rdrop import RDrop
from .sam import ASAM, SAM
from .sam_on import SAMON
from .smart import SMART
from .weighting import WEIGHTINGS, Probe, Weighting, make_weighting

METHODS: dict[str, type[Method]] = {
    "plain": Plain,
    "sam": SAM,
    "asam": ASAM,
    "delta_sam": DeltaSAM,
    # relatives of SAM
    "ae_sam": AESAM,
    "esam": ESAM,
    "fsam": FSAM,
    "gsam": GSAM,
    "looksam": LookSAM,
    "m_sam": GroupSAM,
    "msam": MomentumSAM,
    "per_instance": PerInstance,
    "sam_on": SAMON,
    # baselines that look at the model's outputs
    "freelb": FreeLB,
    "r3f": R3F,
    "rdrop": RDrop,
    "smart": SMART,
}


def option_types(method: str, weighting: str | None = None) -> dict[str, tuple[Any, Any]]:
    """{option: (type, default)} of a method's constructor, and of the weighting's where the method takes one.

    `seed` is left out: a run's own seed sets it.
    """
    options: dict[str, tuple[Any, Any]] = {}
    chosen = METHODS[method]
    _collect(chosen, options)
    if "weighting" in options:
        options["weighting"] = (str, options["weighting"][1])
        _collect(WEIGHTINGS[weighting or options["weighting"][1]], options)
    return options


def _collect(cls: type, options: dict[str, tuple[Any, Any]]) -> None:
    """Adds the options of the constructor of `cls` and, where it passes `**options` on, of its bases."""
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        for p in parameters:
            if p.default is not inspect.Parameter.empty and p.name != "seed":
                options.setdefault(p.name, (p.annotation, p.default))
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            break


__all__ = [
    "AESAM",
    "ASAM",
    "ESAM",
    "FSAM",
    "GSAM",
    "METHODS",
    "R3F",
    "SAM",
    "SAMON",
    "SMART",
    "WEIGHTINGS",
    "Closure",
    "DeltaSAM",
    "ExampleLosses",
    "FreeLB",
    "GroupSAM",
    "LookSAM",
    "Method",
    "MomentumSAM",
    "PerInstance",
    "Plain",
    "Probe",
    "RDrop",
    "Weighting",
    "example_losses",
    "make_weighting",
    "option_types",
]
