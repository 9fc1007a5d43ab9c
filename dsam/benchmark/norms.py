"""What exact per-example gradient norms cost beside a normal forward and backward pass over the same batch."""

import statistics
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn

from ..config import Config
from ..methods.losses import example_losses
from ..methods.per_example import PerExampleGradients
from ..runs.run import peak_memory, prepare
from .steps import process

WAYS = ("backward", "exact norms", "exact norms and the gradient")


@dataclass
class Cost:
    """One way's figures at one batch."""

    name: str
    seconds: float  # the median over rounds
    peak_memory_bytes: int  # of a process that does this alone, twice


def measure(config: Config, length: int, rounds: int) -> list[Cost]:
    """All ways in turn on one batch of `train.batch_size` full rows of `length` random tokens."""
    model, batch = _setting(config, length)
    autocast = _autocast(config)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(rounds + 1):
        print(f"norms: round {turn}/{rounds}", file=sys.stderr, flush=True)
        for way in WAYS:
            began = time.perf_counter()
            _once(model, batch, way, autocast)
            if turn:
                seconds[way].append(time.perf_counter() - began)
    memory = []
    for way in WAYS:
        with process() as apart:
            memory.append(apart.submit(_peak, config, length, way).result())
    return [Cost(way, statistics.median(seconds[way]), peak) for way, peak in zip(WAYS, memory, strict=True)]


def _setting(config: Config, length: int) -> tuple[nn.Module, dict]:
    ready = prepare(config)
    generator = torch.Generator().manual_seed(0)
    shape = (config.train.batch_size, length)
    ids = torch.randint(len(ready.tokenizer) // 2, len(ready.tokenizer), shape, generator=generator)
    labels = torch.randint(max(2, ready.task.num_labels), shape[:1], generator=generator)
    labels = labels.float() if ready.task.regression else labels
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return ready.network.train(), {name: value.to(ready.device) for name, value in batch.items()}


def _autocast(config: Config) -> torch.dtype | None:
    return torch.bfloat16 if config.train.precision == "bfloat16" else None


def _once(model: nn.Module, batch: dict, way: str, autocast: torch.dtype | None) -> None:
    def losses_of() -> torch.Tensor:
        with torch.autocast(batch["labels"].device.type, autocast, enabled=autocast is not None):
            logits = model(**inputs).logits
        return example_losses(logits.float(), batch["labels"])

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    params = [p for p in model.parameters() if p.requires_grad]
    if way == "backward":
        torch.autograd.grad(losses_of().mean(), params, allow_unused=True)
    else:
        gradients = PerExampleGradients(model, params)
        with gradients.record():
            losses = losses_of()
        gradients.backward(losses)
        gradients.squared_norms()
        if way == "exact norms and the gradient":
            gradients.weighted_gradient(torch.full_like(losses, 1 / len(losses)))
    if batch["labels"].is_cuda:
        torch.cuda.synchronize()


def _peak(config: Config, length: int, way: str) -> int:
    model, batch = _setting(config, length)
    for _ in range(2):
        _once(model, batch, way, _autocast(config))
    return peak_memory(batch["labels"].device)
