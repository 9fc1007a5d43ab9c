"""Sharpness-aware fine-tuning: SAM, δ-SAM (a reconstruction) and relatives as replacements for `loss.backward()`."""

import importlib
from typing import TYPE_CHECKING

from .errors import NonFiniteGradient

# Else when it is first asked for (below): PyTorch takes a second, which much can do without.
if TYPE_CHECKING:
    from .methods import (
        AESAM,
        ASAM,
        ESAM,
        FSAM,
        GSAM,
        METHODS,
        R3F,
        SAM,
        SAMON,
        SMART,
        WEIGHTINGS,
        DeltaSAM,
        ExampleLosses,
        FreeLB,
        GroupSAM,
        LookSAM,
        Method,
        MomentumSAM,
        PerInstance,
        Plain,
        Probe,
        RDrop,
        Weighting,
    )

__version__ = "0.1.0"

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
    "DeltaSAM",
    "ExampleLosses",
    "FreeLB",
    "GroupSAM",
    "LookSAM",
    "Method",
    "MomentumSAM",
    "NonFiniteGradient",
    "PerInstance",
    "Plain",
    "Probe",
    "RDrop",
    "Weighting",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.methods"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
