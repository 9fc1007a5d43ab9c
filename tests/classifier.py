"""A small float64 classifier that `ExampleLosses` takes for a Hugging Face one, and its batches."""

from types import SimpleNamespace

import torch
from torch import nn

from dsam import ExampleLosses

LABELS = 3


class Classifier(nn.Module):
    """Word embeddings, a linear layer, a layer norm, dropout, the mean over tokens and a linear head."""

    def __init__(self, dropout=0.0, dtype=torch.float64, seed=0, batch_norm=False):
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.first, self.norm = nn.Embedding(30, 6), nn.Linear(6, 8), nn.LayerNorm(8)
        self.drop, self.last = nn.Dropout(dropout), nn.Linear(8, LABELS)
        self.statistics = nn.BatchNorm1d(8) if batch_norm else None
        self.to(dtype)

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask):
        hidden = self.drop(self.norm(torch.tanh(self.first(self.words(input_ids)))))
        mask = attention_mask.unsqueeze(-1).to(hidden)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return SimpleNamespace(logits=self.last(pooled if self.statistics is None else self.statistics(pooled)))


class Losses(ExampleLosses):
    """`ExampleLosses` in the precision of the weights."""

    def __call__(self):
        return self.outputs()[0]

    def outputs(self, noise=None, detached=False):
        hook = None
        if noise is not None:

            def add(_, __, out):
                return (out.detach() if detached else out) + (noise * self.token_mask).to(out)

            hook = self.model.words.register_forward_hook(add)
        try:
            logits = self.model(**self.inputs).logits
        finally:
            if hook is not None:
                hook.remove()
        self.logits = logits.detach()
        return nn.functional.cross_entropy(logits, self.labels, reduction="none"), logits


def batch(examples=12, seed=1, tokens=4):
    """One row is shorter than the others."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 30, (examples, tokens), generator=g)
    mask = torch.ones_like(ids)
    mask[seed % examples, tokens // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, LABELS, (examples,), generator=g)}


def part(data, rows):
    return {name: value[rows] for name, value in data.items()}
