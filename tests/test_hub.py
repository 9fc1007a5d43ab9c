"""Data and models from the hub, against a stand-in for it that makes trouble: half and damaged caches, other revisions,
passing faults, errors that tell what to do; and then the real command line."""

import hashlib
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import hub_server
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import command
from huggingface_hub import constants
from test_config import config

from dsam import glue
from dsam.config import Model
from dsam.errors import UserError
from dsam.glue.builtin import VOCABULARY
from dsam.hub import cache as hub_cache
from dsam.hub import requests as hub_requests
from dsam.progress import Downloads
from dsam.runs.identity import identify
from dsam.runs.run import prepare, run
from dsam.sweeps import sweep
from dsam.task import Task, get_task
from dsam.training import model as models
from dsam.training import model_files

GLUE = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
BERT, ROBERTA = "1" * 40, "2" * 40
COMMITS = {"datasets/nyu-mll/glue": GLUE, "models/acme/bert": BERT, "models/acme/roberta": ROBERTA}
WAYS_OUT = ("data=local data.root=DIR", "model.path=DIR")


@pytest.fixture(scope="session")
def repositories(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    hub_server.write_glue(root / "datasets/nyu-mll/glue")
    hub_server.write_bert(root / "models/acme/bert", VOCABULARY)
    hub_server.write_roberta(root / "models/acme/roberta")
    return root


@pytest.fixture
def hub(repositories, tmp_path, monkeypatch):
    """The hub as this process sees it, and an empty cache for its files."""
    server = hub_server.Hub(repositories)
    server.commits |= COMMITS
    for name, value in hub_server.settings(server.url, tmp_path).items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def own(hub, tmp_path):
    """The hub with repositories that a test may change."""
    hub.root = Path(shutil.copytree(hub.root, tmp_path / "own"))
    return hub


class Clock:
    """Time that passes only where it is waited for."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(hub_requests, "time", Clock())
    return hub_requests.time


def rte(**more):
    return glue.load(get_task("rte"), "hub", **more)


def model(name):
    return Model(name="x", id=f"acme/{name}", revision={"bert": BERT, "roberta": ROBERTA}[name])


def cache(kind="models", repo="acme/bert", commit=BERT):
    return Path(constants.HF_HUB_CACHE) / f"{kind}--{repo.replace('/', '--')}" / "snapshots" / commit


def weights(name):
    """sha256 of what a run would start from, and how the tokenizer splits a sentence."""
    tokenizer = models.load_tokenizer(model(name))
    given = config("task=agreement", "model=encoder", f"model.id=acme/{name}", f"model.revision={model(name).revision}")
    network = models.build(given, 2, tokenizer)
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest(), len(tokenizer), tokenizer("the man is a dog")["input_ids"]


def spoil(file, how="flip"):
    """Other bytes in the place that the link leads to."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.resolve().write_bytes(data if how == "flip" else data[: len(data) // 2])


def error_of(act, *arguments, **more):
    with pytest.raises(UserError) as caught:
        act(*arguments, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files_below(folder):
    """Every file and folder with its time of change."""
    return {p: p.lstat().st_mtime_ns for p in [folder, *folder.rglob("*")]}


# What is asked for


def test_only_the_task_s_files_and_one_kind_of_weights_are_asked_for_of_the_pinned_commit(hub):
    rte()
    models.load_tokenizer(model("bert"))
    weights("bert")
    glue_, bert = f"/datasets/nyu-mll/glue/resolve/{GLUE}", f"/acme/bert/resolve/{BERT}"
    assert [line.split()[3] for line in hub.asked("/revision/|/resolve/")] == [
        f"/api/datasets/nyu-mll/glue/revision/{GLUE}",
        *(f"{glue_}/rte/{split}-00000-of-00001.parquet" for split in ("train", "validation")),
        f"/api/models/acme/bert/revision/{BERT}",
        *(f"{bert}/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")),
        *(f"{bert}/{name}" for name in ("tokenizer_config.json", "vocab.txt")),
    ]


def test_rows_and_labels_are_those_of_the_files(hub):
    data = rte(splits=["train", "dev", "test"])
    assert data["train"].sentence1[0] == 'the man number 0 "has" a dog' and len(data["train"]) == 24
    assert data["dev"].labels.dtype == np.int64 and data["dev"].labels.tolist() == [0, 1] * 4
    assert data["test"].labels is None and len(data["test"]) == 3
    assert "rte train: 24 rows, official 2490" in data.notes
    cola = glue.load(get_task("cola"), "hub")["train"]  # in two files
    assert cola.sentence1 == [f"train {i}" for i in range(6)] and cola.sentence2 is None
    assert cola.labels.tolist() == [0, 1, 0, 1, 0, 1]
    scores = glue.load(get_task("stsb"), "hub")["train"].labels
    assert scores.dtype == np.float32 and scores.tolist() == [np.float32(3.8), 0.25]
    diagnostic = glue.load(get_task("ax"), "hub")["test"]
    assert diagnostic.sentence2 == ["c", "d"] and diagnostic.labels is None
    assert len(hub.asked("/revision/")) == 1  # of the list of files, for all tasks


def test_a_task_s_own_data_set_is_read_in_the_same_way(own):
    repo = own.root / "datasets/acme/reviews"
    columns = {"word": ["bank", "run"], "a": ["by the bank", "a run"], "b": ["the bank", "to run"], "label": [1, 0]}
    for split in ("train", "validation"):
        hub_server.write_parquet(repo / f"data/{split}-00000-of-00001.parquet", columns, ["False", "True"])
    own.commits["datasets/acme/reviews"] = "3" * 40
    wic = dict(name="mywic", labels=["no", "yes"], written=["False", "True"], metrics=["accuracy"])
    wic |= dict(
        text=["{word}: {a}", "b"], hub=dict(dataset="acme/reviews", revision="3" * 40, splits={"dev": "validation"})
    )
    task = Task.model_validate(wic)
    data = glue.load(task, "hub", revision=GLUE)["dev"]
    assert data.sentence1 == ["bank: by the bank", "run: a run"] and data.labels.tolist() == [1, 0]
    assert glue.fingerprint(task, "hub", revision=GLUE) == f"hub acme/reviews@{'3' * 40}"
    boolq = get_task("boolq")
    assert glue.fingerprint(boolq, "hub", revision=GLUE) == f"hub aps/super_glue/boolq@{boolq.hub.revision}"


def test_numbers_without_names_are_the_labels_numbers_unless_the_task_writes_numbers(own):
    repo = own.root / "datasets/acme/stars"
    for split in ("train", "validation"):
        hub_server.write_parquet(repo / f"{split}.parquet", {"text": ["a", "b", "c"], "label": [1, 2, 1]}, ["x"])
        file = repo / f"{split}.parquet"
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.parquet.read_table(file).replace_schema_metadata({}), file)
    own.commits["datasets/acme/stars"] = "4" * 40
    stars = dict(name="stars", metrics=["accuracy"], text=["text"], test=[])
    stars |= dict(hub=dict(dataset="acme/stars", revision="4" * 40, splits={"dev": "validation"}))
    three = Task.model_validate(stars | dict(labels=["none", "one", "two"]))
    assert glue.load(three, "hub")["train"].labels.tolist() == [1, 2, 1]
    written = Task.model_validate(stars | dict(labels=["one", "two"], written=["1", "2"]))
    assert glue.load(written, "hub")["train"].labels.tolist() == [0, 1, 0]


