"""Tasks of a user's own, by description alone: every kind of file, what is refused, and label noise."""

import csv
import json
import re
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dsam import command_line
from dsam import task as tasks
from dsam.config import CONF, Config
from dsam.errors import UserError
from dsam.glue import Split, load, noisy
from dsam.glue.tokenising import Tokenised
from dsam.overrides import compose_config
from dsam.runs.identity import AS_SHIPPED, _settings, digest, identify
from dsam.runs.run import prepare
from dsam.task import Task, get_task, shipped

ODD = "He said \"no\", \t{it}\n\u2028 is 'odd'"
ROWS = [
    {"id": 1, "question": "Is it so?", "passage": ODD.replace("\t", " "), "answer": "yes"},
    {"id": 2, "question": "And, this?", "passage": "plain", "answer": "no"},
]


def task(**settings):
    given = {"name": "mine", "labels": ["no", "yes"], "metrics": ["accuracy"], "text": ["question", "passage"]}
    given |= {"label": "answer", "files": {"train": "train.csv", "dev": "train.csv"}, "test": []} | settings
    return Task.model_validate({k: v for k, v in given.items() if v is not None})


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(root, own, split="train"):
    return load(own, "local", root, splits=[split])[split]


def refused(root, own, split="train"):
    with pytest.raises(UserError) as caught:
        read(root, own, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("file", ["a.csv", "a.jsonl", "a.json", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, file):
    write(tmp_path / file, ROWS)
    own = task(files={"train": file, "dev": file})
    rows = read(tmp_path, own)
    assert rows.sentence1 == [row["question"] for row in ROWS]
    assert rows.sentence2 == [row["passage"] for row in ROWS]
    assert rows.labels.tolist() == [1, 0]


TEXT = st.text(st.characters(exclude_characters="\r", exclude_categories=["Cs"]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(TEXT, TEXT, st.sampled_from(["no", "yes"])), min_size=1, max_size=4))
@pytest.mark.parametrize("file", ["a.csv", "a.jsonl", "a.parquet"])
def test_any_text_comes_back(tmp_path, file, pairs):
    write(tmp_path / file, [{"question": a, "passage": b, "answer": label} for a, b, label in pairs])
    rows = read(tmp_path, task(files={"train": file, "dev": file}))
    back = list(zip(rows.sentence1, rows.sentence2, [("no", "yes")[i] for i in rows.labels], strict=True))
    assert back == pairs


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "hub",
            "task 'mine' names no data set of the hub for data=hub: add it to its file, or use data=local data.root=",
        ),
        ("builtin", "task 'mine' is not built in: use data=local"),
    ],
)
def test_a_source_that_a_task_does_not_name_is_refused(tmp_path, source, said):
    with pytest.raises(UserError, match=re.escape(said)):
        load(task(), source, tmp_path)
    with pytest.raises(UserError, match="'agreement' is built in, data=local does not have it"):
        load(get_task("agreement"), "local", tmp_path)


def test_the_small_model_s_spelling_of_other_tasks_words_is_noted(tmp_path):
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "dev.csv", ROWS)
    built_in = Config.load(compose_config(["task=agreement", f"paths.cache={tmp_path}/cache"], CONF))
    local = {"source": "local", "root": str(tmp_path)}
    given = built_in.to_dict() | {"task": task().model_dump(), "data": built_in.to_dict()["data"] | local}
    assert any("letter by letter" in note for note in prepare(Config.load(given)).notes)
    assert not any("letter by letter" in note for note in prepare(built_in).notes)


def test_a_text_is_put_together_from_columns_and_a_single_text_has_no_pair(tmp_path):
    write(tmp_path / "train.csv", ROWS)
    assert read(tmp_path, task(text=["{question} // {answer}"])).sentence1 == ["Is it so? // yes", "And, this? // no"]
    assert read(tmp_path, task(text=["question"])).sentence2 is None


