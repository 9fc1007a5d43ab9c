"""A run is worked on by one process at a time, on one machine or several."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsam.runs import lease
from dsam.runs.lease import Busy, Lease
from dsam.runs.record import Record
from dsam.training.checkpoint import Checkpoints


def test_a_second_process_is_refused_and_told_who(tmp_path):
    with Lease(tmp_path), pytest.raises(Busy, match=f"process {os.getpid()} on "), Lease(tmp_path):
        raise AssertionError("entered twice")
    assert list(tmp_path.iterdir()) == []
    with Lease(tmp_path):
        pass


def test_a_process_that_is_gone_holds_nothing(tmp_path):
    code = f"import os; from dsam.runs.lease import Lease; Lease({str(tmp_path)!r}).__enter__(); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert lease.read(tmp_path / "lease.json")["pid"] != os.getpid()
    with Lease(tmp_path):
        assert lease.read(tmp_path / "lease.json")["pid"] == os.getpid()


@pytest.mark.parametrize("error", [None, PermissionError, ProcessLookupError])
def test_of_a_process_that_the_system_hides_the_age_decides(tmp_path, monkeypatch, error):
    """Another user's, where /proc hides those; any, where there is no /proc."""

    def signalled(pid, number):
        assert (pid, number) == (os.getpid(), 0)
        if error is not None:
            raise error

    with Lease(tmp_path) as held, monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", hides_processes)
        patched.setattr(os, "kill", signalled)
        there = error is not ProcessLookupError
        assert lease.alive(held.path) == there
        os.utime(held.path, (0, 0))
        assert not lease.alive(held.path)
    if error is None:  # its own record says that nothing could be told
        monkeypatch.setattr(Path, "read_text", hides_processes)
        with Lease(tmp_path) as held:
            assert json.loads(held.path.read_bytes())["began"] == lease.UNKNOWN
            assert lease.alive(held.path)
            os.utime(held.path, (0, 0))
            assert not lease.alive(held.path)


READ = Path.read_text


def hides_processes(path, **options):
    if path.match("/proc/[0-9]*/stat"):
        raise FileNotFoundError(path)
    return READ(path, **options)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_hard_links_has_leases_too(tmp_path, monkeypatch, number):
    def none(file, place):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", none)
    with Lease(tmp_path) as held:
        assert lease.alive(held.path)
        with pytest.raises(Busy, match=f"process {os.getpid()} on "), Lease(tmp_path):
            raise AssertionError("entered twice")
    assert list(tmp_path.iterdir()) == []
    old = elsewhere(tmp_path)
    os.utime(old, (0, 0))
    with Lease(tmp_path):
        assert lease.read(old)["pid"] == os.getpid()


def elsewhere(folder, **changes):
    """A lease as another machine has it."""
    path = folder / "lease.json"
    path.write_text(json.dumps({"token": "theirs", "host": "elsewhere", "pid": 1, "began": "5"} | changes))
    return path


@pytest.mark.parametrize("what", ["boot", "processes"])
def test_a_machine_or_container_of_the_same_name_is_another(tmp_path, what):
    """A number of a process means nothing there: its lease holds until it is old."""
    path = elsewhere(tmp_path, **lease.here() | {what: "another"})
    with pytest.raises(Busy):
        Lease(tmp_path).__enter__()
    old = path.stat().st_mtime - lease.EXPIRES - 1
    os.utime(path, (old, old))
    with Lease(tmp_path):
        pass
    elsewhere(tmp_path, host=lease.here()["host"])  # by code from before either was known
    with Lease(tmp_path):
        pass


def test_another_machines_lease_expires_by_the_file_systems_time(tmp_path, monkeypatch):
    path = elsewhere(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # whatever this machine's clock says
    with pytest.raises(Busy, match="process 1 on elsewhere"):
        Lease(tmp_path, expires=60).__enter__()
    old = path.stat().st_mtime - 61
    os.utime(path, (old, old))
    with Lease(tmp_path, expires=60):
        assert lease.read(path)["token"] != "theirs"


@pytest.mark.parametrize("failures, held", [(1, True), (9, False)])
def test_a_lease_that_a_network_mount_renews_meanwhile_is_held(tmp_path, monkeypatch, failures, held):
    path, stat, failed = elsewhere(tmp_path), Path.stat, []

    def stale(self, **how):
        if self == path and len(failed) < failures:
            failed.append(self)
            raise OSError(errno.ESTALE, "Stale file handle")
        return stat(self, **how)

    monkeypatch.setattr(Path, "stat", stale)
    assert lease.alive(path) is held


def test_a_held_lease_is_renewed(tmp_path):
    with Lease(tmp_path, renewed=0.05):
        path = tmp_path / "lease.json"
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert path.stat().st_mtime > 0


def test_a_lease_that_was_taken_over_is_not_removed_by_its_former_holder(tmp_path):
    with Lease(tmp_path):
        elsewhere(tmp_path)
    assert lease.read(tmp_path / "lease.json")["token"] == "theirs"


def test_where_no_lease_is_nothing_is_written_and_where_nothing_can_be_it_is_still_told(tmp_path, monkeypatch):
    def refuses(self, *arguments, **named):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:  # as root, for whom no folder is read-only
        patched.setattr(Path, "touch", refuses)
        assert not lease.alive(tmp_path / "lease.json")
        path = elsewhere(tmp_path)
        assert lease.alive(path)
        os.utime(path, (0, 0))
        assert not lease.alive(path)
    path.unlink()

    def full(self, text):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        Lease(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("done", [False, True])
def test_a_run_that_another_process_took_over_writes_no_more(tmp_path, done):
    record = Record(tmp_path)
    with record.worked_on():
        record.log({"step": 1})
    with Lease(tmp_path, renewed=0.02) as held:
        record._lease, checkpoints = held, Checkpoints(tmp_path / "checkpoint", record.require_held)
        path = elsewhere(tmp_path)
        if done:
            path.unlink()
        deadline = time.monotonic() + 10
        while not held.lost and time.monotonic() < deadline:
            time.sleep(0.02)
        for write in (lambda: record.log({"step": 2}), lambda: record.finish({}), lambda: checkpoints.save(2, {})):
            with pytest.raises(Busy, match="was taken over by another process"):
                write()
    assert record.metrics.read_text() == '{"step": 1}\n' and not checkpoints.folder.exists()


def contend(folder, rounds, entered):
    for _ in range(rounds):
        try:
            with Lease(folder, expires=60):
                with entered.get_lock():
                    entered.value += 1
                    assert entered.value == 1
                time.sleep(0.001)
                with entered.get_lock():
                    entered.value -= 1
        except Busy:
            time.sleep(0.001)


def test_many_that_find_it_expired_never_enter_together(tmp_path):
    path = elsewhere(tmp_path)
    os.utime(path, (0, 0))
    context = multiprocessing.get_context("fork")
    entered = context.Value("i", 0)
    workers = [context.Process(target=contend, args=(tmp_path, 60, entered)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".lease.expired")]