def test_weights_are_pickles_only_where_there_are_no_others(own):
    only_bin = own.root / "models/acme/bin"
    shutil.copytree(own.root / "models/acme/bert", only_bin, ignore=shutil.ignore_patterns("*.safetensors"))
    own.commits["models/acme/bin"] = BERT
    folder = model_files.folder_of(Model(name="x", id="acme/bin", revision=BERT))
    assert (folder / "pytorch_model.bin").is_file()
    names = ["config.json", "tokenizer.json", "model.safetensors.index.json", "pytorch_model.bin", "tf_model.h5"]
    names += ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "onnx/config.json"]
    assert model_files._needed("m", names) == sorted(
        {*names} - {"pytorch_model.bin", "tf_model.h5", "onnx/config.json"}
    )


# The cache


def test_a_full_cache_is_read_offline_without_a_request_and_without_a_write(hub, monkeypatch):
    before = weights("bert"), rte()["train"].sentence1
    hub.log.clear()
    hub_cache._sound.clear()
    there = files_below(Path(constants.HF_HUB_CACHE))
    assert (weights("bert"), rte()["train"].sentence1) == before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.shutdown()
    assert (weights("bert"), rte()["train"].sentence1) == before
    assert hub.log == [] and files_below(Path(constants.HF_HUB_CACHE)) == there


