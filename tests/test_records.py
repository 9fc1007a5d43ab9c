"""`make pack` and `make unpack`: an experiment's records go through one committed file and come back as they were."""

import json
import re
import shlex
import shutil
import tempfile
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, command
from hypothesis import given, settings
from hypothesis import strategies as st

from dsam.errors import UserError
from dsam.runs import archive
from dsam.runs.record import Record

pytestmark = pytest.mark.slow


def a_sweep(runs, name="study", seeds=range(3), unfinished=()):
    """Run folders as a sweep leaves them, weights and all."""
    folders = [f"rte/tiny/sam/{seed:016x}" for seed in seeds]
    for seed, folder in zip(seeds, folders, strict=True):
        run = runs / folder
        (run / "best").mkdir(parents=True)
        (run / "best" / "model.safetensors").write_bytes(b"weights")
        (run / "config.yaml").write_text(f"seed: {seed}\n")
        (run / "metrics.jsonl").write_text('{"step": 10}\n')
        (run / "provenance.json").write_text("{}")
        if seed in unfinished:
            (run / "failure.json").write_text('{"reason": "out of memory"}')
        else:
            Record(run).finish({"id": folder[-16:], "score": seed, "name": "δ"})
    (runs / ".sweeps").mkdir(exist_ok=True)
    manifest = {"experiment": name, "runs": [{"folder": folder} for folder in folders]}
    (runs / ".sweeps" / f"{name}.json").write_text(json.dumps(manifest))
    return folders


def files(runs):
    return {str(p.relative_to(runs)): p.read_bytes() for p in runs.rglob("*") if p.is_file()}


def test_records_come_back_byte_for_byte_and_weights_stay_behind(tmp_path):
    runs, packed, back = tmp_path / "runs", tmp_path / "records" / "study.zip", tmp_path / "back"
    a_sweep(runs, unfinished=[2])
    assert archive.pack(runs, "study", packed)[:2] == (2, 1)
    assert archive.unpack(packed, back)[:2] == (2, 0)
    assert files(back) == {name: data for name, data in files(runs).items() if "best/" not in name}
    first = packed.read_bytes()
    shutil.copytree(back, tmp_path / "elsewhere")  # other times of the files
    archive.pack(tmp_path / "elsewhere", "study", packed)
    assert packed.read_bytes() == first


