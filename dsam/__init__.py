"""Sharpness-aware fine-tuning: SAM, δ-SAM (a reconstruction) and their relatives as replacements for `loss.backward()`."""

from .errors import NonFiniteGradient
from .methods import ASAM, METHODS, SAM, WEIGHTINGS, DeltaSAM, ExampleLosses, Method, Plain, Probe, Weighting

__version__ = "0.1.0"

__all__ = [
    "ASAM",
    "METHODS",
    "SAM",
    "WEIGHTINGS",
    "DeltaSAM",
    "ExampleLosses",
    "Method",
    "NonFiniteGradient",
    "Plain",
    "Probe",
    "Weighting",
]
