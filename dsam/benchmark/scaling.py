"""How a step's time grows with batch, length and model: full rows of random tokens in models of known shapes."""

import functools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from ..config import Config
from ..methods import ExampleLosses
from ..training.device import choose_device
from ..training.dropout import use_fast_dropout
from .steps import Stepper, process

SHAPES = {
    "MiniLM-L6": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "BERT-base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "RoBERTa-large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}
POINTS = ((32, 128), (32, 64), (16, 64), (8, 64), (32, 32), (32, 16))
"""(batch, length): each varied with the other fixed. The largest first: memory that a process takes anew is slow."""
PEAK_SIZE = {"cpu": 2048, "cuda": 4096}  # of the square matrices whose product shows what the device can do
LOOKS = (("#000000", "o"), ("#E69F00", "s"), ("#0072B2", "^"))  # colour (Okabe and Ito's) and marker of each shape


@dataclass
class Point:
    """Medians over rounds at one batch and length."""

    shape: str
    batch: int
    length: int
    adamw_seconds: float
    sam_seconds: float
    adamw_flops: float  # of an AdamW step's matrix products, forward and backward; a multiply-add is two
    peak_flops_per_second: float  # of a large product of matrices, at this precision in this run


def measure(config: Config, shapes: Sequence[str], points: Sequence[tuple[int, int]], rounds: int) -> Iterator[Point]:
    """Every point of every shape as it comes, each shape in a process of its own: what does not fit the memory costs
    its own point."""
    for shape in shapes:
        pool = process()
        for batch, length in points:
            print(f"{shape}: {batch} × {length} tokens", file=sys.stderr, flush=True)
            try:
                yield pool.submit(at, config, shape, batch, length, rounds).result()
            except RuntimeError as error:  # BrokenProcessPool, torch.OutOfMemoryError, or a CPU's refusal
                if type(error) is RuntimeError and "can't allocate memory" not in str(error):
                    raise
                print(f"{shape}: {batch} × {length} tokens do not fit the memory", file=sys.stderr, flush=True)
                pool.shutdown()
                pool = process()
        pool.shutdown()


def at(config: Config, shape: str, batch: int, length: int, rounds: int) -> Point:
    """AdamW and SAM in turn at one point, after two rounds that do not count, on the configuration's device and threads
    and at its precision."""
    device = choose_device(config)
    autocast = torch.bfloat16 if config.train.precision == "bfloat16" else None
    model, steps = _steppers(shape, device)
    ids = torch.randint(1000, 2000, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    closures = [ExampleLosses(model, inputs, autocast)]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    counter = FlopCounterMode(display=False)
    for turn in range(-2, rounds):
        for name, step in steps.items():
            with counter if (turn, name) == (-2, "adamw") else nullcontext():
                spent = step(closures)
            if turn >= 0:
                seconds[name].append(spent)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peak = peak_rate(device, autocast or torch.float32)
    return Point(shape, batch, length, medians["adamw"], medians["sam"], counter.get_total_flops(), peak)


@functools.cache  # in its process, for all its points
def _steppers(shape: str, device: torch.device) -> tuple[PreTrainedModel, dict[str, Stepper]]:
    torch.manual_seed(0)
    if shape.startswith("RoBERTa"):
        config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **SHAPES[shape])
        model = RobertaForSequenceClassification(config)
    else:
        model = BertForSequenceClassification(BertConfig(vocab_size=30522, **SHAPES[shape]))
    model.to(device).train()
    if device.type == "cpu":  # as a run does
        use_fast_dropout(model)
    plain = Stepper(model, "plain", {})
    return model, {"adamw": plain, "sam": Stepper(model, "sam", {}, plain.optimizer)}


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in a product of two square matrices: the median of five, after one."""
    size = PEAK_SIZE["cpu" if device.type == "cpu" else "cuda"]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    spent = []
    for turn in range(6):
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn:
            spent.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(spent)


def draw(measured: Sequence[Point], path: Path) -> None:
    """The figure as PNG and PDF beside `path`."""
    drawn = figure(measured)
    drawn.savefig(path.with_suffix(".png"), dpi=200)
    drawn.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})


def figure(measured: Sequence[Point]) -> Figure:
    """Seconds a step against the tokens of a batch, both on logarithmic axes: a colour and marker for each model,
    filled where the length is varied and hollow where the batch is; dotted lines grow in proportion to the tokens."""
    drawn = Figure(figsize=(8, 3.4), layout="constrained")
    panels = drawn.subplots(1, 2, sharey=True)
    shapes = list(dict.fromkeys(p.shape for p in measured))
    for axes, (method, of) in zip(panels, {"AdamW": "adamw_seconds", "SAM": "sam_seconds"}.items(), strict=True):
        for shape, (colour, marker) in zip(shapes, LOOKS, strict=False):
            own = sorted((p for p in measured if p.shape == shape), key=lambda p: p.batch * p.length)
            tokens, seconds = [p.batch * p.length for p in own], [getattr(p, of) for p in own]
            rate = statistics.median(s / t for s, t in zip(seconds, tokens, strict=True))
            axes.plot(tokens, [rate * t for t in tokens], ":", color=colour, linewidth=1)
            for p, t, s in zip(own, tokens, seconds, strict=True):
                face = "white" if p.batch < max(q.batch for q in own) else colour
                axes.plot(t, s, marker, color=colour, markerfacecolor=face, markersize=5)
            axes.plot([], [], marker, color=colour, label=shape)
        axes.set(xscale="log", yscale="log", title=method, xlabel="tokens of a batch")
        axes.set_xticks(sorted({p.batch * p.length for p in measured}))
        axes.xaxis.set(major_formatter="{x:g}", minor_locator=NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set(major_formatter="{x:g}", minor_locator=NullLocator())
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds a step")
    panels[0].legend(frameon=False, fontsize=9)
    return drawn