def test_no_folder_of_this_machine_is_packed(tmp_path):
    runs, packed = tmp_path / "my runs", tmp_path / "study.zip"
    one, two = a_sweep(runs, seeds=[0, 1], unfinished=[1])
    config = {
        "task": {"title": "and / or", "files": {"train": "RTE/train.tsv"}},
        "model": {"path": str(tmp_path / "my model"), "rho": 0.05, "id": "o/δ"},
        "data": {"root": "~/glue"},
        "paths": {"runs": str(runs), "tables": "results/tables"},
        "parent": {"model": {"path": str(tmp_path)}},
        "launcher": {"setup": [f"source {tmp_path}/env"]},
    }
    (runs / one / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    identity = {"options": {"prompt": str(tmp_path)}}  # hashed: as it is
    line = [f"{tmp_path}/experiments/train.py", f"model.path={tmp_path}/my m", "task=rte", "seed=range(0,2)", "~nope"]
    made = {"command": shlex.join(line), "device": "AMD", "identity": identity, "notes": ["about ~3 % of n/a / x"]}
    (runs / one / "provenance.json").write_text(json.dumps(made, indent=1) + "\n")
    (runs / two / "failure.json").write_text(json.dumps({"reason": f"OSError: no {tmp_path}/x", "log": str(runs)}))
    manifest = runs / ".sweeps" / "study.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_bytes()) | {"command": shlex.join(line)}))
    archive.pack(runs, "study", packed)
    archive.unpack(packed, tmp_path / "back")
    back = tmp_path / "back"
    config["model"]["path"] = config["parent"]["model"]["path"] = config["data"]["root"] = "DIR"
    config["paths"]["runs"], config["launcher"]["setup"] = "DIR", ["source DIR"]
    assert (back / one / "config.yaml").read_text() == yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    line[0], line[1] = "experiments/train.py", "model.path=DIR"
    assert json.loads((back / one / "provenance.json").read_text()) == made | {"command": shlex.join(line)}
    assert json.loads((back / two / "failure.json").read_text()) == {"reason": "OSError: no DIR", "log": "DIR"}
    assert json.loads((back / ".sweeps" / "study.json").read_text())["command"] == shlex.join(line)
    assert Record(back / one).result() == Record(runs / one).result() is not None
    once = packed.read_bytes()
    archive.pack(back, "study", packed)
    assert packed.read_bytes() == once


def test_runs_add_up_over_sweeps_of_one_name(tmp_path):
    packed = tmp_path / "study.zip"
    a_sweep(tmp_path / "monday", seeds=[0, 1])
    a_sweep(tmp_path / "tuesday", seeds=[1, 2])
    archive.pack(tmp_path / "monday", "study", packed)
    note = f"{packed} names 1 run of its own beside the 2 here; remove it first to pack these alone"
    assert archive.pack(tmp_path / "tuesday", "study", packed) == (3, 0, [note])
    archive.unpack(packed, tmp_path / "both")
    assert len(list((tmp_path / "both").glob("rte/tiny/sam/*/result.json"))) == 3
    named = [run["folder"][-1] for run in json.loads((tmp_path / "both/.sweeps/study.json").read_bytes())["runs"]]
    assert named == ["0", "1", "2"]
    first = packed.read_bytes()
    assert archive.pack(tmp_path / "both", "study", packed) == (3, 0, [])
    assert packed.read_bytes() == first


def test_what_the_parts_were_chosen_from_is_joined_too(tmp_path):
    packed, rows = tmp_path / "study.zip", {}
    for part, seed in (("monday", 0), ("tuesday", 1)):
        a_sweep(tmp_path / part, seeds=[seed])
        manifest = tmp_path / part / ".sweeps" / "study.json"
        cell = {"task": "rte", "model": part, "optimizer": "sam"}
        rows[part] = cell | {"settings": {"rho": 0.1}, "chosen": True}
        told = {"chosen": [rows[part]], "chosen_of": [part]}
        manifest.write_text(json.dumps(json.loads(manifest.read_bytes()) | told))
        archive.pack(tmp_path / part, "study", packed)
    assert archive.unlisted(packed, tmp_path / "tuesday") == 1
    archive.unpack(packed, tmp_path / "both")
    joined = json.loads((tmp_path / "both/.sweeps/study.json").read_bytes())
    assert joined["chosen"] == [rows["monday"], rows["tuesday"]] and joined["chosen_of"] == ["monday", "tuesday"]
    assert archive.unlisted(packed, tmp_path / "both") == 0

    wider = [rows["monday"] | {"chosen": False}, rows["monday"] | {"settings": {"rho": 0.2}}]
    a_sweep(tmp_path / "later", seeds=[2])
    manifest = tmp_path / "later" / ".sweeps" / "study.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_bytes()) | {"chosen": wider}))
    said = archive.pack(tmp_path / "later", "study", packed).notes
    assert f"{packed} keeps the runs of another choice for rte monday sam, which the one here replaces" in said
    archive.unpack(packed, tmp_path / "all")
    joined = json.loads((tmp_path / "all/.sweeps/study.json").read_bytes())
    assert joined["chosen"] == [rows["tuesday"], *wider] and joined["chosen_of"] == []


@pytest.mark.parametrize("here, after", [([0], [0, 1, 2]), ([0, 1, 2], [2, 1, 0]), ([0, 3], [0, 3])])
def test_unpacking_brings_the_sweep_that_names_more_runs(tmp_path, here, after):
    """The committed file of a study that went on replaces the sweep of an earlier one, and no other."""
    packed, there = tmp_path / "study.zip", tmp_path / "there"
    a_sweep(tmp_path / "whole", seeds=[0, 1, 2])
    archive.pack(tmp_path / "whole", "study", packed)
    a_sweep(there, seeds=here)
    manifest = there / ".sweeps" / "study.json"
    if len(here) == len(after):  # in their own order, to tell them from the file's
        folders = [f"rte/tiny/sam/{seed:016x}" for seed in after]
        manifest.write_text(json.dumps({"runs": [{"folder": folder} for folder in folders]}))
    archive.unpack(packed, there)
    found = [int(run["folder"].rsplit("/", 1)[1], 16) for run in json.loads(manifest.read_bytes())["runs"]]
    assert found == after


def test_unpacking_leaves_alone_what_is_there(tmp_path):
    runs, packed = tmp_path / "runs", tmp_path / "study.zip"
    one, two, three = a_sweep(runs)
    archive.pack(runs, "study", packed)
    Record(runs / one).finish({"id": one[-16:], "score": "mine"})
    (runs / two / "result.json").unlink()
    manifest = runs / ".sweeps" / "study.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_bytes()) | {"command": "mine"}))
    before = files(runs)
    assert archive.unpack(packed, runs)[:2] == (1, 2)
    after = files(runs)
    assert {name for name in after if after[name] != before.get(name)} == {f"{two}/result.json"}


def test_weights_of_an_attempt_here_are_not_left_beside_a_result_from_elsewhere(tmp_path):
    runs, packed = tmp_path / "runs", tmp_path / "study.zip"
    one, two, three = a_sweep(runs, unfinished=[2])
    archive.pack(runs, "study", packed)
    (runs / two / "result.json").unlink()
    for folder in (one, two, three):  # finished here, killed here, finished nowhere
        for weights in ("best", "at-25", "checkpoint"):
            (runs / folder / weights).mkdir(parents=True, exist_ok=True)
            (runs / folder / weights / "config.json").write_text("{}")
    assert archive.unpack(packed, runs)[:2] == (1, 1)
    left = [sorted(p.name for p in (runs / folder).iterdir() if p.is_dir()) for folder in (one, two, three)]
    assert left == [["at-25", "best", "checkpoint"], [], ["at-25", "best", "checkpoint"]]


def test_a_run_that_is_being_worked_on_or_came_no_further_is_left_alone(tmp_path):
    runs, packed = tmp_path / "runs", tmp_path / "study.zip"
    one, two, three = a_sweep(runs, unfinished=[2])
    archive.pack(runs, "study", packed)
    for folder in (one, two, three):
        (runs / folder / "result.json").unlink(missing_ok=True)
        (runs / folder / "metrics.jsonl").write_text("going on")
    with Record(runs / one).worked_on():
        assert archive.unpack(packed, runs)[:2] == (1, 1)
        assert (runs / one / "metrics.jsonl").read_text() == "going on" and not (runs / one / "result.json").exists()
    assert (runs / two / "result.json").exists()
    assert (runs / three / "metrics.jsonl").read_text() == "going on"


def test_packing_again_keeps_a_finished_run_and_forgets_why_it_failed_before(tmp_path):
    runs, packed = tmp_path / "runs", tmp_path / "study.zip"
    one, two, _ = a_sweep(runs, unfinished=[1])
    assert archive.pack(runs, "study", packed)[:2] == (2, 1)
    (runs / one / "result.json").unlink()  # begun anew here, and not finished
    (runs / two / "failure.json").unlink()
    Record(runs / two).finish({"id": two[-16:]})
    assert archive.pack(runs, "study", packed)[:2] == (3, 0)
    archive.unpack(packed, tmp_path / "back")
    assert (tmp_path / "back" / one / "result.json").exists()
    assert not (tmp_path / "back" / two / "failure.json").exists()


def test_packing_without_a_run_that_is_in_the_file_keeps_it(tmp_path):
    runs, packed = tmp_path / "runs", tmp_path / "study.zip"
    one, two, _ = a_sweep(runs, unfinished=[1])
    archive.pack(runs, "study", packed)
    before = packed.read_bytes()
    for folder in (one, two):
        shutil.rmtree(runs / folder)
    assert archive.pack(runs, "study", packed)[:2] == (2, 1)
    assert packed.read_bytes() == before


def test_packing_a_part_of_a_sweep_keeps_the_whole_one_and_says_so(tmp_path):
    """A sweep that was started again with one seed must not make what is committed a sweep of one."""
    packed = tmp_path / "study.zip"
    a_sweep(tmp_path / "whole", unfinished=[2])
    archive.pack(tmp_path / "whole", "study", packed)
    a_sweep(tmp_path / "part", seeds=[2])
    finished, missing, (note,) = archive.pack(tmp_path / "part", "study", packed)
    assert (finished, missing) == (3, 0)
    assert note.startswith(f"{packed} keeps its sweep of 3 runs, of which the one here has 1; remove it first")
    archive.unpack(packed, tmp_path / "back")
    assert len(json.loads((tmp_path / "back/.sweeps/study.json").read_bytes())["runs"]) == 3


@pytest.mark.parametrize("damage", [lambda text: "", lambda text: text[:20], lambda text: text.replace("1", "2")])
def test_a_damaged_result_is_neither_packed_nor_kept_beside_a_whole_one(tmp_path, capsys, damage):
    runs, packed = tmp_path / "runs", tmp_path / "study.zip"
    _, two, _ = a_sweep(runs)
    archive.pack(runs, "study", packed)
    whole, result = packed.read_bytes(), runs / two / "result.json"
    good = result.read_text()
    result.write_text(damage(good))
    finished, missing, (note,) = archive.pack(runs, "study", packed)
    assert (finished, missing, note) == (3, 0, f"{result} is damaged or was edited, and is not taken")
    assert packed.read_bytes() == whole
    fresh = tmp_path / "fresh.zip"
    assert archive.pack(runs, "study", fresh)[:2] == (2, 1)
    assert archive.unpack(packed, runs)[:2] == (1, 2)
    assert result.read_text() == good
    assert result.with_name("result.json.damaged").read_text() == damage(good)
    assert f"set aside as result.json.damaged; {packed} has it whole" in capsys.readouterr().out


def test_another_result_of_the_same_run_replaces_none_and_is_said(tmp_path):
    """A run that was trained twice: the committed result is neither lost to `pack` nor mistaken for the one here."""
    runs, packed = tmp_path / "runs", tmp_path / "study.zip"
    one, two, three = a_sweep(runs, unfinished=[2])
    archive.pack(runs, "study", packed)
    before = packed.read_bytes()
    assert archive.pack(runs, "study", packed).notes == [] and archive.unpack(packed, runs) == (0, 2, 0)
    Record(runs / one).finish({"id": one[-16:], "score": "again"})
    finished, missing, (note,) = archive.pack(runs, "study", packed)
    assert (finished, missing) == (2, 1) and packed.read_bytes() == before
    assert note.startswith(f"{packed} keeps its own result of 1 run that here has another; to pack those of here")
    assert archive.unpack(packed, runs) == (0, 2, 1)
    assert Record(runs / one).result()["score"] == "again"
    Record(runs / three).finish({"id": three[-16:], "score": 2})  # had none in the file
    assert archive.pack(runs, "study", packed)[:2] == (3, 0)


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)


