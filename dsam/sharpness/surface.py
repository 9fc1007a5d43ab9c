"""The loss along lines and planes through the weights, and the figures of them."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from ..methods.perturbation import perturbed
from .objective import Objective

STYLES = [("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#009E73", "-.", "^")]


def filter_normalised(
    params: Sequence[Tensor], generator: torch.Generator, turned: Collection[Tensor] = ()
) -> list[Tensor]:
    """A Gaussian direction whose filters have the norms of the weights' own: d_j ← d_j ‖w_j‖/‖d_j‖.

    A filter is a row of a weight matrix: all that goes into one output, or one token's embedding; of a matrix of
    `turned`, (in, out) as GPT-2's are, a column. Biases and
    normalisation (tensors of one axis) get 0. Li et al. 2018, Visualizing the Loss Landscape of Neural Nets, arXiv
    1712.09913, section 4. A step of 1 moves each filter by its own length, so surfaces of different models compare.
    """
    direction = []
    for p in params:
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
        if p.ndim <= 1:
            direction.append(torch.zeros_like(noise))
            continue
        axes = (0,) if any(p is one for one in turned) else tuple(range(1, p.ndim))
        lengths = torch.linalg.vector_norm(p.detach(), dim=axes, keepdim=True)
        direction.append(noise * lengths / torch.linalg.vector_norm(noise, dim=axes, keepdim=True))
    return direction


def line(objective: Objective, direction: Sequence[Tensor], steps: Sequence[float]) -> np.ndarray:
    """L(w + a d) for each a of `steps`."""
    losses = []
    for a in steps:
        with perturbed(objective.params, direction, float(a)):
            losses.append(objective.loss())
    return np.array(losses)


def plane(
    objective: Objective, first: Sequence[Tensor], second: Sequence[Tensor], steps: Sequence[float]
) -> np.ndarray:
    """L(w + a d₁ + b d₂), rows by b, columns by a, both from `steps`."""
    rows = []
    for b in steps:
        row = []
        for a in steps:
            there = torch._foreach_mul(list(first), float(a))
            torch._foreach_add_(there, list(second), alpha=float(b))
            with perturbed(objective.params, there):
                row.append(objective.loss())
        rows.append(row)
    return np.array(rows)


def line_figure(panels: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str) -> Figure:
    """A panel for each {what the horizontal axis is: (steps, losses)}."""
    figure = Figure(figsize=(2.9 * len(panels) + 0.3, 2.7), layout="constrained")
    figure.suptitle(title, fontsize=9)
    for k, (label, (steps, losses)) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), k + 1)
        colour, dash, marker = STYLES[k % len(STYLES)]
        axes.plot(steps, losses, color=colour, linestyle=dash, marker=marker, markersize=3)
        axes.axvline(0, color="#999999", linewidth=0.7, zorder=0)
        axes.set_xlabel(label, fontsize=8)
        if k == 0:
            axes.set_ylabel("training loss", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
    return figure


def plane_figure(steps: Sequence[float], losses: np.ndarray, title: str) -> Figure:
    """Contours of the loss; levels grow by a factor where it spans more than one order of magnitude."""
    figure = Figure(figsize=(4.2, 3.5), layout="constrained")
    axes = figure.add_subplot()
    losses = np.ma.masked_invalid(losses)  # left blank: far out a model's loss may not be finite
    low, high = (float(losses.min()), float(losses.max())) if losses.count() else (0.0, 1.0)
    wide = low > 0 and high > 10 * low
    levels = np.geomspace(low, high, 14) if wide else np.linspace(low, max(high, low + 1e-9 * max(1, abs(low))), 14)
    filled = axes.contourf(steps, steps, losses, levels, cmap="cividis", norm=LogNorm(low, high) if wide else None)
    colours = ["white"] * 3 + ["black"] * 3  # each on its own shade of the map
    lines = axes.contour(steps, steps, losses, levels[1:-1:2], colors=colours, linewidths=0.6)
    axes.clabel(lines, fontsize=6, fmt="%.4g")
    axes.plot(0, 0, marker="+", markersize=9, markeredgewidth=1.6, color="#D55E00")
    bar = figure.colorbar(filled, ax=axes, format="%.3g", ticks=levels[::3])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7)
    bar.set_label("training loss", fontsize=8)
    axes.set_aspect("equal")
    axes.set_xlabel("first direction (filter-normalised)", fontsize=8)
    axes.set_ylabel("second direction (filter-normalised)", fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    return figure
