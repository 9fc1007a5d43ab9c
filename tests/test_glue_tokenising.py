"""Token ids equal the tokenizer's own, padded batches equal `tokenizer.pad`, and the cache survives what happens."""

import json
import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from dsam.errors import UserError
from dsam.glue import Split, builtin, fingerprint, load, tokenise, tokenising
from dsam.task import get_task

PAIR, SINGLE = get_task("entailment"), get_task("agreement")


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizerFast(str(builtin.VOCABULARY))


def pairs(*rows, labels=None):
    first, second = zip(*rows, strict=True)
    return Split(list(first), list(second), np.array(labels, dtype=np.int64) if labels else None)


ROWS = pairs(("the dog is old", "a cat"), ("cars", "the bus was near a plane ."), ("", "x"), labels=[0, 1, 1])
WORDS = st.text(st.sampled_from('the dog s,.é \u2028"x1'), max_size=40)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6),
    single=st.booleans(),
    left=st.booleans(),
    max_length=st.integers(4, 40),
    data=st.data(),
)
def test_batches_equal_the_tokenizer_s_own(tmp_path, rows, single, left, max_length, data):
    tokenizer = BertTokenizerFast(str(builtin.VOCABULARY), padding_side="left" if left else "right")
    split = pairs(*rows)
    split = replace(split, sentence2=None) if single else split
    made = tokenise(SINGLE if single else PAIR, {"dev": split}, tokenizer, max_length, tmp_path, "k")["dev"]
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    batch = made.batch(chosen)
    expected = tokenizer(
        [split.sentence1[i] for i in chosen],
        None if single else [split.sentence2[i] for i in chosen],
        truncation="longest_first",
        max_length=max_length,
        padding="longest",
        return_tensors="pt",
    )
    assert set(batch) == set(expected) == {"input_ids", "attention_mask", "token_type_ids"}
    for name, values in expected.items():
        assert batch[name].dtype == torch.int64 and torch.equal(batch[name], values)
    assert made.lengths[chosen].tolist() == expected["attention_mask"].sum(1).tolist()


def test_a_tokenised_split_holds_flat_arrays_and_labels(tmp_path, tokenizer):
    made = tokenise(PAIR, {"dev": ROWS}, tokenizer, 32, tmp_path, "k")["dev"]
    # [CLS] the dog is old [SEP] a cat [SEP]; [CLS] cars [SEP] the bus was near a plane . [SEP]; [CLS] [SEP] x [SEP]
    assert made.lengths.tolist() == [9, 11, 4] and len(made) == 3
    assert made.offsets.tolist() == [0, 9, 20, 24]
    assert (made.input_ids.dtype, made.offsets.dtype, made.token_type_ids.dtype) == (np.int32, np.int64, np.uint8)
    batch = made.batch([2, 0])
    assert batch["input_ids"].shape == (2, 9)
    assert batch["attention_mask"][0].tolist() == [1] * 4 + [0] * 5
    assert batch["token_type_ids"][1].tolist() == [0] * 6 + [1] * 3
    assert batch["labels"].dtype == torch.int64 and batch["labels"].tolist() == [1, 0]
    scores = replace(ROWS, labels=np.array([0.5, 1, 5], dtype=np.float32))
    batch = tokenise(get_task("similarity"), {"dev": scores}, tokenizer, 32, tmp_path, "k")["dev"].batch([2])
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [5.0]
    assert "labels" not in tokenise(PAIR, {"test": replace(ROWS, labels=None)}, tokenizer, 32, tmp_path, "k")[
        "test"
    ].batch([0])


def test_an_empty_text_of_a_tokenizer_without_special_tokens_has_one_place(tmp_path, tokenizer):
    """As in a batch with others, where it is padding alone."""
    made = tokenise(PAIR, {"dev": ROWS}, tokenizer, 32, tmp_path, "k")["dev"]
    empty = replace(made, offsets=np.array([0, 0, 20, 24])).batch([0])
    assert empty["input_ids"].tolist() == [[tokenizer.pad_token_id]] and empty["attention_mask"].tolist() == [[0]]


def test_a_tokenizer_without_token_types_gives_none(tmp_path):
    tokenizer = BertTokenizerFast(str(builtin.VOCABULARY), model_input_names=["input_ids", "attention_mask"])
    made = tokenise(PAIR, {"dev": ROWS}, tokenizer, 32, tmp_path, "k")["dev"]
    assert made.token_type_ids is None
    assert set(made.batch([0])) == {"input_ids", "attention_mask", "labels"}


def test_rows_beyond_one_chunk_keep_their_order(tmp_path, tokenizer, monkeypatch):
    whole = tokenise(PAIR, {"dev": ROWS}, tokenizer, 32, tmp_path / "a", "k")["dev"]
    monkeypatch.setattr(tokenising, "CHUNK", 2)
    parts = tokenise(PAIR, {"dev": ROWS}, tokenizer, 32, tmp_path / "b", "k")["dev"]
    assert np.array_equal(whole.input_ids, parts.input_ids) and np.array_equal(whole.offsets, parts.offsets)


def count_encodings(monkeypatch):
    calls = []
    encode = tokenising._encode
    monkeypatch.setattr(tokenising, "_encode", lambda *arguments: calls.append(1) or encode(*arguments))
    return calls


