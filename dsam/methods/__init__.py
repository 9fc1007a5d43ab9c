"""How a step's gradient is formed: each method replaces `loss.backward()`."""

from typing import Any

from ..errors import did_you_mean
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
from .options import collect
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

OPTIMIZERS = {
    "adamw": "'plain'",
    "adamw_2x": "'plain'",
    "adamw_eighth_lr": "'plain'",
    "adamw_low_lr": "'plain'",
    "adamw_quarter_lr": "'plain'",
    "dsam": "'delta_sam'",
    "dsam_curvature": "'delta_sam' with weighting=curvature",
    "per_instance_quarter_lr": "'per_instance'",
    "rw_sam": "'delta_sam' with weighting=gibbs",
    "sam_low_lr": "'sam'",
    "sam_quarter_lr": "'sam'",
}
"""The method of each file of `conf/optimizer` that has not its method's name."""


def unknown_method(name: str) -> str:
    """What is said of a name that is none of `METHODS`."""
    meant = f"did you mean {OPTIMIZERS[name]}?" if name in OPTIMIZERS else did_you_mean(name, METHODS)
    return f"unknown method '{name}'; {meant}"


def option_types(method: str, weighting: str | None = None) -> dict[str, tuple[Any, Any]]:
    """{option: (type, default)} of a method's constructor, and of the weighting's where the method takes one.

    `seed` is left out: a run's own seed sets it.
    """
    options: dict[str, tuple[Any, Any]] = {}
    chosen = METHODS[method]
    collect(chosen, options)
    if "weighting" in options:
        options["weighting"] = (str, options["weighting"][1])
        collect(WEIGHTINGS[weighting or options["weighting"][1]], options)
    options.pop("seed", None)
    return options


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
    "unknown_method",
]
