"""The Hessian's largest eigenvalues by Lanczos and its trace by Hutchinson, from Hessian-vector products alone.

Own code, since curvlinops-for-pytorch, which has both, pulls in torchvision and with it another torch than the
locked one.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from ..errors import UserError
from .objective import Objective


@dataclass
class Spectrum:
    """The k largest eigenvalues, falling; `residuals` are ‖Hv − λv‖ for unit v: each bounds the distance
    from λ to an eigenvalue. Fewer than k where Lanczos did not converge."""

    values: list[float]
    residuals: list[float]
    vectors: list[list[Tensor]]
    products: int


def top_eigenvalues(
    objective: Objective, k: int, *, tolerance: float = 1e-3, seed: int = 0, in_size: bool = False
) -> Spectrum:
    """ARPACK's implicitly restarted Lanczos; `tolerance` is relative to each eigenvalue.

    The largest are the algebraically largest, which is what sharpness means; `in_size`: those of the largest absolute
    value, as power iteration finds, whose sign may be negative away from a minimum.
    Holds max(2k + 1, 20) vectors of all parameters in memory.
    """
    size = sum(p.numel() for p in objective.params)
    if not 1 <= k < size:
        raise ValueError(f"k must be at least 1 and below the {size} parameters, got {k}")
    dtype = np.float64 if objective.params[0].dtype == torch.float64 else np.float32
    products = 0

    def multiply(vector: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        return _flat(objective.hessian_vector(_shaped(vector, objective)), dtype)

    start = np.random.default_rng(seed).standard_normal(size).astype(dtype)
    operator = LinearOperator((size, size), matvec=multiply, dtype=dtype)
    try:
        values, vectors = eigsh(operator, k, which="LM" if in_size else "LA", v0=start, tol=tolerance)
    except ArpackNoConvergence as partial:
        values, vectors = partial.eigenvalues, partial.eigenvectors
    except ArpackError as error:  # of a Hessian that is 0 or NaN
        raise UserError(f"no eigenvalues can be computed ({error}): --eigenvalues 0 leaves them out") from None
    order = np.argsort(np.abs(values) if in_size else values)[::-1]
    values, vectors = values[order], vectors[:, order]
    residuals = [float(np.linalg.norm(multiply(v) - value * v)) for value, v in zip(values, vectors.T, strict=True)]
    return Spectrum(values.tolist(), residuals, [_shaped(v, objective) for v in vectors.T], products)


def trace(objective: Objective, probes: int, *, seed: int = 0) -> tuple[float, float | None]:
    """(estimate of tr H, its standard error): mean of vᵀHv over Rademacher v, unbiased. One probe has no error.

    Hutchinson 1990; the variance of one probe is twice the sum of squares of H's off-diagonal entries.
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for _ in range(probes):
        signs = [torch.randint(0, 2, p.shape, generator=generator).mul_(2).sub_(1).to(p) for p in objective.params]
        product = objective.hessian_vector(signs)
        seen.append(float(sum((v * h).sum(dtype=torch.float64) for v, h in zip(signs, product, strict=True))))
    return float(np.mean(seen)), float(np.std(seen, ddof=1) / probes**0.5) if probes > 1 else None


def _flat(tensors: list[Tensor], dtype) -> np.ndarray:
    return torch.cat([t.detach().flatten() for t in tensors]).cpu().numpy().astype(dtype, copy=False)


def _shaped(vector: np.ndarray, objective: Objective) -> list[Tensor]:
    parts = torch.tensor(vector.ravel()).split([p.numel() for p in objective.params])
    return [part.view_as(p).to(p) for part, p in zip(parts, objective.params, strict=True)]