def test_scores_labels_in_other_words_and_files_without_a_header(tmp_path):
    (tmp_path / "s.csv").write_text("good,4.5\nbad,-1\n")
    scores = task(labels=None, score_range=[-1, 5], metrics=["pearson"], text=["t"], label="s",
                  files={s: {"path": "s.csv", "header": ["t", "s"]} for s in ("train", "dev")})  # fmt: skip
    assert read(tmp_path, scores).labels.tolist() == [4.5, -1.0]
    write(tmp_path / "b.jsonl", [{"t": "x", "s": True}, {"t": "y", "s": False}])
    booleans = task(written=["false", "true"], text=["t"], label="s", files={"train": "b.jsonl", "dev": "b.jsonl"})
    assert read(tmp_path, booleans).labels.tolist() == [1, 0]
    write(tmp_path / "n.parquet", [{"t": "x", "s": 1}, {"t": "y", "s": 0}])
    numbers = task(written=["0", "1"], text=["t"], label="s", files={"train": "n.parquet", "dev": "n.parquet"})
    assert read(tmp_path, numbers).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("a.jsonl", '{"question": "a", "passage": null, "answer": "no"}', ":1: column 'passage' holds None"),
        (
            "a.jsonl",
            '{"question": "a", "passage": 3, "answer": "no"}',
            ":1: column 'passage' holds 3, which is",
        ),
        (
            "a.jsonl",
            '\n{"question": "a", "answer": "no"}',
            ":2: expected each of the columns question,",
        ),
        ("a.jsonl", r'{"question": "\ud83d old", "passage": "b", "answer": "no"}', ":1: column 'question' holds half"),
        ("a.jsonl", '{"question": "a"', ":1: not JSON"),
        ("a.json", '[{"question": "a", "passage": "b", "answer": "no"}]', ":1: [{'question'"),
        ("a.csv", "question,passage,answer\na,b,maybe\n", ":2: unknown label 'maybe': known: no, yes (written= says"),
        ("a.csv", "question,passage,label\na,b,no\n", ":1: expected each of the columns question, passage, answer"),
        (
            "a.csv",
            "question;passage;answer\na;b;no\n",
            ":1: found no column 'question' in ('question;passage;answer',): its columns stand between semicolons: a",
        ),
        ("a.tsv", "question,passage,answer\n", ":1: found no column 'question' in ('question,passage,answer',): its"),
        (
            "a.tsv",
            "question\tpassage\tanswer\ra\tb\tno\r",
            ":1: found no column 'question' in ('question', 'passage', 'answer\\ra', 'b', 'no'): its lines end in",
        ),
        ("a.csv", "question,passage,answer\na,b\n", ":2: 2 columns where 3 are expected"),
        ("a.csv", 'question,passage,answer\na,b,no\n"a,b,no\n', ":3: not CSV"),
        ("a.csv", "", ": the file is empty"),
        ("a.csv", "question,passage,answer\n", ": no rows"),
        ("a.parquet", "PAR1 and then nothing", " cannot be read as Parquet"),
    ],
)
def test_what_is_wrong_is_one_line_with_file_and_place(tmp_path, file, content, said):
    (tmp_path / file).write_text(content)
    message = refused(tmp_path, task(files={"train": file, "dev": file}))
    assert message.startswith(f"{tmp_path / file}{said}"), message


def test_a_line_of_a_csv_file_is_counted_over_line_ends_in_quotes(tmp_path):
    (tmp_path / "a.csv").write_text('question,passage,answer\n"a\nb",c,no\nd,e,perhaps\n')
    assert ":4: unknown label 'perhaps'" in refused(tmp_path, task(files={"train": "a.csv", "dev": "a.csv"}))


