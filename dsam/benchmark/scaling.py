"""How a step's time grows with batch, length and model: full rows of random tokens in models of known shapes."""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from ..methods import ExampleLosses
from .steps import Stepper

SHAPES = {
    "MiniLM-L6": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "BERT-base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "RoBERTa-large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}
POINTS = ((8, 64), (16, 64), (32, 64), (32, 16), (32, 32), (32, 128))
"""(batch, length): each varied with the other fixed."""


@dataclass
class Point:
    """Medians over rounds at one batch and length."""

    shape: str
    batch: int
    length: int
    adamw_seconds: float
    sam_seconds: float


def measure(
    shapes: Sequence[str], points: Sequence[tuple[int, int]], rounds: int, device: torch.device, bf16: bool
) -> list[Point]:
    """AdamW and SAM in turn at every point, after a round that does not count."""
    found = []
    for shape in shapes:
        model = _model(shape).to(device).train()
        steps = {"adamw": Stepper(model, "plain", {}), "sam": Stepper(model, "sam", {})}
        for batch, length in points:
            print(f"{shape}: {batch} × {length} tokens", file=sys.stderr, flush=True)
            ids = torch.randint(1000, 2000, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
            closures = [ExampleLosses(model, inputs, torch.bfloat16 if bf16 else None)]
            seconds: dict[str, list[float]] = {name: [] for name in steps}
            for turn in range(rounds + 1):
                for name, step in steps.items():
                    spent = step(closures)
                    if turn:
                        seconds[name].append(spent)
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            found.append(Point(shape, batch, length, medians["adamw"], medians["sam"]))
    return found


def _model(shape: str):
    torch.manual_seed(0)
    if shape.startswith("RoBERTa"):
        config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **SHAPES[shape])
        return RobertaForSequenceClassification(config)
    return BertForSequenceClassification(BertConfig(vocab_size=30522, **SHAPES[shape]))
