"""GLUE's submission: its files against a second reader and the transformers library by hand, choice of runs, check."""

import csv
import json
import random
import re
import shutil
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import command
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dsam.config import CONF, Config
from dsam.errors import UserError
from dsam.overrides import compose_config
from dsam.runs.record import seal
from dsam.runs.run import run
from dsam.submission import choose, formats
from dsam.submission.make import main
from dsam.task import get_task
from dsam.training.loop import predict

pytestmark = pytest.mark.slow

OFFICIAL = {  # lines of the server's sample files less the header
    "CoLA.tsv": 1063, "SST-2.tsv": 1821, "MRPC.tsv": 1725, "STS-B.tsv": 1379, "QQP.tsv": 390965, "MNLI-m.tsv": 9796,
    "MNLI-mm.tsv": 9847, "QNLI.tsv": 5463, "RTE.tsv": 3000, "WNLI.tsv": 146, "AX.tsv": 1104,
}  # fmt: skip
NLI, ENTAILMENT, BINARY = ["entailment", "neutral", "contradiction"], ["entailment", "not_entailment"], ["0", "1"]
# file of the submission: task of the run, test file, its text columns, the server's name of each output of the head
FILES = {
    "CoLA.tsv": ("cola", "CoLA/test.tsv", ["sentence"], BINARY),
    "SST-2.tsv": ("sst2", "SST-2/test.tsv", ["sentence"], BINARY),
    "MRPC.tsv": ("mrpc", "MRPC/test.tsv", ["#1 String", "#2 String"], BINARY),
    "STS-B.tsv": ("stsb", "STS-B/test.tsv", ["sentence1", "sentence2"], None),
    "QQP.tsv": ("qqp", "QQP/test.tsv", ["question1", "question2"], BINARY),
    "MNLI-m.tsv": ("mnli", "MNLI/test_matched.tsv", ["sentence1", "sentence2"], NLI),
    "MNLI-mm.tsv": ("mnli", "MNLI/test_mismatched.tsv", ["sentence1", "sentence2"], NLI),
    "QNLI.tsv": ("qnli", "QNLI/test.tsv", ["question", "sentence"], ENTAILMENT),
    "RTE.tsv": ("rte", "RTE/test.tsv", ["sentence1", "sentence2"], ENTAILMENT),
    "WNLI.tsv": ("wnli", "WNLI/test.tsv", ["sentence1", "sentence2"], BINARY),
    "AX.tsv": ("mnli", "diagnostic/diagnostic-full.tsv", ["Premise", "Hypothesis"], NLI),
}
ROWS = {name: 20 + i for i, name in enumerate(FILES)}  # each its own, so that no file can pass for another
WORDS = ("the", "old", "red", "dog", "farmer", "hammer", "is", "are", "lying", "falling", "not", "in", "a", "garden")