def test_odd_values_of_parquet_and_json_are_named(tmp_path):
    import datetime

    write(tmp_path / "a.parquet", [{"question": "a", "passage": "b", "answer": datetime.date(2020, 1, 1)}])
    assert ":1: unknown label datetime.date" in refused(
        tmp_path, task(files={"train": "a.parquet", "dev": "a.parquet"})
    )
    own = task(labels=None, score_range=[0, 5], metrics=["pearson"], text=["t"], label="s",
               files={"train": "a.jsonl", "dev": "a.jsonl"})  # fmt: skip
    (tmp_path / "a.jsonl").write_text('{"t": "x", "s": 1' + "0" * 400 + "}\n")
    assert "is not a number from 0 to 5" in refused(tmp_path, own)
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + "\n")
    assert ":1: not JSON" in refused(tmp_path, own)


def test_row_counts_are_checked_only_where_stated_and_incomplete_rows_left_out_only_where_allowed(tmp_path):
    (tmp_path / "train.csv").write_text("question,passage,answer\na,b,no\na,b\n")
    assert load(task(incomplete_rows=1), "local", tmp_path, splits=["train"]).notes == [
        f"{tmp_path / 'train.csv'}: left out 1 incomplete rows, the first in line 3"
    ]
    (tmp_path / "train.csv").write_text("question,passage,answer\na,b,no\n")
    assert load(task(), "local", tmp_path).notes == []
    assert load(task(rows={"dev": 3}), "local", tmp_path).notes == ["mine dev: 1 rows, official 3"]


def test_rows_with_an_empty_text_are_used_and_said(tmp_path):
    (tmp_path / "train.csv").write_text("question,passage,answer\na,b,no\n,b,no\na,  ,yes\n")
    data = load(task(), "local", tmp_path, splits=["train"])
    assert data["train"].sentence1 == ["a", "", "a"] and data["train"].sentence2 == ["b", "b", "  "]
    assert data.notes == [
        f"{tmp_path / 'train.csv'}: the text of 2 rows is empty, the first in line 3: as empty they are used"
    ]


def test_files_lie_anywhere_and_the_first_of_several_is_taken(tmp_path):
    write(tmp_path / "there.csv", ROWS)
    assert len(read(None, task(files={s: str(tmp_path / "there.csv") for s in ("train", "dev")}))) == 2
    several = task(files={"train": [{"path": "no.csv"}, {"path": "there.csv", "text": ["answer"]}], "dev": "there.csv"})
    assert read(tmp_path, several).sentence1 == ["yes", "no"]
    for names in (["no.csv", "there.csv"], ["no.csv", {"path": "there.csv"}], ["there.csv", "no.csv"]):
        assert read(tmp_path, task(files={"train": names, "dev": "there.csv"})).sentence1 == [
            row["question"] for row in ROWS
        ]
    assert f"file '{tmp_path}/gone.csv' is missing" in refused(
        tmp_path, task(files={"train": "gone.csv", "dev": "gone.csv"})
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"metrics": ["acuracy"]}, "unknown metric 'acuracy'; did you mean 'accuracy'?"),
        ({"metrics": ["pearson"]}, "metric 'pearson' is none of a classification"),
        ({"labels": None}, "either labels (a classification) or score_range"),
        ({"labels": ["a", "b", "c"], "metrics": ["f1"]}, "take f1_macro"),
        ({"labels": ["a", "a"]}, "must differ"),
        ({"labels": None, "score_range": [1, 1], "metrics": ["pearson"]}, "finite and rise"),
        ({"written": ["0"]}, "as many different texts as 2 labels"),
        ({"headline": ["f1"]}, "headline 'f1' is not among"),
        ({"files": {"train": "a.csv"}}, "files has no 'dev'"),
        ({"files": {"train": "a.csv", "dev": "a.xlsx"}}, "must end in one of .tsv, .csv"),
        ({"files": {"train": "a.csv", "dev": "b.csv", "tets": "c.csv"}}, "unknown split 'tets'"),
        ({"files": None}, "needs files or hub"),
        ({"text": ["a", "b", "c"]}, "at most 2"),
        ({"colums": 3}, "Extra inputs"),
        ({"train": ["train", "dev"]}, "at most 1"),
        ({"files": {"train": [], "dev": "a.csv"}}, "at least 1"),
        ({"labels": None, "score_range": [0, float("inf")], "metrics": ["pearson"]}, "must be finite"),
        ({"builtin": True, "files": None}, "is built in, and only agreement"),
        ({"evaluation": ["dev", "heldout"]}, "name the split otherwise"),
        ({"evaluation": ["dev", "train"]}, "evaluation names 'train', which is trained on"),
        ({"evaluation": ["dev", "dev"]}, "names a split twice"),
    ],
)
def test_a_description_that_cannot_be_meant_is_refused(settings, said):
    with pytest.raises(ValidationError) as caught:
        task(**settings)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"train": {"path": "a.csv", "headers": ["a"]}},
            "unknown key 'task.files.train.headers'; did you mean 'header'?",
        ),
        ({"train": {"file": "a.csv"}}, "unknown key 'task.files.train.file'; known: header, label, path, text"),
        ({"train": {"label": "a"}}, "'task.files.train.path' is not set"),
        ({"train": {"path": "a.csv", "header": [0, 1]}}, "'task.files.train.header[0]' must be text, not 0: put it in"),
        (
            {"train": ["a.csv", {"path": "b.csv", "lable": "a"}]},
            "unknown key 'task.files.train[1].lable'; did you mean",
        ),
        ({"train": [3, "a.csv"]}, "'task.files.train[0]' must be text, not 3: put it in quotes"),
        ({"train": []}, "task.files.train: Tuple should have at least 1 item"),
        ({"train": 3}, "'task.files.train' must be text, not 3: put it in quotes"),
    ],
)
def test_a_mistake_in_a_file_s_own_settings_is_called_what_it_is(settings, said):
    assert one_line({"files": {"dev": "a.csv"} | settings}).startswith(said)