@pytest.mark.parametrize(
    "name, kept",
    [
        ("bert", ["config.json"]),
        ("bert", ["config.json", "model.safetensors"]),
        ("bert", ["config.json", "tokenizer_config.json"]),
        ("roberta", ["config.json", "merges.txt"]),
        ("roberta", []),
    ],
)
def test_half_a_cache_is_completed_and_gives_what_a_full_one_gives(hub, monkeypatch, name, kept):
    whole = weights(name)
    folder = cache(repo=f"acme/{name}", commit=model(name).revision)
    everything = sorted(p.name for p in folder.iterdir())
    for file in folder.iterdir():
        if file.name not in kept:
            file.resolve().unlink()
            file.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = error_of(weights, name)
    assert "HF_HUB_OFFLINE" in said and WAYS_OUT[1] in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.log.clear()
    assert weights(name) == whole
    fetched = sorted(line.rsplit("/", 1)[1] for line in hub.asked("/resolve/"))
    assert fetched == sorted(set(everything) - set(kept))


def test_empty_texts_are_said_as_those_of_local_files_are(own):
    import pyarrow.parquet

    (file,) = (own.root / "datasets/nyu-mll/glue").glob("**/rte/train-*.parquet")
    table = pyarrow.parquet.read_table(file)
    texts = ["" if row in (2, 5) else text for row, text in enumerate(table["sentence1"].to_pylist())]
    place = table.schema.get_field_index("sentence1")
    pyarrow.parquet.write_table(table.set_column(place, "sentence1", [texts]), file)
    (note,) = [note for note in rte().notes if "empty" in note]
    assert note.endswith(f"{file.name}: the text of 2 rows is empty, the first in line 3: as empty they are used")


