"""README.md and MODEL_CARD.md of a run set: what they say, and that the hub's own classes read the card."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from test_results_collect import fail, finish, plan, sweep

from dsam.results.collect import collect
from dsam.results.report import make as report
from dsam.results.tables import build as tables

pytestmark = pytest.mark.slow

IDENTITY = {"data": "local rte abc", "model": "sha256:def"}
PROVENANCE = {"git": {"commit": "c0ffee", "dirty": False}, "versions": {"python": "3.11.9", "torch": "2.13.0"},
              "device": "EPYC", "threads": 2, "identity": IDENTITY}  # fmt: skip
BERT = {"name": "bert", "id": "google-bert/bert-base-uncased", "revision": "86b5e09", "path": "/copies/bert"}


def documents(tmp_path, planned, scores, model=BERT):
    """The two texts for runs of these scores (None: failed), each with provenance.json and config.yaml."""
    runs = tmp_path / "runs"
    sweep(runs, "few", planned)
    for run, score in zip(planned, scores, strict=True):
        if score is None:
            fail(runs, run)
            continue
        point = {"epoch": 2, "step": 20, "score": score, "loss": 0.5,
                 "metrics": {"dev": {"accuracy": score, "f1": score + 0.1}, "heldout": {"accuracy": 0.5}}}  # fmt: skip
        folder = finish(runs, run, best=score, changes={"best": point}).parent
        (folder / "provenance.json").write_text(json.dumps(PROVENANCE))
        (folder / "config.yaml").write_text(yaml.safe_dump({"task": {"name": run["task"]}, "model": model}))
    frame = collect(runs, "few")
    report.write_tables(tables.build(frame), frame, "few", runs, tmp_path / "tables")
    return [(tmp_path / "tables" / name).read_text(encoding="utf-8") for name in ("README.md", "MODEL_CARD.md")]


@pytest.fixture
def few(tmp_path):
    """adamw on mrpc: 70, 80; delta-SAM: 90 and a failed run."""
    planned = [plan("mrpc", "bert", method, seed) for method in ("adamw", "delta_sam") for seed in (0, 1)]
    return documents(tmp_path, planned, (0.7, 0.8, 0.9, None))


def test_the_hub_reads_the_card_and_finds_the_results(few):
    card = ModelCard(few[1])
    assert card.data.base_model == ["google-bert/bert-base-uncased"] and card.data.datasets == ["nyu-mll/glue"]
    assert card.data.metrics == ["accuracy", "f1"] and card.data.library_name == "transformers"
    index = yaml.safe_load(few[1].split("---\n")[1])["model-index"]
    assert [entry["name"] for entry in index] == ["few: bert, adamw", "few: bert, delta_sam"]
    found = {}
    for entry in index:
        name, results = model_index_to_eval_results([entry])
        for result in results:
            result.is_equal_except_value(result)
            assert (result.task_type, result.dataset_type) == ("text-classification", "nyu-mll/glue")
            found[name, result.dataset_config, result.dataset_split, result.metric_type] = result.metric_value
    for name, mean in (("few: bert, adamw", 0.75), ("few: bert, delta_sam", 0.9)):
        assert found[name, "mrpc", "validation", "accuracy"] == pytest.approx(mean)
        assert found[name, "mrpc", "validation", "f1"] == pytest.approx(mean + 0.1)
    # The fake runs have a held-out score of 0.5 too, which is that of no split of GLUE's.
    assert len(found) == 4 and "mean of 2 runs" in few[1] and "mean of 1 run\n" in few[1]


def test_the_card_says_what_its_numbers_are_not(few):
    text = few[1]
    assert "flatters" in text and "not on its test sets" in text and "δ-SAM is a reconstruction" in text
    assert "Not in any mean: 1 failed of 4 runs." in text
    assert "at revision 86b5e09. A local folder was read in its place; README.md" in text and "/copies" not in text


def test_runs_are_cut_short_where_a_limit_cut_them(tmp_path):
    planned = [plan("mrpc", "bert", "adamw", seed, max_train_examples=2000, max_steps=10) for seed in (0, 1, 2)]
    sweep(tmp_path, "few", planned)
    for one, examples in zip(planned, (2000, 1500, 2000), strict=True):
        path = finish(tmp_path, one)
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | {"train": result["train"] | {"examples": examples, "steps": 9}}))
        (path.parent / "config.yaml").write_text(yaml.safe_dump({"task": {"name": "mrpc"}, "model": BERT}))
    frame = collect(tmp_path, "few")
    report.write_tables(tables.build(frame), frame, "few", tmp_path, tmp_path / "tables")
    text = (tmp_path / "tables" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "- 2 runs cut short by train.max_train_examples.\n" in text and "max_steps" not in text


def test_made_up_tasks_are_not_called_glue(tmp_path):
    planned = [plan("agreement", "tiny", "adamw", seed) for seed in (0, 1)]
    text = documents(tmp_path, planned, (0.6, 0.7), {"name": "tiny", "id": None, "revision": None, "path": None})[1]
    data = ModelCard(text).data
    assert data.language == "en" and "single English tasks" in text
    assert data.datasets is None and data.base_model is None and "glue" not in data.tags
    assert "nyu-mll" not in text and "say nothing about language" in text and "random weights" in text
    assert "reconstruction" not in text


def test_each_task_is_called_what_it_is(tmp_path):
    """GLUE's with wrong labels on purpose, another data set of the hub, one of the user's own, and a built-in one."""
    noisy = plan("sst2", "bert", "adamw", 0) | {"task_label": "sst2 noise 0.4"}
    planned = [noisy, *(plan(task, "bert", "adamw", 0) for task in ("boolq", "reviews", "agreement"))]
    documents(tmp_path, planned, (0.7, 0.8, 0.9, 0.6))
    path = tmp_path / "runs" / noisy["folder"]
    result = json.loads((path / "result.json").read_text()) | {"task_label": "sst2 noise 0.4"}
    (path / "result.json").write_text(json.dumps(result))
    config = {"task": {"name": "sst2"}, "model": BERT, "data": {"label_noise": 0.4}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    own = {"name": "reviews", "metrics": ["accuracy"], "hub": {"dataset": "me/reviews", "splits": {"dev": "val"}}}
    folder = tmp_path / "runs" / planned[2]["folder"]
    (folder / "config.yaml").write_text(yaml.safe_dump({"task": own, "model": BERT}))
    frame = collect(tmp_path / "runs", "few")
    report.write_tables(tables.build(frame), frame, "few", tmp_path / "runs", tmp_path / "tables")
    text = (tmp_path / "tables" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert ModelCard(text).data.datasets == ["aps/super_glue", "me/reviews", "nyu-mll/glue"]
    assert ModelCard(text).data.language is None and "English" not in text  # nobody knows of what language reviews are
    (entry,) = yaml.safe_load(text.split("---\n")[1])["model-index"]
    shown = {(r["dataset"]["type"], r["dataset"]["config"]) for r in entry["results"]}
    assert shown == {("nyu-mll/glue", "sst2"), ("aps/super_glue", "boolq"), ("me/reviews", "default"),
                     ("dsam-built-in", "agreement")}  # fmt: skip
    limits = text.split("## Limits")[1]
    assert "- agreement: generated by the project" in limits and "- boolq, reviews: scores are on" in limits
    assert "- sst2 noise 0.4: 40 % of the training labels were spoilt on purpose" in limits


def test_runs_that_all_lack_a_score_have_a_card(tmp_path):
    runs = tmp_path / "runs"
    planned = [plan("mrpc", model, method, 0) for model in ("bert", "tiny") for method in ("adamw", "sam")]
    sweep(runs, "few", planned)
    for run in planned:
        finish(runs, run, changes={"best": None})
    frame = collect(runs, "few")
    report.write_tables(tables.build(frame), frame, "few", runs, tmp_path / "tables")
    assert "fine-tuned with 2 methods on mrpc" in (tmp_path / "tables" / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_the_readme_says_how_the_numbers_came_to_be(few, tmp_path):
    text = few[0]
    for fact in ("`make`", "4 (3 finished, 1 failed)", "0, 1", "commit c0ffee; files changed since it: False",
                 "python 3.11.9, torch 2.13.0", "EPYC", "threads: 2", "local rte abc", "sha256:def", "flatters",
                 "75.00 ± 7.07 (2)", "make verify EXPERIMENT=few"):  # fmt: skip
        assert fact in text, fact
    for path in (tmp_path / "tables").iterdir():
        assert f"`{path.name}`" in text or f"`{path.stem}.csv` `.md` `.tex` `.html`" in text or path.name == "README.md"


def test_the_same_runs_give_the_same_bytes_in_any_process(few, tmp_path):
    code = """if True:
        import sys; from pathlib import Path
        from dsam.results.report import make as report
        from dsam.results.tables import build as tables
        from dsam.results.collect import collect
        runs, folder = map(Path, sys.argv[1:]); frame = collect(runs, "few")
        report.write_tables(tables.build(frame), frame, "few", runs, folder)
    """
    subprocess.run([sys.executable, "-c", code, tmp_path / "runs", tmp_path / "again"], check=True)
    for path in (tmp_path / "tables").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_facts_that_differ_show_how_many_runs_had_each(tmp_path):
    planned = [plan("mrpc", "bert", "adamw", seed) for seed in range(3)]
    documents(tmp_path, planned, (0.7, 0.8, 0.9))
    path = tmp_path / "runs" / planned[1]["folder"] / "provenance.json"
    path.write_text(json.dumps(PROVENANCE | {"threads": 4}))
    frame = collect(tmp_path / "runs", "few")
    report.write_tables(tables.build(frame), frame, "few", tmp_path / "runs", tmp_path / "tables")
    assert "threads: 2 (2 runs); 4 (1 run)" in (tmp_path / "tables" / "README.md").read_text(encoding="utf-8")
    assert pd.read_csv(tmp_path / "tables" / "cells.csv")["score"].tolist() == [0.7, 0.8, 0.9]
