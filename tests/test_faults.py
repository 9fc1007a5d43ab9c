"""A full disk, a read-only folder, damaged files, an old cache: said in one line, and nothing finished is lost."""

import json
import re
import subprocess

import pytest
from conftest import command
from test_command_line import log_lines, results, without_clock

from dsam.runs.record import Record

pytestmark = pytest.mark.slow

ARGUMENTS = ["train.max_steps=12", "tracking=disabled", "checkpoint.every_seconds=0"]


@pytest.fixture
def disk(tmp_path):
    """A small file system, and a function that remounts it otherwise."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"mounting a file system is not allowed here: {made.stderr.strip()}")
    try:
        yield folder, lambda how: subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def folders(root):
    return sorted(p.parent for p in root.glob("*/*/*/*/config.yaml"))


def test_a_full_disk_stops_a_run_with_one_line_and_it_goes_on_once_there_is_space(disk, tmp_path):
    folder, remount = disk
    cache = f"paths.cache={tmp_path}/cache"
    remount("size=64m")
    assert command(*ARGUMENTS, cache, f"paths.runs={folder}/runs", "seed=1").returncode == 0
    finished = next((folder / "runs").rglob("result.json"))
    used = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    one = command(
        *ARGUMENTS, cache, f"paths.runs={tmp_path}/size", "train.max_steps=12", "checkpoint.keep_weights=true"
    )
    assert one.returncode == 0
    weights = next((tmp_path / "size").rglob("last/model.safetensors")).stat().st_size
    remount(
        f"size={used + 3 * weights + 3 * weights // 2 + 400_000}"
    )  # one checkpoint (weights and two moments) and a half

    full = command(*ARGUMENTS, cache, f"paths.runs={folder}/runs")
    assert full.returncode == 1
    assert re.fullmatch(r"failed: OSError: .*([Nn]o space left|could not be written).*\n", full.stderr), full.stderr
    (broken,) = set(folders(folder / "runs")) - {finished.parent}
    assert list((broken / "checkpoint").glob("*.pt"))
    assert without_clock(json.loads(finished.read_text()))["status"] == "finished"

    remount("size=64m")
    again = command(*ARGUMENTS, cache, f"paths.runs={folder}/runs")
    assert again.returncode == 0, again.stderr
    undisturbed = command(*ARGUMENTS, cache, f"paths.runs={tmp_path}/undisturbed")
    assert undisturbed.returncode == 0
    (other,) = folders(tmp_path / "undisturbed")
    assert log_lines(broken) == log_lines(other)
    assert without_clock(json.loads((broken / "result.json").read_text())) == without_clock(
        json.loads((other / "result.json").read_text())
    )


def test_a_sweep_on_a_full_disk_names_every_run_and_loses_none(disk, tmp_path):
    folder, remount = disk
    arguments = ["-m", *ARGUMENTS, f"paths.cache={tmp_path}/cache", f"paths.runs={folder}/runs", "seed=0,1"]
    full = command(*arguments)
    assert full.returncode in (1, 2)
    assert "Traceback" not in full.stdout + full.stderr
    assert "space" in full.stderr
    remount("size=64m")
    assert command(*arguments).returncode == 0
    assert len(results(folder / "runs")) == 2


def test_a_read_only_folder_is_a_mistake_in_one_line(disk, tmp_path):
    folder, remount = disk
    remount("ro")
    try:
        for arguments in ([], ["-m", "seed=0,1"]):
            done = command(*arguments, *ARGUMENTS, f"paths.cache={tmp_path}/cache", f"paths.runs={folder}/runs")
            assert done.returncode == 2
            assert re.fullmatch(rf"error: cannot write .*{folder}/runs.*: Read-only file system; .*\n", done.stderr)
        done = command(*ARGUMENTS, f"paths.cache={folder}/cache", f"paths.runs={tmp_path}/runs")
        assert done.returncode in (0, 2)
        assert "Traceback" not in done.stderr
    finally:
        remount("rw")


DAMAGE = [
    lambda text: "",
    lambda text: text.replace('"status": "finished"', '"status": "done"'),
    lambda text: re.sub(r'"id": "\w+"', '"id": "0123456789abcdef"', text),
    lambda text: "[]",
    lambda text: re.sub(r'"score": [\d.e-]+', '"score": 0.99', text),
    lambda text: re.sub(r'\n "result_sha256": "\w+"', "", text).replace("],\n}", "]\n}"),
    lambda text: text[: len(text) // 2],
]


def test_a_damaged_or_edited_result_is_set_aside_and_done_again(paths, tmp_path, capsys):
    assert command(*ARGUMENTS, *paths).returncode == 0
    path = next((tmp_path / "runs").rglob("result.json"))
    whole = path.read_text()
    assert Record(path.parent).result()["status"] == "finished"
    for damage in DAMAGE:
        assert damage(whole) != whole
        path.write_text(damage(whole))
        assert Record(path.parent).result() is None
        assert re.search(
            rf"{path} .+: set aside as result.json.damaged; the run is done again", capsys.readouterr().out
        )
        assert path.with_name("result.json.damaged").read_text() == damage(whole)
        assert not path.exists()
    again = command(*ARGUMENTS, *paths)
    assert again.returncode == 0, again.stderr
    assert without_clock(json.loads(path.read_text())) == without_clock(json.loads(whole))


def test_a_cache_of_another_version_is_made_anew(tmp_path):
    paths = [f"paths.{name}={tmp_path}/{name}" for name in ("runs", "cache")]
    assert command(*ARGUMENTS, *paths).returncode == 0
    before = {p: p.read_bytes() for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.stat().st_size}
    assert before
    for p in before:
        p.write_bytes(b"of a later version")
    done = command(*ARGUMENTS, *paths, "seed=1")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert all(p.exists() and p.read_bytes() != b"of a later version" for p in before)