def test_a_misspelt_key_is_named_and_not_the_one_that_is_missing():
    assert one_line({"metrics": None, "metric": ["accuracy"]}) == "unknown key 'task.metric'; did you mean 'metrics'?"


def one_line(settings):
    """What a command says of a task with these."""
    described = {"name": "mine", "labels": ["no", "yes"], "metrics": ["accuracy"], "text": ["question"]} | settings
    described = {key: value for key, value in described.items() if value is not None}
    with pytest.raises(UserError) as caught:
        Config.load(run_of().to_dict() | {"task": described})
    return str(caught.value)


def test_the_test_set_hides_its_labels_unless_it_is_scored_or_its_file_names_them(tmp_path):
    """What `test` is by default follows from `evaluation`; AX is one that says both."""
    write(tmp_path / "a.csv", ROWS)
    files, without = dict.fromkeys(("train", "dev", "test"), "a.csv"), dict.fromkeys(("train", "test"), "a.csv")
    given = {"name": "mine", "labels": ["no", "yes"], "metrics": ["accuracy"], "text": ["question"], "label": "answer"}
    hidden = Task(**given, files=files)
    assert hidden.test == ("test",) and read(tmp_path, hidden, "test").labels is None
    for evaluation, these in ((["dev", "test"], files), (["test"], without)):
        scored = Task(**given, files=these, evaluation=evaluation)
        assert scored.test == () and load(scored, "local", tmp_path)["test"].labels.tolist() == [1, 0]
    both = given | {"evaluation": ["test"], "test": ["test"]}
    own = {"path": "a.csv", "label": "answer"}
    assert read(tmp_path, Task(**both, files=without | {"test": own}), "test").labels.tolist() == [1, 0]
    for wrong, split in ((both, "test"), (both | {"test": ["train"]}, "train")):
        with pytest.raises(ValidationError, match=f"test hides the labels of '{split}', which training or scores need"):
            Task(**wrong, files=without)
    assert get_task("ax").test == get_task("ax").evaluation == ("test",)


