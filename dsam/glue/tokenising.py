"""Turns splits into token ids once, keeps them in a cache file, and cuts padded batches from them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock

from ..errors import UserError
from ..files import replacing
from ..task import Task
from .split import Split

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
CHUNK = 10_000
"""Rows given to the tokenizer at a time, which bounds the memory of its results."""


@dataclass(frozen=True)
class Tokenised:
    """N tokenised rows, end to end: row i is `input_ids[offsets[i]:offsets[i + 1]]`."""

    input_ids: np.ndarray
    """int32, shape (tokens,)."""
    offsets: np.ndarray
    """int64, shape (N + 1,)."""
    token_type_ids: np.ndarray | None
    """uint8, shape (tokens,); None if the model takes none."""
    labels: np.ndarray | None
    """int64 or float32, shape (N,); None where they are hidden."""
    pad_id: int
    pad_type_id: int
    pad_left: bool
    clean_labels: np.ndarray | None = None
    """What the labels were before noise; None where there is none (`noise.noisy`)."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64, shape (N,)."""
        return np.diff(self.offsets)

    def take(self, indices: Sequence[int] | np.ndarray) -> Tokenised:
        """These rows alone, in this order."""
        indices = np.asarray(indices)
        starts, lengths = self.offsets[indices], self.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        tokens = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return replace(
            self,
            input_ids=self.input_ids[tokens],
            offsets=offsets,
            token_type_ids=None if self.token_type_ids is None else self.token_type_ids[tokens],
            labels=None if self.labels is None else self.labels[indices],
            clean_labels=None if self.clean_labels is None else self.clean_labels[indices],
        )

    def batch(
        self, indices: Sequence[int] | np.ndarray, multiple: int = 1, most: int | None = None
    ) -> dict[str, torch.Tensor]:
        """The rows of these indices (B of them), padded to the longest, or from there to a multiple up to `most`: T.

        input_ids, attention_mask and, if the model takes them, token_type_ids: int64, shape (B, T). labels, if known:
        int64 or float32, shape (B,).
        """
        import torch  # here, since tables only look at tasks

        indices = np.asarray(indices)
        starts, lengths = self.offsets[indices], self.offsets[indices + 1] - self.offsets[indices]
        width = longest = max(1, int(lengths.max()))  # an empty text may have no token at all
        if multiple > 1:
            width = -(-width // multiple) * multiple
            width = max(longest, width if most is None else min(width, most))
        column = np.arange(width) - (width - lengths[:, None] if self.pad_left else 0)
        mask = (column >= 0) & (column < lengths[:, None])
        source = (starts[:, None] + column)[mask]

        def padded(values: np.ndarray, pad: int) -> torch.Tensor:
            table = np.full(mask.shape, pad, dtype=np.int64)
            table[mask] = values[source]
            return torch.from_numpy(table)

        batch = {
            "input_ids": padded(self.input_ids, self.pad_id),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        }
        if self.token_type_ids is not None:
            batch["token_type_ids"] = padded(self.token_type_ids, self.pad_type_id)
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[indices])
        return batch


def tokenise(
    task: Task,
    splits: Mapping[str, Split],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    cache_dir: str | Path,
    key: str,
) -> dict[str, Tokenised]:
    """Each split's token ids, from the cache if they are there.

    Pairs that are too long lose tokens from the longer sentence first. Concurrent runs tokenise once and share the
    file; one that is damaged or holds other rows is made anew.

    Args:
        tokenizer: a fast one, with a padding token.
        max_length: tokens per row at most, the special ones included.
        key: the data's fingerprint (`readers.fingerprint`).

    Raises:
        UserError: a tokenizer or length that cannot be used, or a cache that cannot be written.
    """
    _check(tokenizer, max_length)
    folder = Path(cache_dir)
    types = "token_type_ids" in tokenizer.model_input_names
    made = [FORMAT, task.name, key, _tokenizer_fingerprint(tokenizer), types, max_length, *_unusual_settings(tokenizer)]
    name = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:32]
    padding = (tokenizer.pad_token_id, tokenizer.pad_token_type_id, tokenizer.padding_side == "left")
    result = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for split, rows in splits.items():
            file = folder / f"{name}-{split}.npz"
            rows_digest = _rows_digest(rows)
            with FileLock(f"{file}.lock"):
                arrays = _read(file, rows_digest)
                if arrays is None:
                    arrays = _encode(rows, tokenizer, max_length, types)
                    with replacing(file) as handle:
                        np.savez(handle, **arrays | {"rows_digest": np.array(rows_digest)})  # type: ignore[arg-type]  # its stub has a bool
            result[split] = Tokenised(
                arrays["input_ids"],
                arrays["offsets"],
                arrays.get("token_type_ids"),
                rows.labels,
                *padding,
            )
    except OSError as error:
        raise UserError(f"cannot write the cache {folder}: {error.strerror or error}; set paths.cache=DIR") from None
    return result


def _check(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer '{name}' is not a fast one: use a model that has a tokenizer.json")
    if tokenizer.pad_token_id is None:
        raise UserError(f"tokenizer '{name}' has no padding token: use a model that has one")
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if not special < max_length <= tokenizer.model_max_length:
        raise UserError(
            f"max_length {max_length} is out of range: tokenizer '{name}' takes more than {special} (its special "
            f"tokens) and at most {tokenizer.model_max_length}"
        )


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the serialized tokenizer, less the truncation and padding that its last call left behind."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _unusual_settings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What of its settings, beside the serialized tokenizer, changes the tokens, where it is not as usual."""
    return [
        *(["truncates on the left"] if tokenizer.truncation_side == "left" else []),
        *(["splits special tokens"] if tokenizer.split_special_tokens else []),
    ]


def _rows_digest(rows: Split) -> str:
    """sha256 of the text: a cache file that holds another text's tokens must never be used, whatever its name."""
    digest = hashlib.sha256()
    for sentences in (rows.sentence1, rows.sentence2 or ()):
        digest.update(f"{len(sentences)}\0".encode())
        digest.update("\0".join(sentences).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _encode(rows: Split, tokenizer: PreTrainedTokenizerBase, max_length: int, types: bool) -> dict[str, np.ndarray]:
    ids: list[np.ndarray] = []
    type_ids: list[np.ndarray] = []
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        encoded = tokenizer(
            rows.sentence1[part],
            rows.sentence2[part] if rows.sentence2 is not None else None,
            truncation="longest_first",
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=types,
        )
        ids += [np.array(row, dtype=np.int32) for row in encoded["input_ids"]]
        if types:
            type_ids += [np.array(row, dtype=np.uint8) for row in encoded["token_type_ids"]]
    arrays = {
        "input_ids": np.concatenate(ids),
        "offsets": np.cumsum([0, *map(len, ids)], dtype=np.int64),
    }
    if types:
        arrays["token_type_ids"] = np.concatenate(type_ids)
    return arrays


def _read(file: Path, rows_digest: str) -> dict[str, np.ndarray] | None:
    """The arrays of a cache file, or None, and no file, if it is damaged or of other rows."""
    try:
        with np.load(file, allow_pickle=False) as archive:  # its checksums are compared while it is read
            arrays = dict(archive)
            if arrays.pop("rows_digest").item() == rows_digest:
                return arrays
    except FileNotFoundError:
        return None
    except Exception:  # damaged bytes raise almost anything in zip and array headers
        pass
    file.unlink()
    return None