def test_the_cache_is_used_until_data_tokenizer_or_length_change(tmp_path, tokenizer, monkeypatch):
    calls = count_encodings(monkeypatch)

    def run(rows=ROWS, tokenizer=tokenizer, length=32, key="k"):
        before = len(calls)
        tokenise(PAIR, {"dev": rows}, tokenizer, length, tmp_path, key)
        return len(calls) - before

    assert [run(), run()] == [1, 0]
    tokenizer("a call that sets", truncation=True, max_length=5, padding="max_length")
    assert run() == 0  # what a call left in the tokenizer is not part of it
    assert [run(length=16), run(key="other")] == [1, 1]
    assert run(tokenizer=BertTokenizerFast(str(builtin.VOCABULARY), do_lower_case=False)) == 1
    assert run() == 0


def test_settings_that_change_tokens_have_their_own_cache(tmp_path):
    """Which end is cut and what becomes of special tokens in a text do not stand in the serialized tokenizer."""
    rows, found = pairs(("the dog is old", "cars [SEP] the bus was near a plane .")), []
    for options in ({}, {"truncation_side": "left"}, {"split_special_tokens": True}):
        made = BertTokenizerFast(str(builtin.VOCABULARY), **options)
        shared, own = (tokenise(PAIR, {"dev": rows}, made, 9, folder, "k")["dev"] for folder in
                       (tmp_path / "shared", tmp_path / str(options)))  # fmt: skip
        assert shared.input_ids.tolist() == own.input_ids.tolist()
        found.append(own.input_ids.tolist())
    assert len(set(map(tuple, found))) == 3


def test_other_text_under_the_same_key_is_never_answered_from_the_cache(tmp_path, tokenizer):
    tokenise(PAIR, {"dev": ROWS}, tokenizer, 32, tmp_path, "k")
    other = pairs(("the dog", "a bus"), ("cars", "x"), ("y", "z"))
    made = tokenise(PAIR, {"dev": other}, tokenizer, 32, tmp_path, "k")["dev"]
    assert made.lengths.tolist() == [7, 5, 5]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "flipped"])
def test_a_damaged_cache_file_is_made_anew(tmp_path, tokenizer, monkeypatch, damage):
    data = load(PAIR, "builtin", splits=["dev"])
    good = tokenise(PAIR, data, tokenizer, 32, tmp_path, "k")["dev"]
    (file,) = tmp_path.glob("*.npz")
    content = file.read_bytes()
    calls = count_encodings(monkeypatch)
    places = range(0, len(content), len(content) // 40) if damage == "flipped" else [0]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 0x40
        file.write_bytes(
            {"truncated": content[:-100], "empty": b"", "text": b"not a cache", "flipped": bytes(flipped)}[damage]
        )
        again = tokenise(PAIR, data, tokenizer, 32, tmp_path, "k")["dev"]
        assert np.array_equal(again.input_ids, good.input_ids)
        assert np.array_equal(again.offsets, good.offsets)
        assert np.array_equal(again.token_type_ids, good.token_type_ids)
    # nearly all bytes are covered by a checksum; a few of zip's own (dates, say) say nothing of the arrays
    assert len(calls) >= 0.9 * len(places)
    calls.clear()
    assert np.array_equal(tokenise(PAIR, data, tokenizer, 32, tmp_path, "k")["dev"].input_ids, good.input_ids)
    assert calls == []  # the file is whole again


def test_a_write_that_fails_leaves_no_file(tmp_path, tokenizer, monkeypatch):
    def fail(handle, **_):
        handle.write(b"half")
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", fail)
        with pytest.raises(UserError, match=f"^cannot write the cache {tmp_path}: no space.*; set paths.cache=DIR$"):
            tokenise(PAIR, {"dev": ROWS}, tokenizer, 32, tmp_path, "k")
    assert [file for file in tmp_path.iterdir() if file.suffix != ".lock"] == []
    assert len(tokenise(PAIR, {"dev": ROWS}, tokenizer, 32, tmp_path, "k")["dev"]) == 3


def tokenise_apart(folder):
    """In a process of its own."""
    calls = []
    encode = tokenising._encode

    def slow(*arguments):
        calls.append(1)
        time.sleep(0.5)
        return encode(*arguments)

    tokenising._encode = slow
    tokenizer = BertTokenizerFast(str(builtin.VOCABULARY))
    made = tokenise(PAIR, load(PAIR, "builtin", splits=["dev"]), tokenizer, 32, folder, fingerprint(PAIR, "builtin"))
    print(json.dumps([len(calls), int(made["dev"].input_ids.sum())]))


@pytest.mark.slow
def test_two_processes_tokenise_once(tmp_path):
    processes = [
        warm.Command("test_glue_tokenising:tokenise_apart", [str(tmp_path)], ROOT, os.environ) for _ in range(2)
    ]
    results = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert sorted(count for count, _ in results) == [0, 1]
    assert results[0][1] == results[1][1] > 0


@pytest.mark.slow
def test_a_warm_cache_of_sst2_s_size_loads_quickly(tmp_path, tokenizer):
    rows = pairs(*[("the dog is old and near a bus", "cars")] * 67_349)
    tokenise(PAIR, {"train": rows}, tokenizer, 64, tmp_path, "k")
    seconds = []
    for _ in range(5):
        start = time.process_time()
        tokenise(PAIR, {"train": rows}, tokenizer, 64, tmp_path, "k")
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.2


def test_what_cannot_be_used_is_one_line(tmp_path, tokenizer):
    for length in (3, 10**6):
        bounded = BertTokenizerFast(str(builtin.VOCABULARY), model_max_length=128)
        with pytest.raises(UserError, match=f"max_length {length} is out of range.* at most 128"):
            tokenise(PAIR, {"dev": ROWS}, bounded, length, tmp_path, "k")
    without = BertTokenizerFast(str(builtin.VOCABULARY))
    without.pad_token = None
    with pytest.raises(UserError, match="no padding token"):
        tokenise(PAIR, {"dev": ROWS}, without, 32, tmp_path, "k")