def test_superglue_s_tasks_are_read_in_their_official_form(tmp_path):
    lines = {
        "BoolQ/train.jsonl": {"question": "is it", "passage": "It is.", "idx": 0, "label": True},
        "CB/train.jsonl": {"premise": "She said so.", "hypothesis": "so", "label": "neutral", "idx": 0},
        "WiC/train.jsonl": {"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "idx": 0, "label": False,
                            "start1": 2, "start2": 4, "end1": 6, "end2": 8, "version": 1.1},
    }  # fmt: skip
    for file, line in lines.items():
        (tmp_path / file).parent.mkdir()
        write(tmp_path / file, [line])
    found = {name: read(tmp_path, get_task(name)) for name in ("boolq", "cb", "wic")}
    assert (found["boolq"].sentence1, found["boolq"].sentence2, found["boolq"].labels.tolist()) == (
        ["is it"], ["It is."], [1]
    )  # fmt: skip
    assert found["cb"].labels.tolist() == [2]
    assert (found["wic"].sentence1, found["wic"].labels.tolist()) == (["bank: A bank."], [0])


def test_every_task_of_this_project_is_described_in_its_own_file():
    for name, one in shipped().items():
        assert one.name == name and one.title


def test_the_settings_of_this_projects_tasks_are_those_that_name_no_run():
    """Where one is changed on purpose, its runs get other names: it stays out of AS_SHIPPED, or its line changes."""
    assert {name: digest(_settings(one)) for name, one in shipped().items()} == AS_SHIPPED


@pytest.mark.parametrize(
    "key, value", [("metrics", ["accuracy"]), ("labels", ["wrong", "right"]), ("text", ["other"]), ("label", "other")]
)
def test_a_task_file_of_this_project_that_was_edited_gives_its_runs_other_names(tmp_path, monkeypatch, key, value):
    def named(conf):
        monkeypatch.setattr(tasks, "SHIPPED", conf / "task")
        shipped.cache_clear()
        return identify(Config.load(compose_config(["task=agreement"], conf))).id

    edited = shutil.copytree(CONF, tmp_path / "conf")  # each folder is composed from once
    file = edited / "task" / "agreement.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {key: value}))
    try:
        assert named(edited) != named(CONF)
    finally:
        monkeypatch.undo()
        shipped.cache_clear()


# Label noise


def examples(labels):
    labels = np.asarray(labels)
    return Tokenised(np.zeros(0, np.int32), np.zeros(len(labels) + 1, np.int64), None, labels, 0, 0, False)


CLASSES = {
    2: task(),
    3: task(labels=["a", "b", "c"]),
    5: task(labels=[*"abcde"]),
}


