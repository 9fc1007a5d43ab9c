"""The built-in tasks are the same everywhere, share nothing between train and dev, and are balanced."""

import hashlib
import json
import string

import numpy as np
import pytest
from transformers import BertTokenizerFast

from dsam.glue import builtin, load
from dsam.task import get_task, shipped

NAMES = ("agreement", "entailment", "majority", "similarity")

PINNED = {
    "agreement": "b3d7162e243be208ae1e48e85ad97189971cb9d8d406610b790f54c7e37cd222",
    "entailment": "a9f015cfcb0de4689659fcb33d904900c42e9d05df55a5184cf10cd707172169",
    "similarity": "5ebe75141653a641982f81a1738de54752309a6e9eb38afd429391f61d33ed3a",
    "majority": "877acf5bee0464406980a6f5a4512a53368e598e4832ae0659baf5d68ba31f96",
}


def test_these_are_all_the_built_in_tasks():
    assert tuple(name for name, task in shipped().items() if "builtin" in task.sources) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_data_are_the_pinned_ones(name):
    """A change of the data must come with a change of `builtin.VERSION`, which is part of every run's identity."""
    text = json.dumps(builtin.generate(name), sort_keys=True)
    assert (builtin.VERSION, hashlib.sha256(text.encode()).hexdigest()) == (1, PINNED[name])


@pytest.mark.parametrize("name", NAMES)
def test_train_and_dev_share_no_example(name):
    data = load(get_task(name), "builtin")
    seen = {
        split: list(zip(rows.sentence1, rows.sentence2 or rows.sentence1, strict=True)) for split, rows in data.items()
    }
    assert [len(seen["train"]), len(seen["dev"])] == [2000, 500]
    assert len(set(seen["train"] + seen["dev"])) == 2500


@pytest.mark.parametrize("name", ("agreement", "entailment", "majority"))
def test_classes_are_balanced(name):
    for rows in load(get_task(name), "builtin").values():
        assert rows.labels.dtype == np.int64
        assert set(rows.labels) == {0, 1}
        assert 0.45 < rows.labels.mean() < 0.55


def test_scores_fill_their_range():
    for rows in load(get_task("similarity"), "builtin").values():
        assert rows.labels.dtype == np.float32
        assert (rows.labels.min(), rows.labels.max()) == (0, 5)
        assert 1.2 < rows.labels.std() < 2


def test_a_known_share_of_agreement_labels_is_noise():
    """The subject is the first noun and the verb is the last but two: what they say differs from the label at NOISE."""
    singular = {noun for nouns in builtin.THINGS.values() for noun in nouns}
    rows = load(get_task("agreement"), "builtin", splits=("train",))["train"]
    wrong = 0
    for sentence, label in zip(rows.sentence1, rows.labels, strict=True):
        words = sentence.split()
        subject = words[2] if words[1] in builtin.ADJECTIVES else words[1]
        verb_is_singular = words[-3] in ("is", "was", "looks")
        wrong += ((subject in singular) == verb_is_singular) != label
    # 0.08 with a standard error of sqrt(0.08 * 0.92 / 2000) = 0.006
    assert 0.06 < wrong / len(rows) < 0.10


def test_a_label_of_majority_is_what_its_nouns_say():
    living = set(builtin.THINGS["animal"] + builtin.THINGS["person"])
    things = living | set(builtin.THINGS["vehicle"] + builtin.THINGS["tool"])
    for rows in load(get_task("majority"), "builtin").values():
        for sentence, label in zip(rows.sentence1, rows.labels, strict=True):
            named = [word for word in sentence.split() if word in things]
            assert len(named) in (3, 5) and (2 * sum(word in living for word in named) > len(named)) == label


def test_every_word_is_one_piece_and_any_ascii_text_has_pieces():
    tokenizer = BertTokenizerFast(str(builtin.VOCABULARY))
    pieces = builtin.VOCABULARY.read_text().split()
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(pieces) == len(set(pieces)) == len(tokenizer) <= 1000
    for name in NAMES:
        for rows in load(get_task(name), "builtin").values():
            for sentence in rows.sentence1 + (rows.sentence2 or []):
                assert tokenizer.tokenize(sentence) == sentence.split()
    ascii_text = f"{string.printable} Don't pay $1,234.50 (Zyxwvutsrq)!"
    assert "[UNK]" not in tokenizer.tokenize(ascii_text)
    longest = max(
        len(ids)
        for name in NAMES
        for rows in load(get_task(name), "builtin").values()
        for ids in tokenizer(rows.sentence1, rows.sentence2)["input_ids"]
    )
    assert longest <= 24
