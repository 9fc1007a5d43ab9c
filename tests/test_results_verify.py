"""`make verify` on runs that were really trained: nothing differs, and each kind of tampering is one line."""

import hashlib
import json
import shutil

import pytest
from test_results_collect import finish, plan

from dsam import command_line
from dsam.config import CONF, Config, Launcher
from dsam.errors import UserError
from dsam.overrides import compose_config
from dsam.results import verify
from dsam.results.collect import collect
from dsam.results.report import make as report
from dsam.results.tables import build as tables
from dsam.runs import archive, manifest
from dsam.runs.record import seal
from dsam.sweeps import sweep
from dsam.training import model as models

pytestmark = pytest.mark.slow


def write(folder):
    frame = collect(folder / "runs", "sweep")
    report.write_tables(tables.build(frame), frame, "sweep", folder / "runs", folder / "tables" / "sweep")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of a few steps, and their tables."""
    folder = tmp_path_factory.mktemp("trained")
    places = [f"paths.{name}={folder}/{name}" for name in ("runs", "cache")]
    short = ["task=agreement", "tracking=disabled", "train.max_steps=2", "train.max_train_examples=64", *places]
    runs = sweep.plan([Config.load(compose_config([f"optimizer={o}", *short], CONF)) for o in ("adamw", "sam")])
    manifest.write([r.config for r in runs], [r.identity for r in runs], "sweep", "train.py")
    assert sweep.run_all(runs, Launcher()) == []
    write(folder)
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    for name in ("runs", "tables"):
        shutil.copytree(trained / name, tmp_path / name)
    return tmp_path


def found(folder, rerun=0, **places):
    """(the lines that are as they should be, those that aren't)"""
    again = verify.Again(rerun, 0, str(folder / "cache"), places)
    lines = list(verify.check("sweep", folder / "runs", folder / "tables", again))
    return [line for fine, line in lines if fine], [line for fine, line in lines if not fine]


def test_records_of_another_experiment_are_named(copied):
    archive.pack(copied / "runs", "sweep", copied / "records" / "mine.zip")
    shutil.copytree(copied / "tables" / "sweep", copied / "tables" / "mine")
    with pytest.raises(UserError, match="mine.zip has the runs of sweep, and not of 'mine'"):
        again = verify.Again(0, 0, str(copied / "cache"))
        list(verify.check("mine", copied / "none", copied / "tables", again, copied / "records"))


def a_run(folder, method="sam"):
    return sorted((folder / "runs").glob(f"agreement/tiny/{method}/*/result.json"))[0]


def test_what_was_left_alone_verifies_and_trains_to_the_same_weights(trained, capsys):
    places = [f"paths.{name}={trained}/{name}" for name in ("runs", "tables", "cache")]
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    command_line.verify([*places, "--rerun", "1"])
    said = capsys.readouterr().out
    assert "2 results: none was edited" in said and "byte for byte" in said
    assert "run again, it has the same weights and scores" in said and said.endswith("nothing differs\n")
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before  # it changed nothing


def test_without_run_folders_the_packed_records_are_checked(copied, capsys):
    places = [f"paths.{name}={copied}/{name}" for name in ("runs", "tables", "cache", "records")]
    command_line.records(["pack", *places])
    shutil.rmtree(copied / "runs")
    capsys.readouterr()
    command_line.verify([*places, "--rerun", "1"])
    said = capsys.readouterr().out
    assert "the 2 of" in said and "byte for byte" in said and "has the same weights and scores" in said
    assert said.endswith("nothing differs\n") and not (copied / "runs").exists()
    main = copied / "tables" / "sweep" / "cost.csv"
    main.write_text(main.read_text().replace("adamw", "adamv", 1))
    with pytest.raises(SystemExit):
        command_line.verify([*places, "--rerun", "0"])
    assert "differs: " in capsys.readouterr().out


def test_a_difference_leaves_with_status_1(copied, capsys):
    (copied / "tables" / "sweep" / "cost.csv").unlink()
    with pytest.raises(SystemExit) as left:
        command_line.verify([f"paths.runs={copied}/runs", f"paths.tables={copied}/tables", "--rerun", "0"])
    said = capsys.readouterr().out.splitlines()
    assert left.value.code == 1 and said[-1] == "1 differences"
    assert [line for line in said if line.startswith("differs: ")] == [
        f"differs: {copied}/tables/sweep: cost.csv is missing"
    ]


def test_an_edited_table_is_named_with_its_cell(copied):
    main = copied / "tables" / "sweep" / "main.csv"
    head, first, *rest = main.read_text().splitlines()
    assert first.startswith("tiny,adamw,")
    cells = dict(zip(head.split(","), first.split(","), strict=True))
    right = cells["agreement mean"]
    main.write_text("\n".join([head, first.replace(right, "0.99"), *rest]) + "\n")
    (line,) = found(copied)[1]
    assert line.endswith(f"main.csv, tiny, adamw, agreement mean: '0.99' there, '{right}' from the runs")


def test_other_edits_of_the_tables_are_one_line_each(copied):
    folder = copied / "tables" / "sweep"
    (folder / "main.tex").write_text((folder / "main.tex").read_text().replace(r"\toprule", r"\hline"))
    (folder / "cost.md").unlink()
    (folder / "old.csv").write_text("a\n1\n")
    lines = "\n".join(sorted(line.split(": ", 1)[1] for line in found(copied)[1]))
    assert lines.startswith("cost.md is missing\nmain.tex, line ") and len(lines.splitlines()) == 3
    assert lines.endswith("old.csv does not come from these runs") and "hline" in lines


def test_an_edited_result_is_found_sealed_anew_or_not(copied):
    path = a_run(copied)
    result = json.loads(path.read_text())
    result["best"]["score"] = 0.987654
    path.write_text(json.dumps(result))
    wrong = found(copied)[1]
    assert f"{path.parent.relative_to(copied / 'runs')}: result.json was edited" in wrong
    path.write_text(json.dumps(result | {"result_sha256": seal(result)}))
    assert any("0.987654" in line for line in found(copied)[1])  # in cells.csv or main.csv
    write(copied)
    assert found(copied)[1] == []  # whoever forges result and tables alike ...
    result["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(result | {"result_sha256": seal(result)}))
    again = [line for line in found(copied, rerun=2)[1] if "run again" in line]
    assert len(again) == 1 and "other weights_sha256" in again[0]  # ... is found by running it again


def test_a_run_is_named_by_its_configuration(copied):
    path = a_run(copied).with_name("config.yaml")
    path.write_text(path.read_text().replace("weight_decay: 0.01", "weight_decay: 0.02"))
    (line,) = found(copied)[1]
    assert "config.yaml has train" in line and "'weight_decay': 0.02" in line
    provenance = path.with_name("provenance.json")
    content = json.loads(provenance.read_text())
    canonical = json.dumps(content["identity"], sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest()[:16] == path.parent.name
    content["identity"]["train"]["weight_decay"] = 0.02
    provenance.write_text(json.dumps(content))
    assert any(f"is named {path.parent.name}, and its configuration is" in line for line in found(copied)[1])


def test_on_another_machine_scores_are_compared_and_bits_may_differ(copied):
    path = a_run(copied)
    for run in (copied / "runs").glob("*/*/*/*/provenance.json"):
        run.write_text(json.dumps(json.loads(run.read_text()) | {"platform": "Elsewhere"}))
    result = json.loads(path.read_text()) | {"weights_sha256": "0" * 64}
    path.write_text(json.dumps(result | {"result_sha256": seal(result)}))
    right, wrong = found(copied, rerun=2)
    again = [line for line in right if "run again" in line]
    assert len(again) == 2 and sum("other bits, as may be" in line for line in again) == 1
    assert all("made with another platform" in line for line in again)
    assert all("README.md" in line for line in wrong)  # which says the platform
    result["best"]["score"] += 0.1
    path.write_text(json.dumps(result | {"result_sha256": seal(result)}))
    assert any("made with another platform" in line for line in found(copied, rerun=2)[1])


def test_a_fresh_clone_checks_what_follows_from_the_cells(copied):
    shutil.rmtree(copied / "runs")
    right, wrong = found(copied)
    assert wrong == [] and "only what follows from cells.csv" in right[0] and len(right) == 4
    cells = copied / "tables" / "sweep" / "cells.csv"
    head, *rows = cells.read_text().splitlines()
    rows[0] = rows[0].rsplit(",", 1)[0] + ",0.99"
    cells.write_text("\n".join([head, *rows]) + "\n")
    wrong = found(copied)[1]
    assert any("main.csv, tiny, adamw, agreement mean" in line for line in wrong) and len(wrong) == 3


def test_pairs_on_two_machines_are_no_difference_to_the_cells(tmp_path):
    """Which they are cells.csv does not know; what of it cannot be read is one line."""
    for method in ("adamw", "sam", "dsam"):
        for seed in (0, 1):
            one = plan("rte", "tiny", method, seed)
            made = finish(tmp_path / "runs", one, best=0.6 + 0.01 * seed).with_name("provenance.json")
            made.write_text(json.dumps({"device": "H100" if method == "sam" else "EPYC"}))
    frame = collect(tmp_path / "runs")
    folder = tmp_path / "tables" / "sweep"
    report.write_tables(tables.build(frame), frame, "sweep", tmp_path / "runs", folder)
    assert "True" in (folder / "pairwise.csv").read_text()
    right, wrong = found(tmp_path)
    assert wrong == [] and sum("pairwise.csv: 6 rows" in line for line in right) == 1
    whole = (folder / "pairwise.csv").read_text()
    (folder / "pairwise.csv").write_text(whole.replace("tiny,sam,dsam,0.0", "tiny,sam,dsam,0.1", 1))
    assert [line.split("pairwise.csv, ")[1].split(":")[0] for line in found(tmp_path)[1]] == [
        "tiny, sam, dsam, difference"
    ]
    (folder / "pairwise.csv").write_text(whole)
    cells = (folder / "cells.csv").read_text()
    for old, new in ((",0.6", ",abc"), ("tiny,rte,adamw,0", "tiny,rte,adamw,x"), ("seed", "sead"), ("score", "skore")):
        (folder / "cells.csv").write_text(cells.replace(old, new))
        (line,) = found(tmp_path)[1]
        assert "cells.csv cannot be read: " in line and "\n" not in line


def test_a_rerun_that_would_be_another_run_says_why(copied):
    provenance = a_run(copied).with_name("provenance.json")
    config = provenance.with_name("config.yaml")
    config.write_text(config.read_text().replace("max_steps: 2", "max_steps: 3"))
    wrong = found(copied, rerun=2)[1]
    assert any("with this code and data it is another run: train" in line for line in wrong)


def test_a_run_of_another_machine_is_made_again_with_data_and_model_where_they_are_here(tmp_path):
    """By their bytes they are the same: the run has its name, and its weights."""
    model, data = tmp_path / "model", tmp_path / "data"
    tiny = Config.load(compose_config(["task=agreement"], CONF))
    tokenizer = models.load_tokenizer(tiny.model)
    models.save(models.build(tiny, 2, tokenizer), tokenizer, model)
    (data / "RTE").mkdir(parents=True)
    rows = [f"{k}\tthe cat sees the dog\tthe dog is seen\t{('entailment', 'not_entailment')[k % 2]}" for k in range(8)]
    for split in ("train", "dev"):
        (data / "RTE" / f"{split}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    given = ["task=rte", "model=encoder", f"model.path={model}", "data=local", f"data.root={data}"]
    given += ["tracking=disabled", "train.max_steps=1", f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache"]
    runs = sweep.plan([Config.load(compose_config(given, CONF))])
    manifest.write([r.config for r in runs], [r.identity for r in runs], "sweep", "train.py")
    assert sweep.run_all(runs, Launcher()) == []
    write(tmp_path)
    for place in (model, data):
        place.rename(place.with_name(f"{place.name} here"))
    (line,) = found(tmp_path, rerun=1)[1]
    assert "cannot be run again" in line and "data.root=DIR and model.path=DIR say where they are here" in line
    here = {"data.root": f"{data} here", "model.path": f"{model} here"}
    right, wrong = found(tmp_path, rerun=1, **here)
    assert wrong == [] and "the same weights and scores" in right[-1]


def test_a_finished_run_without_a_score_is_compared(copied):
    """As a correlation is that was undefined at every evaluation."""
    path = a_run(copied)
    other = copied / "other" / path.parent.name
    result = json.loads(path.read_text()) | {"best": None}
    shutil.copytree(path.parent, other)
    for place in (path.parent, other):
        (place / "result.json").write_text(json.dumps(result))
    assert verify._compared(path.parent, other) == (
        True, f"{'/'.join(path.parent.parts[-4:])}: run again, it has the same weights and scores (none)"
    )  # fmt: skip


def test_nothing_to_verify_is_a_mistake_that_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="make paper EXPERIMENT=sweep"):
        found(tmp_path)