def write_table(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(map(str, row)) for row in ([header] if header else []) + rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def sentence(draw):
    return " ".join(draw.choices(WORDS, k=draw.randint(2, 9)))


@pytest.fixture(scope="module")
def small():
    """Test sets of a few rows each, in the table of tasks."""
    with pytest.MonkeyPatch.context() as patch:
        for file in formats.FILES:
            patch.setitem(get_task(file.task).rows, file.split, ROWS[file.name])
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Files of every task in GLUE's own layout."""
    folder, draw = tmp_path_factory.mktemp("glue"), random.Random(5)
    label_column = {"mrpc": "Quality", "qqp": "is_duplicate", "mnli": "gold_label", "stsb": "score"}
    for name, (task, test, columns, labels) in FILES.items():
        rows = [[i, *(sentence(draw) for _ in columns)] for i in range(ROWS[name])]
        if name == "AX.tsv":
            write_table(folder / test, [*columns, "Label"], [[*row[1:], draw.choice(NLI)] for row in rows])
            write_table(folder / "diagnostic/diagnostic.tsv", ["index", "sentence1", "sentence2"], rows)
            continue
        write_table(folder / test, ["index", *columns], rows)
        for split in ("train", test.split("/")[1].removesuffix(".tsv").replace("test", "dev")):
            rows = [
                [*(sentence(draw) for _ in columns), draw.choice(labels) if labels else f"{5 * draw.random():.3f}"]
                for _ in range(13)
            ]
            header = [*columns, label_column.get(task, "label")]
            if task == "cola":
                header, rows = None, [["src", label, "", text] for text, label in rows]
            write_table(folder / test.split("/")[0] / f"{split}.tsv", header, rows)
    return folder


def train(task, root, runs, seed=0):
    settings = [f"task={task}", "model=tiny", f"seed={seed}", "data=local", f"data.root={root}", "tracking=disabled"]
    settings += ["train.max_steps=1", "checkpoint.keep_weights=true"]
    settings += [f"paths.runs={runs}", f"paths.cache={runs.parent}/cache"]
    config = Config.load(compose_config(settings, CONF))
    config.model.architecture["initializer_range"] = 0.5  # large enough to answer different rows differently
    return runs / task / "tiny" / "adamw" / run(config)["id"]


@pytest.fixture(scope="module")
def runs(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("submission") / "runs"
    return {task: train(task, root, folder) for task in dict.fromkeys(task for task, *_ in FILES.values())}


@pytest.fixture(scope="module")
def made(small, runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    main(["--runs", *map(str, runs.values()), "--out", str(out)])
    return out


def rows_of(text):
    return list(csv.reader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))


def by_hand(folder, test_file, columns):
    """Outputs of the head for each row of an official file, one row at a time: no batch, no padding, no reader."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "best")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "best").eval()
    header, *rows = rows_of(test_file.read_text(encoding="utf-8"))
    texts = [[row[header.index(column)] for column in columns] for row in rows]
    with torch.no_grad():
        return [model(**tokenizer(*text, return_tensors="pt")).logits[0].tolist() for text in texts]


@pytest.mark.parametrize("name", FILES)
def test_each_file_is_what_the_model_answers_by_hand(made, root, runs, name):
    task, test, columns, labels = FILES[name]
    outputs = by_hand(runs[task], root / test, columns)
    with zipfile.ZipFile(made / "submission.zip") as archive:
        text = archive.read(name).decode()
    assert text == (made / name).read_text()
    header, *found = rows_of(text)
    assert header == ["index", "prediction"]
    assert [index for index, _ in found] == [str(i) for i in range(ROWS[name])]
    answers = [answer for _, answer in found]
    if labels is None:
        assert all(re.fullmatch(r"\d\.\d{3}", answer) for answer in answers)
        assert [float(a) for a in answers] == pytest.approx([min(5, max(0, x)) for (x,) in outputs], abs=6e-4)
        assert min(outputs) < [0]  # so that there is something to clip
    else:
        assert answers == [labels[int(np.argmax(output))] for output in outputs]
    assert len(set(answers)) > 1


def test_the_zip_holds_the_eleven_files_and_its_bytes_are_always_the_same(made, runs, tmp_path):
    with zipfile.ZipFile(made / "submission.zip") as archive:
        assert sorted(archive.namelist()) == sorted(OFFICIAL)
        assert {(e.date_time[0], e.external_attr >> 16) for e in archive.infolist()} == {(1980, 0o100644)}
    main(["--runs-dir", str(runs["rte"].parents[3]), "--model", "tiny", "--out", str(tmp_path)])
    assert (tmp_path / "submission.zip").read_bytes() == (made / "submission.zip").read_bytes()


def matthews(truth, answers):
    """R_K of Gorodkin 2004: covariance of the indicator matrices over the root of their own."""
    x, y = (np.array([[a == label for label in NLI] for a in given], float) for given in (answers, truth))

    def covariance(a, b):
        return ((a - a.mean(0)) * (b - b.mean(0))).sum()

    return covariance(x, y) / (covariance(x, x) * covariance(y, y)) ** 0.5


def test_runs_json_says_which_run_each_file_is_from_and_ax_is_scored(made, root, runs, small, capsys, monkeypatch):
    files = json.loads((made / "runs.json").read_text())["files"]
    assert {name: file["run"] for name, file in files.items()} == {n: str(runs[FILES[n][0]]) for n in FILES}
    assert {name: file["rows"] for name, file in files.items()} == ROWS
    result = json.loads((runs["mnli"] / "result.json").read_text())
    assert files["AX.tsv"]["development"] == {"recorded": result["best"]["score"], "again": result["best"]["score"]}

    truth = [row[-1] for row in rows_of((root / "diagnostic/diagnostic-full.tsv").read_text())[1:]]
    answers = [answer for _, answer in rows_of((made / "AX.tsv").read_text())[1:]]
    expected = matthews(truth, answers)
    assert files["AX.tsv"]["matthews_correlation"] == pytest.approx(expected)
    main(["--ax", str(runs["mnli"])])
    assert f"AX: Matthews correlation {expected:.4f}\n" in capsys.readouterr().out
    assert json.loads((runs["mnli"] / "ax.json").read_text()) == files["AX.tsv"]

    main(["--ax", str(runs["mnli"]), "--out", str(made.parent / "elsewhere")])
    assert (made.parent / "elsewhere" / "ax.json").read_bytes() == (runs["mnli"] / "ax.json").read_bytes()
    capsys.readouterr()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dsam.submission.make.write_atomically", full)
    with pytest.raises(UserError, match=r"^cannot write .*ax\.json: No space left on device; set --out DIR"):
        main(["--ax", str(runs["mnli"])])
    assert f"AX: Matthews correlation {expected:.4f}\n" in capsys.readouterr().out  # said before it could not be kept


def test_a_tf32_run_answers_in_float32_wherever(runs, small, tmp_path):
    there = tmp_path / "run"
    shutil.copytree(runs["rte"], there)
    settings = (there / "config.yaml").read_text()
    (there / "config.yaml").write_text(settings.replace("precision: float32", "precision: tf32"))
    files = []
    for folder in (runs["rte"], there):
        out = tmp_path / folder.name
        main(["--runs", str(folder), "--fill-majority", "--device", "cpu", "--out", str(out / "out")])
        files.append((out / "out" / "RTE.tsv").read_text())
    assert files[0] == files[1] and "tf32" in (there / "config.yaml").read_text()


def test_without_labels_ax_has_answers_and_no_score(made, root, runs, small, tmp_path, capsys):
    other = tmp_path / "glue"
    shutil.copytree(root, other)
    (other / "diagnostic/diagnostic-full.tsv").unlink()
    named = ["--fill-majority", *(task for task in runs if task != "mnli")]
    main(["--runs", str(runs["mnli"]), *named, "--data-root", str(other), "--out", str(tmp_path)])
    assert "AX: no labels in the data, no score" in capsys.readouterr().out
    assert (tmp_path / "AX.tsv").read_bytes() == (made / "AX.tsv").read_bytes()
    assert json.loads((tmp_path / "runs.json").read_text())["files"]["AX.tsv"]["matthews_correlation"] is None
    with pytest.raises(UserError, match="only in diagnostic-full.tsv"):
        main(["--ax", str(runs["mnli"]), "--data-root", str(other)])


def test_files_written_by_hand(small, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        for file in formats.FILES:
            patch.setitem(get_task(file.task).rows, file.split, 3)
        predictions = {file.name: np.array([1, 0, 1]) for file in formats.FILES}
        for name in ("MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"):
            predictions[name] = np.array([2, 0, 1])
        predictions["STS-B.tsv"] = np.array([-0.0001, 3.14159, 5.2])
        contents = {f.name: formats.answers(get_task(f.task), predictions[f.name]) for f in formats.FILES}
        archive = formats.write(tmp_path, contents)
        assert formats.validate(archive) == formats.validate(tmp_path) == contents
    binary = b"index\tprediction\n0\t1\n1\t0\n2\t1\n"
    nli = b"index\tprediction\n0\tcontradiction\n1\tentailment\n2\tneutral\n"
    two = b"index\tprediction\n0\tnot_entailment\n1\tentailment\n2\tnot_entailment\n"
    expected = dict.fromkeys(("CoLA.tsv", "SST-2.tsv", "MRPC.tsv", "QQP.tsv", "WNLI.tsv"), binary)
    expected |= dict.fromkeys(("MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"), nli)
    expected |= {"QNLI.tsv": two, "RTE.tsv": two, "STS-B.tsv": b"index\tprediction\n0\t0.000\n1\t3.142\n2\t5.000\n"}
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.tsv")} == expected


def test_the_command_writes_official_sizes_and_says_what_no_run_answered(root, runs, tmp_path):
    other = tmp_path / "glue"
    shutil.copytree(root / "WNLI", other / "WNLI")
    draw = random.Random(1)
    pairs = [[i, sentence(draw), sentence(draw)] for i in range(146)]
    write_table(other / "WNLI" / "test.tsv", ["index", "sentence1", "sentence2"], pairs)
    arguments = ["--runs", str(runs["wnli"]), "--data-root", str(other), "--out", str(tmp_path / "out")]
    missing = "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte"
    assert f"for {missing}: give one, or" in refused(*arguments)
    assert not (tmp_path / "out").exists()
    done = command(*arguments, "--fill-majority", script="submission.py")
    assert done.returncode == 0, done.stderr
    assert f"constant answers, which no run gave: {missing}\n" in done.stdout
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "submission.zip")
    files = {name: rows_of((tmp_path / "out" / name).read_text())[1:] for name in OFFICIAL}
    assert {name: len(rows) for name, rows in files.items()} == OFFICIAL
    constants = {name: {a for _, a in rows} for name, rows in files.items() if name != "WNLI.tsv"}
    assert constants.pop("STS-B.tsv") == {"2.701"}
    assert constants == {
        name: {"1"} if name in ("CoLA.tsv", "SST-2.tsv", "MRPC.tsv") else {"0"} if name == "QQP.tsv" else {"entailment"}
        for name in constants
    }
    said = json.loads((tmp_path / "out" / "runs.json").read_text())["files"]
    assert {name for name, file in said.items() if "constant" in file} == set(OFFICIAL) - {"WNLI.tsv"}

    checked = command("--check", str(tmp_path / "out" / "submission.zip"), script="submission.py")
    assert (checked.returncode, checked.stderr) == (0, "")
    share = 100 * Counter(a for _, a in files["WNLI.tsv"])["1"] / 146
    assert re.search(rf"^WNLI.tsv +146  0: .* %, 1: {share:.1f} %$", checked.stdout, re.MULTILINE)


def test_constants_are_the_real_training_sets_most_frequent_answers(glue_root):
    for file in formats.FILES:
        if file.task == "ax":
            continue
        path = glue_root / get_task(file.task).files_of("train")[0].path
        if not path.is_file():
            continue
        rows = rows_of(path.read_text(encoding="utf-8-sig").replace("\u2028", " ").replace("\x85", " "))
        if file.task == "stsb":
            assert file.constant == f"{np.mean([float(row[-1]) for row in rows[1:]]):.3f}"
        else:
            place = {"cola": 1, "mrpc": 0}.get(file.task, -1)
            assert file.constant == Counter(row[place] for row in rows).most_common(1)[0][0]


def fake(task, score, seed, run_id):
    return choose.Run(None, None, {"task": task, "best": {"score": score}, "seed": seed, "id": run_id})


def test_the_best_run_answers_and_of_equals_the_lowest_seed():
    runs = [fake("rte", 0.6, 0, "a"), fake("rte", 0.7, 9, "b"), fake("rte", 0.7, 2, "c"), fake("cola", -0.1, 3, "d")]
    for order in (runs, runs[::-1]):
        assert {t: r.result["id"] for t, r in choose.best(order).items()} == {"rte": "c", "cola": "d"}


def edited(folder, change):
    """A changed result, sealed again as if a run had left it."""
    result = json.loads((folder / "result.json").read_text())
    change(result)
    (folder / "result.json").write_text(json.dumps(result | {"result_sha256": seal(result)}))


def test_runs_are_found_by_score_among_those_with_weights(runs, tmp_path):
    place = tmp_path / "rte" / "tiny" / "adamw"
    for name, score, seed in (("a", 0.5, 0), ("b", 0.9, 1), ("c", 0.8, 4), ("d", 0.8, 3)):
        shutil.copytree(runs["rte"], place / name)
        edited(place / name, lambda r, new=(name, score, seed): r.update(
            id=new[0], seed=new[2], best=r["best"] | {"score": new[1]}))  # fmt: skip
    shutil.rmtree(place / "b" / "best")
    found, notes = choose.find(tmp_path, "tiny", "adamw")
    assert {task: r.folder for task, r in found.items()} == {"rte": place / "d"}
    assert notes == [f"{place / 'b'} has the better score, 0.9000, but kept no weights"]
    with pytest.raises(UserError, match="no runs of optimizer 'adam' under .*: did you mean 'adamw'"):
        choose.find(tmp_path, None, "adam")


def refused(*arguments):
    with pytest.raises(UserError) as error:
        main([str(a) for a in arguments])
    return str(error.value)


def test_runs_that_cannot_answer_are_refused(runs, root, small, tmp_path, monkeypatch):
    def copy(name, without=None, change=None):
        folder = tmp_path / name
        shutil.copytree(runs["rte"], folder)
        if without:
            target = folder / without
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        if change:
            edited(folder, change)
        return folder

    out = ["--out", tmp_path / "out", "--fill-majority"]
    assert "is not finished" in refused("--runs", copy("unfinished", "result.json"), *out)
    assert "checkpoint.keep_weights=true" in refused("--runs", copy("bare", "best"), *out)
    assert "went to its end" in refused("--runs", copy("bad", change=lambda r: r.update(status="diverged")), *out)
    assert "no development score" in refused("--runs", copy("none", change=lambda r: r.update(best=None)), *out)
    assert "task 'agreement' is none of GLUE's" in refused(
        "--runs", copy("own", change=lambda r: r.update(task="agreement")), *out
    )
    by_hand = copy("by-hand")
    text = (by_hand / "result.json").read_text()
    (by_hand / "result.json").write_text(text.replace('"seed": 0', '"seed": 7'))
    assert "result.json was edited" in refused("--runs", by_hand, *out)

    swapped = copy("swapped")
    weights = load_file(swapped / "best" / "model.safetensors")
    negated = {n: -t if n.startswith("classifier.") else t for n, t in weights.items()}
    save_file(negated, swapped / "best" / "model.safetensors", metadata={"format": "pt"})
    asked = []
    monkeypatch.setattr(
        "dsam.submission.predict.predict", lambda task, rows, *more: asked.append(rows) or predict(task, rows, *more)
    )
    assert "on the development set where the run recorded" in refused("--runs", runs["cola"], swapped, *out)
    assert len(asked) == 2 and all(rows.labels is not None for rows in asked)  # and no test set in vain

    short = tmp_path / "glue"
    shutil.copytree(root / "RTE", short / "RTE")
    lines = (short / "RTE" / "test.tsv").read_text().splitlines(keepends=True)
    (short / "RTE" / "test.tsv").write_text("".join(lines[:-1]))
    expected = f"rte test: found {ROWS['RTE.tsv'] - 1} rows, expected {ROWS['RTE.tsv']}"
    assert expected in refused("--runs", runs["rte"], "--data-root", short, *out)
    assert "is a run of rte: AX takes one of mnli" in refused("--ax", runs["rte"])
    assert not list((tmp_path / "out").glob("*")), "a refused submission left files"


def test_a_device_that_is_full_is_one_line(runs, small, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("dsam.submission.predict.predict", full)
    monkeypatch.setattr("dsam.submission.predict.choose_device", lambda config: torch.device("meta"))
    said = refused("--runs", runs["rte"], "--fill-majority", "--out", tmp_path / "out")
    assert said == "meta is out of memory: free some, or take --device cpu"


def test_mistakes_in_the_arguments(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "one of the arguments" in refused()
    assert "not allowed with" in refused("--runs", runs["rte"], "--runs-dir", tmp_path)
    assert "--out is not set" in refused("--runs", runs["rte"])
    assert "go with --runs-dir" in refused("--runs", runs["rte"], "--out", tmp_path, "--model", "tiny")
    assert "did you mean 'wnli'" in refused("--runs", runs["rte"], "--out", tmp_path, "--fill-majority", "wnl")
    assert "--fill-majority goes with" in refused("--ax", runs["mnli"], "--fill-majority")
    assert "--data-root has no effect on --check" in refused("--check", tmp_path, "--data-root", tmp_path)
    assert "no finished GLUE run" in refused("--runs-dir", tmp_path / "empty", "--out", tmp_path, "--fill-majority")


CHANGES = [
    ("CoLA.tsv", lambda t: t.replace("prediction", "label"), r"/CoLA.tsv:1: found header 'index\\tlabel', expected"),
    ("QQP.tsv", lambda t: t + "99\t1\n", "/QQP.tsv: found 25 rows, expected 24"),
    ("MNLI-mm.tsv", lambda t: t[: t[:-1].rindex("\n") + 1], "/MNLI-mm.tsv: found 25 rows, expected 26"),
    ("RTE.tsv", lambda t: t.replace("\n3\t", "\n4\t"), "/RTE.tsv:5: found index '4', expected '3'"),
    ("SST-2.tsv", lambda t: re.sub(r"\n5\t.", "\n5\t2", t), "/SST-2.tsv:7: found prediction '2', expected 0 or 1"),
    ("WNLI.tsv", lambda t: re.sub(r"\n0\t.", "\n0\tentailment", t), "/WNLI.tsv:2: found prediction 'entailment'"),
    ("QNLI.tsv", lambda t: re.sub(r"\n0\t\w+", "\n0\t1", t), "found prediction '1', expected entailment or not_ent"),
    ("AX.tsv", lambda t: re.sub(r"\n0\t\w+", "\n0\tnot_entailment", t), "expected entailment or neutral or contradic"),
    ("STS-B.tsv", lambda t: re.sub(r"\n0\t[\d.]+", "\n0\t5.01", t), "found prediction '5.01', expected a number from"),
    ("STS-B.tsv", lambda t: re.sub(r"\n0\t[\d.]+", "\n0\tnan", t), "found prediction 'nan', expected a number from 0"),
    ("STS-B.tsv", lambda t: re.sub(r"\n0\t[\d.]+", "\n0\t", t), "found prediction '', expected a number from 0 to 5"),
    ("MRPC.tsv", lambda t: re.sub(r"\n0\t", "\n0 ", t), "/MRPC.tsv:2: found index '0 "),
    ("MNLI-m.tsv", lambda t: t.replace("\n", "\r\n"), r"/MNLI-m.tsv:1: found header 'index\\tprediction\\r'"),
    ("CoLA.tsv", lambda t: "\ufeff" + t, "/CoLA.tsv:1: found byte 0xef, expected ASCII text"),
    ("CoLA.tsv", lambda t: None, "has no CoLA.tsv: found AX.tsv"),
]


@pytest.mark.parametrize(("name", "change", "message"), CHANGES)
@pytest.mark.parametrize("zipped", [False, True])
def test_the_check_names_file_found_and_expected(made, small, tmp_path, name, change, message, zipped):
    for file in OFFICIAL:
        shutil.copy(made / file, tmp_path / file)
    changed = change((tmp_path / name).read_bytes().decode())
    (tmp_path / name).unlink()
    if changed is not None:
        (tmp_path / name).write_bytes(changed.encode())
    path = tmp_path
    if zipped:
        path = tmp_path / "mine.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(tmp_path.glob("*.tsv")):
                archive.write(file, file.name)
    with pytest.raises(UserError, match=message):
        formats.validate(path)


def test_the_check_takes_a_zip_of_another_make_and_refuses_what_is_none(made, small, tmp_path):
    ours = formats.validate(made)
    theirs = tmp_path / "theirs.zip"
    with zipfile.ZipFile(theirs, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(OFFICIAL):
            archive.writestr(name, (made / name).read_text().removesuffix("\n"))
    assert formats.validate(theirs) == ours
    nested = tmp_path / "nested.zip"
    with zipfile.ZipFile(nested, "w") as archive:
        for name in OFFICIAL:
            archive.write(made / name, f"submission/{name}")
    assert "found submission/AX.tsv" in refused("--check", nested)
    with zipfile.ZipFile(theirs, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.write(made / "AX.tsv", "AX.tsv")
    assert "holds AX.tsv more than once" in refused("--check", theirs)
    assert "cannot be read as a zip" in refused("--check", made / "runs.json")
    assert "neither a folder nor a file" in refused("--check", tmp_path / "nowhere")