@pytest.mark.parametrize(
    "name",
    [
        "../../outside/a/b/result.json",
        "/etc/a/b/c/result.json",
        "a/b/c/d/model.safetensors",
        "x.txt",
        "a/../b/c/result.json",
    ],
)
def test_an_archive_writes_nothing_that_is_no_record(tmp_path, name):
    zipped(tmp_path / "bad.zip", {"rte/tiny/sam/0/result.json": "{}", name: "x"})
    with pytest.raises(UserError, match="no run's record"):
        archive.unpack(tmp_path / "bad.zip", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_damaged_or_missing_archive_is_one_line(tmp_path):
    runs, packed = tmp_path / "runs", tmp_path / "study.zip"
    a_sweep(runs)
    archive.pack(runs, "study", packed)
    whole = packed.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:60] + b"\0\0\0\0\0\0" + whole[66:]):
        packed.write_bytes(damaged)
        with pytest.raises(UserError, match=r"study.zip cannot be read"):
            archive.unpack(packed, tmp_path / "new")
        with pytest.raises(UserError, match=r"study.zip cannot be read"):
            archive.pack(runs, "study", packed)  # and does not lose what may still be saved
        assert packed.read_bytes() == damaged
    with pytest.raises(UserError, match="no records at"):
        archive.unpack(tmp_path / "none.zip", tmp_path / "new")
    with pytest.raises(UserError, match="no sweep 'other'"):
        archive.pack(runs, "other", tmp_path / "other.zip")
    assert not (tmp_path / "other.zip").exists()


