"""The hub source, with real `datasets` objects in the place of a download, and the unreachable hub for real."""

import time

import datasets
import huggingface_hub
import numpy as np
import pytest

from dsam.errors import UserError
from dsam.glue import hub, load
from dsam.task import get_task


def rows(names, columns=("sentence1", "sentence2"), labels=(0, 1, 0)):
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("float32")
    texts = {column: [f"{column} {i}" for i in range(len(labels))] for column in columns}
    features = {column: datasets.Value("string") for column in columns} | {"label": kind}
    return datasets.Dataset.from_dict({**texts, "label": list(labels)}, datasets.Features(features))


@pytest.fixture
def download(monkeypatch, tmp_path):
    """Makes `load_dataset` answer with the given splits, and returns the calls that it got."""
    calls = []
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(hub, "_problem", lambda revision: None)

    def answer_with(splits):
        def load_dataset(*arguments, **options):
            calls.append((arguments, options))
            return datasets.DatasetDict(splits)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return answer_with


def test_rows_come_with_the_task_s_label_numbers_at_the_pinned_revision(download):
    names = ("entailment", "not_entailment")
    calls = download({"train": rows(names), "validation": rows(names, labels=[1, 1]), "test": rows(names, labels=[-1])})
    data = load(get_task("rte"), "hub", splits=["train", "dev", "test"])
    assert calls == [(("nyu-mll/glue", "rte"), {"revision": "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"})]
    assert data["train"].sentence1 == ["sentence1 0", "sentence1 1", "sentence1 2"]
    assert data["train"].sentence2 == ["sentence2 0", "sentence2 1", "sentence2 2"]
    assert data["train"].labels.dtype == np.int64 and data["train"].labels.tolist() == [0, 1, 0]
    assert data["dev"].labels.tolist() == [1, 1]
    assert data["test"].labels is None
    assert data.notes[0] == "rte train: 3 rows, official 2490"


def test_mnli_has_two_evaluation_sets_and_stsb_scores(download):
    names = ("entailment", "neutral", "contradiction")
    part = rows(names, ("premise", "hypothesis"), [2, 1, 0])
    download({"train": part, "validation_matched": part, "validation_mismatched": part})
    data = load(get_task("mnli"), "hub")
    assert list(data) == ["train", "dev_matched", "dev_mismatched"]
    assert data["dev_mismatched"].labels.tolist() == [2, 1, 0]
    assert data["train"].sentence2[0] == "hypothesis 0"
    download({"train": rows((), labels=[1.5, 5.0]), "validation": rows((), labels=[0.0])})
    scores = load(get_task("stsb"), "hub")["train"].labels
    assert scores.dtype == np.float32 and scores.tolist() == [1.5, 5.0]


def test_single_sentences_and_the_diagnostic_set(download):
    download(
        {
            "train": rows(("negative", "positive"), ["sentence"]),
            "validation": rows(("negative", "positive"), ["sentence"]),
        }
    )
    assert load(get_task("sst2"), "hub")["dev"].sentence2 is None
    download({"test": rows(("entailment", "neutral", "contradiction"), ("premise", "hypothesis"), [-1, -1])})
    assert load(get_task("ax"), "hub")["test"].labels is None


def test_other_labels_or_none_are_errors(download):
    download({"train": rows(("no", "yes")), "validation": rows(("no", "yes"))})
    with pytest.raises(UserError, match=r"labels .'no', 'yes'. where"):
        load(get_task("rte"), "hub")
    names = ("entailment", "not_entailment")
    download({"train": rows(names, labels=[0, -1, 1]), "validation": rows(names)})
    with pytest.raises(UserError, match="rte train: row 1 has no label"):
        load(get_task("rte"), "hub")


def test_a_cached_revision_is_read_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "nyu-mll___glue" / "rte" / "0.0.0" / hub.REVISION
    names = ("entailment", "not_entailment")
    for split in ("train", "validation"):
        rows(names).save_to_disk(tmp_path / split)
        folder.mkdir(parents=True, exist_ok=True)
        next((tmp_path / split).glob("*.arrow")).rename(folder / f"glue-{split}.arrow")
    assert load(get_task("rte"), "hub")["dev"].labels.tolist() == [0, 1, 0]
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        load(get_task("rte"), "hub", revision="another")


def test_the_cache_lies_where_datasets_puts_it(tmp_path):
    """`hub._cached` names the files as `datasets` does: a change of that would make every run ask the hub."""
    (tmp_path / "glue").mkdir()
    rows(("a", "b")).to_parquet(tmp_path / "glue" / "train.parquet")
    (tmp_path / "glue" / "README.md").write_text(
        "---\nconfigs:\n- config_name: rte\n  data_files:\n  - split: train\n    path: train.parquet\n---\n"
    )
    builder = datasets.load_dataset_builder(str(tmp_path / "glue"), "rte", cache_dir=str(tmp_path / "cache"))
    builder.repo_id = hub.DATASET  # what a builder from the hub has
    assert builder._relative_data_dir().rsplit("/", 1)[0] == "nyu-mll___glue/rte/0.0.0"
    builder.repo_id = None
    builder.download_and_prepare()
    assert [file.name for file in (tmp_path / "cache").rglob("*.arrow")] == ["glue-train.arrow"]


def test_an_unreachable_hub_is_one_line_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked again"))
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        load(get_task("rte"), "hub")
    assert time.monotonic() - start < 6
    assert "\n" not in str(caught.value) and "data=local data.root=DIR" in str(caught.value)


def test_a_hub_that_never_answers_is_given_up_in_time(monkeypatch, tmp_path):
    class Silent:
        def get(self, *_, **__):
            time.sleep(3)

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub, "get_session", Silent)
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"no answer within 0.2 s.*data=local data.root=DIR"):
        load(get_task("rte"), "hub")
    assert time.monotonic() - start < 2


def test_a_failing_download_is_one_line(download, monkeypatch):
    download({})

    def fail(*_, **__):
        raise ConnectionError("reset\nby peer")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"\(ConnectionError: reset\): use data=local data.root=DIR") as caught:
        load(get_task("rte"), "hub")
    assert "\n" not in str(caught.value)
