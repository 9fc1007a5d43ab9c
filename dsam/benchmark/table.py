"""The benchmark's JSON and its Markdown table."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from ..files import write_atomically
from ..runs.provenance import provenance
from ..text import published
from .checkpoints import Saved
from .norms import Cost
from .packing import Packed
from .padding import Way
from .scaling import Point
from .shares import Share
from .steps import Timed
from .throughput import Throughput


def rows(measured: Sequence[Timed]) -> pd.DataFrame:
    """One row per method: seconds, ratios to AdamW and SAM, passes, memory, and the floor: passes × a plain step."""
    by_name = {timed.name: timed for timed in measured}
    plain, sam = by_name.get("adamw"), by_name.get("sam")
    return pd.DataFrame(
        {
            "method": timed.name,
            "seconds a step": timed.seconds,
            "/ adamw": timed.seconds / plain.seconds if plain else None,
            "/ sam": timed.seconds / sam.seconds if sam else None,
            "passes": timed.passes,
            "peak memory, GB": timed.peak_memory_bytes and timed.peak_memory_bytes / 1e9,
            "floor, seconds": timed.passes * plain.seconds if plain else None,
        }
        for timed in measured
    )


def speeds(measured: Sequence[Throughput]) -> pd.DataFrame:
    """One row per contender: examples per second, how many times as fast `dsam` is, tokens with padding."""
    ours = next(found.examples_per_second for found in measured if found.name == "dsam")
    return pd.DataFrame(
        {
            "contender": found.name,
            "examples a second": found.examples_per_second,
            "dsam is faster by": ours / found.examples_per_second,
            "tokens, padding included": found.padded_tokens,
        }
        for found in measured
    )


def parts(measured: Sequence[Share]) -> pd.DataFrame:
    """One row per part: seconds, and its share of the whole that it is part of."""
    return pd.DataFrame(
        {"part": p.name, "seconds": p.seconds, "of": p.whole, "%": 100 * p.seconds / p.whole_seconds} for p in measured
    )


def costs(measured: Sequence[Cost]) -> pd.DataFrame:
    """One row per way: seconds and memory, and their ratios to the first."""
    first = measured[0]
    return pd.DataFrame(
        {
            "one pass": found.name,
            "seconds": found.seconds,
            "/ backward": found.seconds / first.seconds,
            "peak memory, GB": found.peak_memory_bytes / 1e9,
            "memory / backward": found.peak_memory_bytes / first.peak_memory_bytes,
        }
        for found in measured
    )


def points(measured: Sequence[Point]) -> pd.DataFrame:
    """One row per point: seconds of AdamW's and SAM's step, their ratio, AdamW's tokens per second, and the share of
    the peak matrix rate that its products come to over the whole step."""
    return pd.DataFrame(
        {
            "model": p.shape,
            "batch": p.batch,
            "length": p.length,
            "adamw, seconds": p.adamw_seconds,
            "sam, seconds": p.sam_seconds,
            "sam / adamw": p.sam_seconds / p.adamw_seconds,
            "tokens a second": p.batch * p.length / p.adamw_seconds,
            "TFLOP/s": p.adamw_flops / p.adamw_seconds / 1e12,
            "% of peak": 100 * p.adamw_flops / p.adamw_seconds / p.peak_flops_per_second,
        }
        for p in measured
    )


def packed(measured: Sequence[Packed]) -> pd.DataFrame:
    """One row per number of runs at once: seconds of a step, runs an hour, their ratio to the first row's, memory."""
    return pd.DataFrame(
        {
            "runs at once": found.at_once,
            "seconds a step": found.seconds,
            "runs an hour": found.runs_per_hour,
            "/ first": found.runs_per_hour / measured[0].runs_per_hour,
            "peak memory, GB": found.peak_memory_bytes / 1e9,
        }
        for found in measured
    )


def saved(measured: Sequence[Saved]) -> pd.DataFrame:
    """One row: what a checkpoint takes, in seconds."""
    return pd.DataFrame(
        {
            "checkpoint, MB": found.bytes / 1e6,
            "the training waits": found.waited,
            "written by a step's end": found.written,
            "the training loses in all": found.lost,
            "written at once": found.at_once,
            "a step": found.step,
        }
        for found in measured
    )


def ways(measured: Sequence[Way]) -> pd.DataFrame:
    """One row per method and way of its batches: seconds and processor seconds of a step, how many times as fast as
    pieces by each, tokens a step."""
    pieces = {found.method: found for found in measured if found.name == "pieces"}
    return pd.DataFrame(
        {
            "method": found.method,
            "batches": found.name,
            "seconds a step": found.seconds,
            "faster than pieces by": pieces[found.method].seconds / found.seconds,
            "processor seconds": found.processor_seconds,
            "fewer than pieces by": pieces[found.method].processor_seconds / found.processor_seconds,
            "tokens a step, padding included": found.tokens,
        }
        for found in measured
    )


def write(
    measured: Mapping[str, Sequence[Timed | Throughput | Cost | Point | Packed | Share | Saved | Way]],
    as_rows: Callable[[Sequence], pd.DataFrame],
    device: torch.device,
    settings: Mapping[str, dict],
    path: Path,
) -> None:
    """`path` (JSON: figures, device, settings, versions) and the same as tables in Markdown beside it.

    `settings`: by task; what is the same for all stands once.
    """
    first = next(iter(settings.values()))
    common = {k: v for k, v in first.items() if all(k in of and of[k] == v for of in settings.values())}
    own = {task: {k: v for k, v in of.items() if k not in common} for task, of in settings.items()}
    contents = {
        "settings": common,
        **({"settings_by_task": own} if any(own.values()) else {}),
        "provenance": provenance(device, {}) | {"command": published(sys.argv)},
        "measured": {task: [asdict(timed) for timed in found] for task, found in measured.items()},
    }
    write_atomically(path, json.dumps(contents, indent=1) + "\n")
    parts = [f"Device: {contents['provenance']['device']}"]
    parts += [f"{name}: {value}" for name, value in common.items()]
    text = "\n".join(f"- {part}" for part in parts) + "\n"
    for task, found in measured.items():
        table = as_rows(found).to_markdown(index=False, floatfmt=".3f")
        said = "".join(f"- {name}: {value}\n" for name, value in own[task].items())
        text += f"\n## {task}\n\n{said + chr(10) if said else ''}{table}\n"
    write_atomically(path.with_suffix(".md"), text)
