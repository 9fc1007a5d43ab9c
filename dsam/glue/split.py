"""The rows of one split, as every source gives them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Split:
    """N rows: one sentence or a pair each, with or without labels."""

    sentence1: list[str]
    sentence2: list[str] | None
    """None for a task of single sentences."""
    labels: np.ndarray | None
    """int64 label numbers or float32 scores, shape (N,); None where they are hidden."""

    def __len__(self) -> int:
        return len(self.sentence1)