def test_half_a_cache_that_another_library_left_is_completed(hub, monkeypatch):
    whole = weights("bert")
    shutil.rmtree(constants.HF_HUB_CACHE)
    huggingface_hub.hf_hub_download("acme/bert", "config.json", revision=BERT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "acme/bert" in error_of(weights, "bert")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert weights("bert") == whole


def test_the_cache_is_shared_with_huggingface_hub(hub, monkeypatch):
    huggingface_hub.snapshot_download("acme/bert", revision=BERT)
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    whole = weights("bert")
    shutil.rmtree(constants.HF_HUB_CACHE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert weights("bert") == whole
    hub.log.clear()
    assert huggingface_hub.hf_hub_download("acme/bert", "vocab.txt", revision=BERT) == str(cache() / "vocab.txt")
    assert hub.log == []


def test_a_tokenizer_that_does_not_come_is_an_error_and_the_next_command_has_it_whole(hub, clock):
    hub.faults = [{"match": "resolve.*/(tokenizer|vocab)", "status": 503}]
    said = error_of(weights, "bert")
    assert "acme/bert" in said and "503" in said and all(way in said for way in WAYS_OUT)
    assert (cache() / "config.json").exists() and not (cache() / "tokenizer.json").exists()
    hub.faults = []
    assert weights("bert")[1] == len(VOCABULARY.read_text().splitlines())
    assert len(hub.asked("resolve/.*model.safetensors")) == 1


def test_another_revision_is_never_used(own, monkeypatch, clock):
    file = own.root / "datasets/nyu-mll/glue/rte/train-00000-of-00001.parquet"
    pinned = file.read_bytes()
    other = {"sentence1": ["a"], "sentence2": ["b"], "label": [0]}  # what the hub has had since
    hub_server.write_parquet(file, other, ["entailment", "not_entailment"])
    own.commits["datasets/nyu-mll/glue"] = "5" * 40
    assert len(rte(revision="5" * 40)["train"]) == 1
    file.write_bytes(pinned)
    own.commits["datasets/nyu-mll/glue"] = GLUE
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    own.log.clear()
    assert "HF_DATASETS_OFFLINE is set" in error_of(rte) and own.log == []
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    own.faults = [{"match": "resolve", "status": 503}]  # after the first answer
    assert "503" in error_of(rte)
    own.faults = [{"match": "", "status": 404}]
    assert "404" in error_of(rte)
    assert not cache("datasets", "nyu-mll/glue", GLUE).joinpath("rte/train-00000-of-00001.parquet").exists()
    own.faults = []
    assert len(rte()["train"]) == 24


def test_a_hub_that_answers_with_another_commit_is_not_believed(own, monkeypatch):
    monkeypatch.setattr(hub_server.Handler, "allowed", lambda *_: True)
    own.commits["datasets/nyu-mll/glue"] = "5" * 40
    assert f"another commit, {'5' * 40}" in error_of(rte)


def test_a_folder_of_the_same_name_here_is_never_used(hub, tmp_path, monkeypatch):
    whole, rows = weights("bert"), rte()["train"].sentence1
    monkeypatch.chdir(tmp_path)
    hub_server.write_bert(tmp_path / "acme/bert", VOCABULARY)
    (tmp_path / "acme/bert/tokenizer.json").write_text("{}")
    (tmp_path / "nyu-mll/glue/rte").mkdir(parents=True)
    (tmp_path / "nyu-mll/glue/rte/train-00000-of-00001.parquet").write_text("mine")
    assert weights("bert") == whole and rte()["train"].sentence1 == rows
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "acme/bert" in error_of(weights, "bert")
    assert "nyu-mll/glue" in error_of(rte)


@pytest.mark.parametrize("how", ["flip", "cut"])
@pytest.mark.parametrize("name", ["rte/train-00000-of-00001.parquet", "model.safetensors", "vocab.txt"])
def test_damage_in_the_cache_is_found_and_mended_or_refused(hub, monkeypatch, capfd, name, how):
    def use():
        return rte()["train"].sentence1 if "rte" in name else weights("bert")

    whole = use()
    file = (cache("datasets", "nyu-mll/glue", GLUE) if "rte" in name else cache()) / name
    bytes_, changed = file.read_bytes(), file.stat().st_mtime_ns
    spoil(file, how)
    os.utime(file, ns=(changed, changed))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert f"{file} is damaged" in error_of(use)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    capfd.readouterr()
    assert use() == whole and file.read_bytes() == bytes_
    assert f"{file} is damaged: fetching it again" in capfd.readouterr().err


def test_a_damaged_list_of_files_is_asked_for_again(hub):
    rows = rte()["train"].sentence1
    folder = cache("datasets", "nyu-mll/glue", GLUE)
    tree = folder.parent.parent / "trees" / f"{GLUE}.json"
    known = json.loads(tree.read_text())
    known["files"]["rte/train-00000-of-00001.parquet"]["lfs_sha256"] = "0" * 64
    tree.write_text(json.dumps(known))
    assert rte()["train"].sentence1 == rows
    for broken in ("", "[1]", '{"format_version": 1, "files": {"a": 1}}', '{"format_version": 2}'):
        tree.write_text(broken)
        hub.log.clear()
        assert rte()["train"].sentence1 == rows and len(hub.log) == 1


def test_a_file_that_is_not_the_commit_s_is_not_read_with_it(hub):
    weights("bert")
    (cache() / "added_tokens.json").write_text('{"dog": 1}')
    assert "added_tokens.json is not of that commit" in error_of(weights, "bert")


# Trouble that passes


@pytest.mark.parametrize(
    "fault, line",
    [
        ({"match": "revision", "status": 429, "headers": {"Retry-After": "7"}, "times": 1}, "429.*again in 7 s"),
        ({"match": "cdn.*train", "status": 429, "headers": {"RateLimit": '"api";r=0;t=55'}, "times": 1}, "in 56 s"),
        ({"match": "revision", "status": 503, "times": 4}, r"503.*again in 8 s"),
        ({"match": "resolve.*train", "status": 500, "times": 1}, "rte/train-.*500"),
        ({"match": "cdn.*train", "status": 503, "times": 3}, "rte/train-.*503.*again in 4 s"),
        ({"match": "revision", "reset": True, "times": 2}, "connection broke"),
        ({"match": "cdn", "reset": True, "times": 2}, "rte/train-.*connection broke"),
        ({"match": "cdn.*train", "cut": 1000, "times": 1}, "rte/train-.*connection broke"),
    ],
)
def test_passing_trouble_is_waited_for_and_said(hub, clock, capfd, fault, line):
    hub.faults = [fault]
    assert len(rte()["train"]) == 24
    assert re.search(line, capfd.readouterr().err) and clock.slept


def test_a_slow_answer_is_waited_for_and_said(hub, monkeypatch, capfd):
    monkeypatch.setattr(hub_requests, "SLOW", 0.1)
    hub.faults = [{"match": "revision", "hang": 0.4}]
    assert len(rte()["train"]) == 24
    assert "has not answered yet: waiting for the list of files of the data set nyu-mll/glue" in capfd.readouterr().err


def test_no_answer_is_asked_for_again(hub, monkeypatch, clock, capfd):
    monkeypatch.setattr(hub_requests, "READ", 0.2)
    hub.faults = [{"match": "revision", "hang": 0.5, "times": 1}]
    assert len(rte()["train"]) == 24
    assert "no answer within 0.2 s; asking again" in capfd.readouterr().err


def test_a_broken_download_goes_on_where_it_stopped(hub, clock):
    hub.faults = [{"match": "cdn.*train", "cut": 1000, "times": 1}, {"match": "cdn.*train", "cut": 500, "times": 1}]
    assert len(rte()["train"]) == 24
    assert [line.rsplit("parquet", 1)[1] for line in hub.asked("cdn.*train")] == ["", " from 1000", " from 1500"]


def test_what_a_killed_command_had_fetched_is_gone_on_with(hub):
    name = "rte/train-00000-of-00001.parquet"
    whole = (hub.root / "datasets/nyu-mll/glue" / name).read_bytes()
    blobs = cache("datasets", "nyu-mll/glue", GLUE).parent.parent / "blobs"
    blobs.mkdir(parents=True)
    partial = blobs / f"{hashlib.sha256(whole).hexdigest()}.incomplete"
    partial.write_bytes(whole[:1234])
    assert len(rte()["train"]) == 24 and hub.asked("cdn.*train.* from 1234")
    shutil.rmtree(blobs.parent)
    blobs.mkdir(parents=True)
    partial.write_bytes(b"x" * 1234)  # of something else
    assert len(rte()["train"]) == 24
    shutil.rmtree(blobs.parent)
    blobs.mkdir(parents=True)
    partial.write_bytes(whole + b"x")
    assert len(rte()["train"]) == 24 and not partial.exists()


def test_damage_on_the_way_is_fetched_again_once_and_then_refused_by_name(hub, capfd):
    hub.faults = [{"match": "cdn.*train", "flip": 900, "times": 1}]
    assert len(rte()["train"]) == 24
    assert "rte/train-00000-of-00001.parquet of nyu-mll/glue came damaged" in capfd.readouterr().err
    hub.faults = [{"match": "cdn", "flip": 900}]
    assert "model.safetensors came twice with other bytes" in error_of(weights, "bert")
    assert not (cache() / "model.safetensors").exists()


def test_patience_ends(hub, clock):
    hub.faults = [{"match": "", "status": 503}]
    said = error_of(rte)
    assert "503" in said and re.search(r"for \d+ min", said) and all(way in said for way in WAYS_OUT)
    assert 500 < sum(clock.slept) <= 600 and max(clock.slept) == 30
    clock.slept.clear()
    hub.faults = [{"match": "", "status": 429, "headers": {"Retry-After": "3600"}}]
    assert "asks to wait 60 min" in error_of(rte) and clock.slept == []


def test_commands_at_the_same_time_fetch_each_file_once(hub, capfd):
    hub.faults = [{"match": "cdn.*train", "rate": 700}]
    rows = []
    threads = [threading.Thread(target=lambda: rows.append(len(rte()["train"]))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rows == [24, 24, 24]
    assert len(hub.asked("cdn.*train")) == len(hub.asked("cdn.*validation")) == 1
    assert "another process fetches rte/train" in capfd.readouterr().err


# Who asks, and what cannot be had


def test_tokens_are_sent_to_the_hub_and_to_no_other_host(hub, monkeypatch):
    hub.gated.add("models/acme/bert")
    said = error_of(weights, "bert")
    assert f"gated: ask for access at {hub.url}/acme/bert" in said and "HF_TOKEN" in said
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert f"gated and your token gives no access to it: ask for access at {hub.url}/acme/bert" in error_of(
        weights, "bert"
    )
    monkeypatch.setenv("HF_TOKEN", "rubbish")
    assert "does not know your token" in error_of(weights, "bert")
    monkeypatch.setenv("HF_TOKEN", "hf_bad\x01secret")
    assert "secret" not in error_of(weights, "bert")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    hub.log.clear()
    rows = weights("bert")
    assert all(line.endswith(" token") for line in hub.asked(" 127.0.0.1 "))
    assert hub.asked(" localhost ") and not hub.asked(" localhost .*token")
    monkeypatch.delenv("HF_TOKEN")
    shutil.rmtree(constants.HF_HUB_CACHE)
    Path(constants.HF_TOKEN_PATH).write_text("hf_good")  # where `hf auth login` keeps it
    assert weights("bert") == rows


def test_messages_tell_apart_what_is_wrong(hub, monkeypatch, tmp_path, clock):
    def of(**more):
        said = error_of(models.load_tokenizer, model("bert").model_copy(update=more))
        assert all(way in said for way in WAYS_OUT) and more.get("id", "acme/bert") in said
        return said

    assert "there is no such model, or it is private" in of(id="acme/bart")
    assert f"at {'9' * 40}" in of(revision="9" * 40) and "no such revision" in of(revision="9" * 40)
    assert "Repo id must be in the form" in of(id="acme/bert/x/y")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in of()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))
    assert "its files need" in of() and "HF_HOME=DIR" in of()
    monkeypatch.undo()
    assert not hub.asked("cdn")


def test_a_cache_that_cannot_be_written_is_one_line(hub, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file/hub"))
    said = error_of(rte)
    assert f"the cache {tmp_path}/file/hub cannot be written (Not a directory), and rte/train-00000-of-0" in said
    assert "HF_HOME=DIR" in said
    assert WAYS_OUT[0] in said


def test_a_full_disk_while_downloading_is_one_line(hub, monkeypatch):
    real = Path.open

    def full(self, mode="r", *arguments, **more):
        return real(
            Path("/dev/full") if self.suffix == ".incomplete" and "a" in mode else self, mode, *arguments, **more
        )

    monkeypatch.setattr(Path, "open", full)
    assert "no space left in" in error_of(rte)


def test_no_network_is_told_at_once(hub, monkeypatch, capfd):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused
    start = time.monotonic()
    said = error_of(rte)
    assert time.monotonic() - start < 6
    assert "no network, or none to http://127.0.0.1:9" in said and WAYS_OUT[0] in said
    assert "asking again in 1 s" in capfd.readouterr().err


def test_a_branch_is_refused_and_its_commit_named(hub, monkeypatch):
    run_ = ("task=agreement", "model=encoder", "model.id=acme/bert", "model.revision=main")
    said = error_of(identify, config(*run_))
    assert "model.revision=main may come to mean another commit: give a commit's 40 hex digits" in said
    assert f"(that is model.revision={BERT} now)" in said
    assert f"data.revision={GLUE} now" in error_of(rte, revision="main")
    assert "data.revision=bcdcba7 may" in error_of(rte, revision="bcdcba7")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    assert "40 hex digits" in error_of(rte, revision="main") and hub.log == []


# Wrong data


@pytest.mark.parametrize(
    "columns, names, expected",
    [
        ({"sentence1": ["a"], "label": [0]}, ("entailment", "not_entailment"), "train-.*:1: expected .* sentence2"),
        ({"one": ["a"], "sentence2": ["b"], "label": [0]}, ("entailment", "not_entailment"), "train-.*:1: expected"),
        ({"sentence1": ["a"], "sentence2": ["b"]}, ("entailment", "not_entailment"), "train-.*:1: expected .* label"),
        (
            {"sentence1": ["a", None], "sentence2": ["b", "c"], "label": [0, 1]},
            ("entailment", "not_entailment"),
            "train-.*:2: column 'sentence1' holds None",
        ),
        (
            {"sentence1": ["a", "a"], "sentence2": ["b", "c"], "label": [0, 2]},
            ("entailment", "not_entailment"),
            "train-.*:2: unknown label 2",
        ),
        (
            {"sentence1": ["a"], "sentence2": ["b"], "label": [-1]},
            ("entailment", "not_entailment"),
            "train-.*:1: unknown label -1",
        ),
        (
            {"sentence1": ["a"], "sentence2": ["b"], "label": [0]},
            ("not_entailment", "entailment"),
            "train-.*: labels .'not_entailment', 'entailment'. where",
        ),
        ({"sentence1": [], "sentence2": [], "label": []}, ("entailment", "not_entailment"), "train-.*no rows"),
    ],
)
def test_wrong_data_are_one_line_that_names_the_file(own, columns, names, expected):
    file = own.root / "datasets/nyu-mll/glue/rte/train-00000-of-00001.parquet"
    hub_server.write_parquet(file, columns, list(names))
    assert re.search(expected, error_of(rte))


def test_a_missing_split_or_file_or_what_is_no_parquet_is_one_line(own):
    folder = own.root / "datasets/nyu-mll/glue"
    (folder / "cola/train-00001-of-00002.parquet").unlink()
    (folder / "rte/train-00000-of-00001.parquet").write_bytes(b"PAR1 cut")
    said = error_of(glue.load, get_task("mnli"), "hub")
    assert "no file mnli/train-*.parquet" in said and "ax, cola, rte, stsb" in said and WAYS_OUT[0] in said
    assert "1 files cola/train-*.parquet of another number" in error_of(glue.load, get_task("cola"), "hub")
    assert re.search("train-.*cannot be read as Parquet", error_of(rte))


def test_a_repository_that_is_no_model_is_one_line(own):
    (own.root / "models/acme/bert/config.json").unlink()
    assert "acme/bert at 1111" in (said := error_of(weights, "bert")) and "no configuration (config.json)" in said
    assert not own.asked("resolve")


# Runs


def settings(tmp_path, *more):
    return config(
        "task=rte", "model=encoder", "train.epochs=1", "train.max_steps=2", "train.batch_size=4", "tracking=disabled",
        f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache", *more,
    )  # fmt: skip


def test_a_run_from_the_hub_and_one_from_files_have_the_same_numbers_and_two_names(hub, tmp_path):
    hub_server.write_rte(tmp_path / "glue")
    local = ("data=local", f"data.root={tmp_path}/glue", f"model.path={hub.root}/models/acme/bert")
    there = settings(tmp_path, "data=hub", "model.id=acme/bert", f"model.revision={BERT}")
    contents = identify(there).contents
    assert hub.log == []  # a run's name, and so a plan, needs no network
    assert sweep.plan([there])[0].status == "missing" and hub.log == []
    assert contents["data"] == f"hub nyu-mll/glue/rte@{GLUE}" and contents["model"] == f"acme/bert@{BERT}"
    assert contents["record_version"] == 6
    a, b = run(there), run(settings(tmp_path, *local))
    assert a["weights_sha256"] == b["weights_sha256"] and a["evaluations"] == b["evaluations"]
    assert a["id"] != b["id"]


def test_a_prepared_model_is_the_same_whatever_else_is_in_the_cache(hub, tmp_path):
    there = settings(tmp_path, "data=hub", "model.id=acme/bert", f"model.revision={BERT}")
    first = prepare(there).network.state_dict()
    shutil.rmtree(constants.HF_HUB_CACHE)
    huggingface_hub.snapshot_download("acme/bert", revision=BERT)  # with pickles and all
    second = prepare(there).network.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_sweep_asks_once_per_file_before_its_first_run_and_then_needs_no_hub(hub, tmp_path):
    hub.faults = [{"match": "cdn.*train", "status": 503, "times": 1}]
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": f"{tmp_path}/home", "HF_HUB_DISABLE_TELEMETRY": "1"}
    warm = {"before": "hub_server:asked_instead"}
    at_the_hub, offline = (
        {hub_server.SETTINGS: json.dumps(hub_server.settings(hub.url, tmp_path / "home", value))}
        for value in (False, True)
    )
    given = ["-m", "data=hub", "task=rte", "model=encoder", "model.id=acme/bert", f"model.revision={BERT}"]
    given += ["train.epochs=1", "train.max_steps=1", "tracking=disabled", "optimizer=adamw,sam", "seed=0,1"]
    given += [f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache"]
    plan = command(*given, "launcher.plan=true", env=at_the_hub, **warm)
    assert "4 would start" in plan.stdout and hub.log == []
    done = command(*given, cold=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "rte/train-00000-of-00001.parquet: 2 kB in" in done.stderr and "503" in done.stderr
    asked = [line.split(" ", 1)[1] for line in hub.asked("revision|resolve/")]
    asked.remove(next(line for line in asked if "rte/train" in line))  # that met the 503
    assert len(asked) == len(set(asked)) == 9
    hub.log.clear()
    more = [g.replace("seed=0,1", "seed=2") for g in given]
    done = command(*more, env=offline, **warm)
    assert done.returncode == 0 and "2 finished" in done.stdout and hub.log == []


@pytest.mark.slow
def test_wrong_data_end_a_command_with_status_2_and_one_line(own, tmp_path):
    file = own.root / "datasets/nyu-mll/glue/rte/validation-00000-of-00001.parquet"
    hub_server.write_parquet(
        file, {"sentence1": ["a"], "sentence2": [None], "label": [0]}, ["entailment", "not_entailment"]
    )
    instead = {hub_server.SETTINGS: json.dumps(hub_server.settings(own.url, tmp_path))}
    place = f"paths.runs={tmp_path}/runs"
    done = command("data=hub", "task=rte", place, env=instead, before="hub_server:asked_instead")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "rte/validation-00000-of-00001.parquet:1: column 'sentence2' holds None" in line


# Progress


class Terminal:
    """A terminal, as rich finds it."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return True


def test_downloads_show_bytes_rate_and_time_left_in_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with Downloads() as progress, progress.file("acme/bert model.safetensors", 2_000_000):
        for size in (500_000, 1_000_000):
            time.sleep(0.05)
            progress.at(size)
        progress.say("a line [of] words")
        progress.progress.refresh()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.text)
    assert re.search(r"model.safetensors.*1.0/2.0 MB.*MB/s.*0:00:0\d", plain)
    assert "a line [of] words" in plain


def test_downloads_are_a_line_for_each_file_in_a_log(capfd):
    with Downloads() as progress, progress.file("acme/bert model.safetensors", 2_000_000):
        progress.at(1_000_000)
    assert capfd.readouterr().err == "acme/bert model.safetensors: 2.0 MB in 0 s\n"