@settings(max_examples=60, deadline=None)
@given(
    classes=st.sampled_from([2, 3, 5]),
    size=st.integers(1, 200),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_exactly_the_share_gets_another_label_and_the_rest_keeps_its_own(classes, size, share, seed):
    true = np.random.default_rng(size).integers(0, classes, size)
    given_ = examples(true)
    spoilt = noisy(CLASSES[classes], given_, share, seed)
    assert (spoilt.labels != true).sum() == round(share * size)
    assert ((spoilt.labels >= 0) & (spoilt.labels < classes)).all()
    assert (spoilt.clean_labels == true).all() and (given_.labels == true).all()
    assert (noisy(CLASSES[classes], given_, share, seed).labels == spoilt.labels).all()


def test_more_noise_spoils_the_same_examples_and_further_ones_and_another_seed_others():
    true = np.zeros(1000, dtype=np.int64)
    wrong = {share: noisy(CLASSES[3], examples(true), share, 0).labels != true for share in (0.2, 0.4)}
    assert (wrong[0.2] <= wrong[0.4]).all()
    other = noisy(CLASSES[3], examples(true), 0.2, 1).labels != true
    assert (other & wrong[0.2]).sum() < 100  # 40 of 200 by chance


def test_each_other_label_is_equally_likely():
    spoilt = noisy(CLASSES[5], examples(np.full(20_000, 2)), 1.0, 3).labels
    counts = np.bincount(spoilt, minlength=5)
    assert counts[2] == 0
    assert np.abs(counts[[0, 1, 3, 4]] - 5000).max() < 4 * (20_000 * 0.25 * 0.75) ** 0.5  # four standard deviations


def test_a_regression_s_scores_go_round_among_the_chosen():
    own = task(labels=None, score_range=[0, 5], metrics=["pearson"])
    true = np.linspace(0, 5, 100, dtype=np.float32)
    spoilt = noisy(own, examples(true), 0.3, 0).labels
    assert (spoilt != true).sum() == 30
    assert sorted(spoilt) == sorted(true)


def test_the_chosen_examples_are_the_same_on_every_machine():
    assert np.flatnonzero(noisy(CLASSES[2], examples(np.zeros(20, dtype=np.int64)), 0.25, 7).labels).tolist() == [
        9,
        10,
        11,
        15,
        19,
    ]


def test_a_split_without_labels_is_refused():
    with pytest.raises(ValueError, match="no labels"):
        noisy(CLASSES[2], Tokenised(np.zeros(0, np.int32), np.zeros(3, np.int64), None, None, 0, 0, False), 0.5, 0)
    assert len(Split(["a"], None, None)) == 1


# Through the pipeline


def run_of(*given):
    from test_config import config

    return config("task=entailment", *given)


def test_noise_reaches_the_training_set_alone_and_is_the_same_for_every_method_and_seed():
    from dsam.runs.run import prepare

    clean = prepare(run_of("selection=heldout")).data
    seen = []
    for own in (["optimizer=sam", "seed=1"], ["optimizer=adamw", "seed=2"]):
        data = prepare(run_of("selection=heldout", "data.label_noise=0.3", *own)).data
        wrong = data["train"].labels != clean["train"].labels
        assert wrong.sum() == round(0.3 * len(wrong))
        assert (data["train"].clean_labels == clean["train"].labels).all()
        assert all((data[split].labels == clean[split].labels).all() for split in ("dev", "heldout"))
        seen.append(wrong)
    assert (seen[0] == seen[1]).all()
    data = prepare(run_of("selection=heldout", "data.label_noise=0.3", "data.heldout_noise=0.3")).data
    assert (data["heldout"].labels != clean["heldout"].labels).mean() == pytest.approx(0.3, abs=0.01)
    assert (data["dev"].labels == clean["dev"].labels).all()


def own_run(tmp_path, rows, *given, **settings):
    """What is composed for one run of a task of one's own, whose splits hold so many of ROWS."""
    for split, count in rows.items():
        write(tmp_path / f"{split}.jsonl", [row | {"score": float(row["id"])} for row in ROWS * count][:count])
    (tmp_path / "task").mkdir()
    own = task(**{"files": {split: f"{split}.jsonl" for split in rows}} | settings)
    (tmp_path / "task" / "mine.yaml").write_text(yaml.safe_dump(own.model_dump(mode="json")))
    places = ["data=local", f"data.root={tmp_path}", f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache"]
    given = ["task=mine", *places, "tracking=disabled", "train.max_steps=2", "device.threads=1", *given]
    return compose_config(given, CONF, with_hydra=True, more=tmp_path)


def test_labels_that_are_found_to_be_hidden_are_said_before_the_start(tmp_path):
    """Only the second of the files names them, and the first is there."""
    several = {"train": "train.jsonl", "dev": ["dev.jsonl", {"path": "none.jsonl", "label": "answer"}]}
    chosen = command_line.load(own_run(tmp_path, {"train": 2, "dev": 2}, files=several, test=["dev"]))
    with pytest.raises(UserError, match="mine: the data of its split 'dev' have no labels, which training or scores"):
        prepare(chosen)


def test_a_training_set_of_one_row_has_none_to_hold_out(tmp_path):
    cfg = own_run(tmp_path, {"train": 1, "dev": 2}, "selection=heldout")
    with pytest.raises(UserError, match="^selection=heldout leaves nothing of mine's training set of 1 row: take sel"):
        prepare(command_line.load(cfg))


@pytest.mark.parametrize(
    ("selection", "rows", "undefined"),
    [
        ("dev", {"train": 2, "dev": 1}, "dev"),
        ("heldout", {"train": 5, "dev": 1}, "dev and heldout"),
        ("heldout", {"train": 5, "dev": 2}, "heldout"),
    ],
)
def test_a_run_whose_metric_is_undefined_says_that_it_has_no_score(tmp_path, capsys, selection, rows, undefined):
    scores = {"labels": None, "score_range": [0, 5], "metrics": ["pearson", "spearman"], "label": "score"}
    command_line.run_one(own_run(tmp_path, rows, f"selection={selection}", **scores))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == (
        f"no score: mean of pearson and spearman is undefined on {undefined}, whose labels or answers vary too little"
    )


def test_noise_is_part_of_the_identity_and_of_the_tasks_name_in_tables():
    from dsam.runs.identity import hyperparameters, identify

    clean, noisy_, other = (
        run_of(*given) for given in ([], ["data.label_noise=0.3"], ["data.label_noise=0.3", "data.noise_seed=1"])
    )
    assert len({identify(c).id for c in (clean, noisy_, other)}) == 3
    assert identify(run_of("data.noise_seed=1")).id == identify(clean).id  # there is no noise to draw
    heldout = [run_of("selection=heldout", f"data.heldout_noise={share}") for share in (0, 0.6)]
    assert hyperparameters(heldout[0]) != hyperparameters(heldout[1])  # so that tables and choices tell them apart
    assert "noise_seed" not in hyperparameters(clean)
    assert (clean.task_label, noisy_.task_label) == ("entailment", "entailment noise 0.3")
    with pytest.raises(UserError, match="needs selection=heldout"):
        run_of("data.heldout_noise=0.1")
    with pytest.raises(UserError, match=r"data.label_noise=1.5 must be at most 1"):
        run_of("data.label_noise=1.5")


def test_a_task_of_ones_own_runs_and_its_settings_are_part_of_the_identity(tmp_path):
    """BoolQ's form from CSV, by a description alone."""
    from test_config import config

    from dsam.config import Config
    from dsam.runs.identity import identify
    from dsam.runs.run import run

    rows = [{"question": f"is the dog number {i} old", "passage": "the dog is old", "answer": ("no", "yes")[i % 2]}
            for i in range(40)]  # fmt: skip
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.csv", rows)
    given = config("task=agreement", "train.max_steps=3", "tracking=disabled", f"paths.runs={tmp_path}/runs",
                   f"paths.cache={tmp_path}/cache").to_dict()  # fmt: skip
    own = task(metrics=["accuracy", "f1_macro"], headline=["f1_macro"], files={"train": "train.csv", "dev": "dev.csv"})
    given |= {"task": own.model_dump(), "data": {"source": "local", "root": str(tmp_path)}}
    first = Config.load(given)
    result = run(first)
    assert result["metric"] == "f1_macro" and set(result["best"]["metrics"]["dev"]) == {"accuracy", "f1_macro"}
    assert result["best"]["score"] == result["best"]["metrics"]["dev"]["f1_macro"]
    other = own.model_copy(update={"headline": ("accuracy",)})
    assert identify(Config.load(given | {"task": other.model_dump()})).id != identify(first).id
    named = own.model_copy(update={"title": "other words", "files": {s: str(tmp_path / f"{s}.csv") for s in own.files}})
    assert identify(Config.load(given | {"task": named.model_dump()})).id == identify(first).id  # the same examples
