"""The official files of every task, with all that real ones hold, and one line for each thing that is wrong."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsam.errors import UserError
from dsam.glue import fingerprint, load
from dsam.task import get_task, shipped

REAL = Path(__file__).parents[2] / "shared" / "glue"

S1, S2 = 'He said "no', "it 's \u2028 \x85 odd ' \" ."  # unclosed quotes, and characters that splitlines() splits at
MNLI = [
    "index",
    "promptID",
    "pairID",
    "genre",
    "sentence1_binary_parse",
    "sentence2_binary_parse",
    "sentence1_parse",
    "sentence2_parse",
    "sentence1",
    "sentence2",
]
VOTES = [f"label{i}" for i in range(1, 6)]
STSB = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"]
PAIR = ["index", "sentence1", "sentence2"]

# task, split, file, header (None: the file has none), a row, and what must be read from it
LAYOUTS = [
    ("cola", "train", "CoLA/train.tsv", None, ["gj04", "0", "*", S1], (S1, None, 0)),
    ("cola", "dev", "CoLA/dev.tsv", None, ["gj04", "1", "", S1], (S1, None, 1)),
    ("cola", "test", "CoLA/test.tsv", ["index", "sentence"], ["0", S1], (S1, None, None)),
    ("sst2", "train", "SST-2/train.tsv", ["sentence", "label"], [S1, "1"], (S1, None, 1)),
    ("sst2", "test", "SST-2/test.tsv", ["index", "sentence"], ["0", S1], (S1, None, None)),
    (
        "mrpc",
        "train",
        "MRPC/train.tsv",
        ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
        ["1", "7", "8", S1, S2],
        (S1, S2, 1),
    ),
    (
        "mrpc",
        "test",
        "MRPC/test.tsv",
        ["index", "#1 ID", "#2 ID", "#1 String", "#2 String"],
        ["0", "7", "8", S1, S2],
        (S1, S2, None),
    ),
    ("stsb", "dev", "STS-B/dev.tsv", [*STSB, "score"], [*"abcdefg", S1, S2, "3.800"], (S1, S2, 3.8)),
    ("stsb", "test", "STS-B/test.tsv", STSB, [*"abcdefg", S1, S2], (S1, S2, None)),
    (
        "qqp",
        "train",
        "QQP/train.tsv",
        ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
        ["1", "2", "3", S1, S2, "0"],
        (S1, S2, 0),
    ),
    ("qqp", "test", "QQP/test.tsv", ["id", "question1", "question2"], ["1", S1, S2], (S1, S2, None)),
    (
        "mnli",
        "train",
        "MNLI/train.tsv",
        [*MNLI, "label1", "gold_label"],
        [*"abcdefgh", S1, S2, "neutral", "contradiction"],
        (S1, S2, 2),
    ),
    (
        "mnli",
        "dev_matched",
        "MNLI/dev_matched.tsv",
        [*MNLI, *VOTES, "gold_label"],
        [*"abcdefgh", S1, S2, *["neutral"] * 5, "entailment"],
        (S1, S2, 0),
    ),
    (
        "mnli",
        "dev_mismatched",
        "MNLI/dev_mismatched.tsv",
        [*MNLI, *VOTES, "gold_label"],
        [*"abcdefgh", S1, S2, *["entailment"] * 5, "neutral"],
        (S1, S2, 1),
    ),
    ("mnli", "test_matched", "MNLI/test_matched.tsv", MNLI, [*"abcdefgh", S1, S2], (S1, S2, None)),
    ("mnli", "test_mismatched", "MNLI/test_mismatched.tsv", MNLI, [*"abcdefgh", S1, S2], (S1, S2, None)),
    (
        "qnli",
        "train",
        "QNLI/train.tsv",
        ["index", "question", "sentence", "label"],
        ["0", S1, S2, "not_entailment"],
        (S1, S2, 1),
    ),
    ("qnli", "test", "QNLI/test.tsv", ["index", "question", "sentence"], ["0", S1, S2], (S1, S2, None)),
    ("rte", "dev", "RTE/dev.tsv", [*PAIR, "label"], ["0", S1, S2, "entailment"], (S1, S2, 0)),
    ("rte", "test", "RTE/test.tsv", PAIR, ["0", S1, S2], (S1, S2, None)),
    ("wnli", "train", "WNLI/train.tsv", [*PAIR, "label"], ["0", S1, S2, "1"], (S1, S2, 1)),
    ("wnli", "test", "WNLI/test.tsv", PAIR, ["0", S1, S2], (S1, S2, None)),
    ("ax", "test", "diagnostic/diagnostic.tsv", PAIR, ["0", S1, S2], (S1, S2, None)),
    ("ax", "test", "AX/diagnostic.tsv", PAIR, ["0", S1, S2], (S1, S2, None)),
    (
        "ax",
        "test",
        "diagnostic/diagnostic-full.tsv",
        [
            "Lexical Semantics",
            "Predicate-Argument Structure",
            "Logic",
            "Knowledge",
            "Domain",
            "Premise",
            "Hypothesis",
            "Label",
        ],
        ["", "", "Negation", "", "News", S1, S2, "contradiction"],
        (S1, S2, 2),
    ),
]
LABELLED = [layout for layout in LAYOUTS if layout[5][2] is not None]
IDS = [layout[2] for layout in LAYOUTS]


def write(root, file, *rows, ending="\n", bom=b"", last="\n"):
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bom + (ending.join("\t".join(row) for row in rows) + last).encode())
    return path


def error(*arguments, **options):
    with pytest.raises(UserError) as caught:
        load(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"ending": "\r\n", "last": "\r\n"},
        {"last": ""},
        {"last": "\n\n"},
        {"bom": b"\xef\xbb\xbf"},
        {"bom": b"\xef\xbb\xbf", "ending": "\r\n", "last": "\r\n\r\n"},
    ],
    ids=["plain", "crlf", "no final newline", "blank last line", "byte-order mark", "all"],
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_every_layout_is_read_in_every_form(tmp_path, layout, form):
    name, split, file, header, row, (sentence1, sentence2, label) = layout
    write(tmp_path, file, *([header] if header else []), row, row, row, **form)
    data = load(get_task(name), "local", tmp_path, splits=[split])
    rows = data[split]
    assert rows.sentence1 == [sentence1] * 3
    assert rows.sentence2 == (None if sentence2 is None else [sentence2] * 3)
    if label is None:
        assert rows.labels is None
    else:
        assert rows.labels.dtype == (np.float32 if name == "stsb" else np.int64)
        assert rows.labels.tolist() == pytest.approx([label] * 3)
    assert data.notes == [f"{name} {split}: 3 rows, official {get_task(name).rows[split]}"]


def test_every_glue_task_has_its_layout_above():
    assert {layout[0] for layout in LAYOUTS} == {
        name for name, task in shipped().items() if task.hub and task.hub.dataset == "nyu-mll/glue"
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_a_row_with_a_column_too_few_or_too_many_is_an_error(tmp_path, layout):
    name, split, file, header, row, _ = layout
    head = [header] if header else []
    changes = [[*row, "more"]] + ([row[:-1]] if name != "qqp" else [])
    for changed in changes:
        path = write(tmp_path, file, *head, row, changed, row)
        assert error(get_task(name), "local", tmp_path, splits=[split]).startswith(
            f"{path}:{len(head) + 2}: {len(changed)} columns where {len(row)} are expected"
        )


@pytest.mark.parametrize("layout", LABELLED, ids=[layout[2] for layout in LABELLED])
def test_an_unknown_label_is_an_error_with_its_line(tmp_path, layout):
    name, split, file, header, row, _ = layout
    head = [header] if header else []
    place = 1 if name == "cola" else (header.index(get_task(name).label) if name != "ax" else -1)
    changed = list(row)
    changed[place] = "maybe"
    path = write(tmp_path, file, *head, row, changed)
    message = error(get_task(name), "local", tmp_path, splits=[split])
    assert message.startswith(f"{path}:{len(head) + 2}: ") and "'maybe'" in message
    assert "0 to 5" in message if name == "stsb" else all(word in message for word in get_task(name).as_written)


@pytest.mark.parametrize("score", ["nan", "inf", "-0.1", "5.1", "", "four"])
def test_a_score_that_is_no_number_from_0_to_5_is_an_error(tmp_path, score):
    path = write(tmp_path, "STS-B/dev.tsv", [*STSB, "score"], [*"abcdefg", S1, S2, score])
    assert error(get_task("stsb"), "local", tmp_path, splits=["dev"]) == (
        f"{path}:2: score {score!r} is not a number from 0 to 5"
    )


@pytest.mark.parametrize(
    "header", [["index", "premise", "sentence2", "label"], ["sentence1", "sentence1", "sentence2", "label"]]
)
def test_a_wrong_header_is_an_error_that_shows_both(tmp_path, header):
    path = write(tmp_path, "RTE/dev.tsv", header, ["0", S1, S2, "entailment"])
    message = error(get_task("rte"), "local", tmp_path, splits=["dev"])
    assert message.startswith(
        f"{path}:1: expected each of the columns sentence1, sentence2, label once, found {header}".replace(
            "[", "("
        ).replace("]", ")")
    )


def test_broken_utf8_is_an_error_with_its_line(tmp_path):
    for bom in (b"", b"\xef\xbb\xbf"):
        path = write(tmp_path, "SST-2/dev.tsv", ["sentence", "label"], ["good", "1"], bom=bom)
        path.write_bytes(path.read_bytes() + b"bad \xff\t1\n\nmore\t1\n")
        assert error(get_task("sst2"), "local", tmp_path, splits=["dev"]).startswith(f"{path}:3: not UTF-8 (byte 0xff)")


def test_empty_files_and_headers_alone_are_errors(tmp_path):
    for content, said in (
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"sentence\tlabel\n", "no rows"),
    ):
        write(tmp_path, "SST-2/dev.tsv", []).write_bytes(content)
        message = error(get_task("sst2"), "local", tmp_path, splits=["dev"])
        assert str(tmp_path / "SST-2/dev.tsv") in message and said in message


def test_the_home_of_a_user_that_there_is_not_is_named(tmp_path):
    """As where a shell leaves ~glue, meant as ~/glue, as it was typed."""
    assert "'~nosuchuser/x' is not a folder" in error(get_task("sst2"), "local", "~nosuchuser/x", splits=["dev"])
    elsewhere = get_task("sst2").model_copy(update={"files": {"dev": "~nosuchuser/dev.tsv"}})
    assert not elsewhere.has_own_places
    assert "~nosuchuser/dev.tsv' is missing" in error(elsewhere, "local", tmp_path, splits=["dev"])


def test_a_blank_line_between_rows_is_an_error(tmp_path):
    path = write(tmp_path, "SST-2/dev.tsv", ["sentence", "label"], ["good", "1"], [""], ["bad", "0"])
    assert error(get_task("sst2"), "local", tmp_path, splits=["dev"]).startswith(f"{path}:3: 1 columns where 2")


def test_a_few_incomplete_qqp_rows_are_left_out_and_reported(tmp_path):
    header = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
    good, cut, unlabelled = ["1", "2", "3", S1, S2, "1"], ["1", "2", "3", S1], ["1", "2", "3", S1, S2, ""]
    path = write(tmp_path, "QQP/train.tsv", header, good, cut, ["and the rest", "0"], unlabelled, good)
    data = load(get_task("qqp"), "local", tmp_path, splits=["train"])
    assert data["train"].labels.tolist() == [1, 1]
    assert data.notes == [
        f"{path}: left out 3 incomplete rows, the first in line 3",
        "qqp train: 2 rows, official 363846",
    ]
    write(tmp_path, "QQP/train.tsv", header, good, *[cut] * 101)
    assert "train.tsv:103: 4 columns where 6" in error(get_task("qqp"), "local", tmp_path, splits=["train"])
    write(tmp_path, "QQP/train.tsv", header, cut)
    assert "no complete row" in error(get_task("qqp"), "local", tmp_path, splits=["train"])


def test_missing_roots_folders_and_files_name_the_path(tmp_path):
    assert "data.root=DIR" in error(get_task("rte"), "local")
    assert f"'{tmp_path / 'none'}' is not a folder" in error(get_task("rte"), "local", tmp_path / "none")
    write(tmp_path, "RTE/train.tsv", [*PAIR, "label"], ["0", S1, S2, "entailment"])
    for act in (load, fingerprint):
        with pytest.raises(UserError, match=f"'{tmp_path}/RTE/dev.tsv' is missing"):
            act(get_task("rte"), "local", tmp_path)
    assert f"'{tmp_path}/diagnostic/diagnostic.tsv' is missing" in error(get_task("ax"), "local", tmp_path)


def test_files_that_people_have_in_place_of_the_right_ones_get_a_hint(tmp_path):
    write(tmp_path, "MRPC/msr_paraphrase_train.txt", ["Quality"])
    assert "msr_paraphrase_train.txt is the raw download" in error(get_task("mrpc"), "local", tmp_path)
    write(tmp_path, "glue/MRPC/train.tsv", ["Quality"])
    for folder in ("MRPC", "RTE"):
        (tmp_path / "glue" / folder).mkdir(exist_ok=True)
        message = error(get_task("mrpc"), "local", tmp_path / "glue" / folder)
        assert message.endswith(f"is missing: it lies one level up: take data.root={tmp_path}/glue")
    write(tmp_path, "AX.tsv", ["index", "prediction"])
    message = error(get_task("ax"), "local", tmp_path)
    assert "AX.tsv is what GLUE's server takes as answers; the questions are in diagnostic.tsv" in message


def test_combinations_that_do_not_exist_say_what_does():
    assert error(get_task("rte"), "builtin") == (
        "task 'rte' is not built in: use data=local data.root=DIR or data=hub "
        "(data=builtin has the tasks agreement, entailment, majority, similarity)"
    )
    assert "use data=builtin" in error(get_task("agreement"), "local", "/nowhere")
    assert "did you mean 'local'?" in error(get_task("rte"), "locale")
    assert "did you mean 'dev_matched'?" in error(get_task("mnli"), "hub", splits=["dev_match"])
    assert "named twice" in error(get_task("agreement"), "builtin", splits=["dev", "dev"])
    with pytest.raises(UserError, match=r"unknown task 'mlni': did you mean 'mnli'\?"):
        get_task("mlni")


def test_fingerprint_follows_content_and_never_the_path(tmp_path):
    for root in (tmp_path / "a", tmp_path / "b"):
        for split in ("train", "dev"):
            write(root, f"RTE/{split}.tsv", [*PAIR, "label"], ["0", S1, S2, "entailment"])
    first = fingerprint(get_task("rte"), "local", tmp_path / "a")
    assert first == fingerprint(get_task("rte"), "local", tmp_path / "b")
    assert first != fingerprint(get_task("rte"), "local", tmp_path / "a", splits=["dev"])
    write(tmp_path, "b/RTE/dev.tsv", [*PAIR, "label"], ["0", S1, S2, "not_entailment"])
    assert first != fingerprint(get_task("rte"), "local", tmp_path / "b")
    assert fingerprint(get_task("agreement"), "builtin") != fingerprint(get_task("entailment"), "builtin")
    hub = {fingerprint(get_task("rte"), "hub", revision=digit * 40) for digit in "ab"}
    assert len(hub) == 2


TEXT = st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=["Cs"]))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(TEXT, TEXT, st.integers(0, 1)), min_size=1, max_size=5))
def test_any_text_without_tabs_and_line_ends_comes_back(tmp_path, pairs):
    names = ("entailment", "not_entailment")
    write(tmp_path, "RTE/dev.tsv", [*PAIR, "label"], *[["0", a, b, names[label]] for a, b, label in pairs])
    rows = load(get_task("rte"), "local", tmp_path, splits=["dev"])["dev"]
    assert list(zip(rows.sentence1, rows.sentence2, rows.labels.tolist(), strict=True)) == pairs


FRAGMENTS = st.sampled_from(
    [
        b"\t",
        b"\n",
        b"\r\n",
        b"1",
        b"0",
        b"entailment",
        b"sentence1\tsentence2\tlabel\n",
        b"a",
        b"\xef\xbb\xbf",
        b"\xff",
        b"nan",
        b'"',
        b"\x00",
        "\u2028".encode(),
    ]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["cola", "rte", "qqp", "stsb"]),
    valid_start=st.booleans(),
    content=st.one_of(st.binary(max_size=60), st.lists(FRAGMENTS, max_size=25).map(b"".join)),
)
def test_any_bytes_give_rows_or_one_line(tmp_path, name, valid_start, content):
    header, row = next(layout[3:5] for layout in LABELLED if layout[0] == name)
    path = write(tmp_path, get_task(name).files_of("dev")[0].path, *([header] if header else []), row)
    path.write_bytes((path.read_bytes() if valid_start else b"") + content)
    try:
        rows = load(get_task(name), "local", tmp_path, splits=["dev"])["dev"]
    except UserError as problem:
        assert "\n" not in str(problem) and str(path) in str(problem)
    else:
        assert len(rows.sentence1) == len(rows.labels) > 0
        assert np.isfinite(rows.labels).all()


@pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not here")
@pytest.mark.parametrize(
    ("name", "positives"),
    # share of label 1 in train, counted with awk from the files
    [("cola", 6023 / 8551), ("sst2", 37569 / 67349), ("mrpc", 2474 / 3668), ("rte", 1241 / 2490), ("stsb", None)],
)
def test_real_files_have_the_official_rows_and_label_balance(name, positives):
    task = get_task(name)
    data = load(task, "local", REAL, splits=task.splits)
    assert data.notes == []
    assert {split: len(rows) for split, rows in data.items()} == task.rows
    assert data["test"].labels is None
    for rows in data.values():
        assert all(rows.sentence1) and (rows.sentence2 is None or all(rows.sentence2))
    if positives is None:
        assert data["train"].labels.min() >= 0 and data["train"].labels.max() == 5
        return
    assert data["train"].labels.mean() == pytest.approx(positives, abs=1e-9)
    expected = hashlib.sha256()
    for split in ("dev", "train"):
        content = hashlib.sha256((REAL / task.files_of(split)[0].path).read_bytes()).hexdigest()
        expected.update(f"{split} {content}\n".encode())
    assert fingerprint(task, "local", REAL).endswith(expected.hexdigest())
