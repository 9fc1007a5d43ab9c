"""How sharp a minimum is: worst-case loss rises, Hessian eigenvalues and trace, loss surfaces."""

from .curvature import Spectrum, top_eigenvalues, trace
from .objective import Objective
from .rise import rises
from .surface import filter_normalised, line, plane

__all__ = ["Objective", "Spectrum", "filter_normalised", "line", "plane", "rises", "top_eigenvalues", "trace"]