@given(place=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_a_flipped_byte_is_one_line_or_changes_nothing(place, bits):
    with tempfile.TemporaryDirectory() as scratch:
        runs, packed = Path(scratch, "runs"), Path(scratch, "study.zip")
        a_sweep(runs, seeds=range(1))
        archive.pack(runs, "study", packed)
        data = bytearray(packed.read_bytes())
        data[int(place * len(data))] ^= bits
        packed.write_bytes(data)
        try:
            archive.unpack(packed, Path(scratch, "new"))
        except UserError:
            return
        originals = set(files(runs).values())
        assert all(contents in originals for contents in files(Path(scratch, "new")).values())


def test_the_command_line(tmp_path):
    a_sweep(tmp_path / "runs", name="smoke")
    places = [f"paths.runs={tmp_path}/runs", f"paths.records={tmp_path}/records"]
    done = command("pack", "experiment=smoke", *places, script="records.py")
    assert done.returncode == 0 and "smoke.zip: 3 runs" in done.stdout and "0 of the sweep" in done.stdout
    Record(next((tmp_path / "runs").glob("rte/*/*/*0"))).finish({"id": f"{0:016x}", "score": "again"})
    done = command("unpack", "experiment=smoke", *places, script="records.py")
    assert done.returncode == 0 and "0 runs written" in done.stdout and "3 were there" in done.stdout
    assert "note: 1 of these has another result here than in the file" in done.stdout
    shutil.rmtree(tmp_path / "runs")
    done = command("unpack", "experiment=smoke", *places, script="records.py")
    assert done.returncode == 0 and "3 runs written" in done.stdout and "0 were there" in done.stdout
    assert "note" not in done.stdout
    for wrong, said in (
        (["pakc"], "takes pack or unpack"),
        ([], "takes pack or unpack"),
        (["pack", "experiment=smok"], "smoke"),
    ):
        done = command(*wrong, *places[:1], script="records.py")
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_no_committed_file_of_records_names_a_place_on_a_machine():
    files = sorted((ROOT / "results" / "records").glob("*.zip"))
    assert files
    for file in files:
        with zipfile.ZipFile(file) as packed:
            for name in packed.namelist():
                assert not re.search(rb"(?<![\w.)/:])[/~]/?\w+/\w", packed.read(name)), f"{file.name}: {name}"
