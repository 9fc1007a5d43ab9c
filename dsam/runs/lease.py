"""Who is working on a run: a file in its folder that expires, so that no two processes do the same run at once."""

import contextlib
import errno
import functools
import json
import os
import platform
import threading
import time
import uuid
from pathlib import Path

from ..errors import UserError

EXPIRES = 120.0  # seconds without renewal; a process of this machine that is gone is noticed at once
RENEWED = 15.0  # seconds
UNKNOWN = "unknown"  # when a process began: then the lease's age decides


class Busy(UserError):
    """Another process is working on the run."""


class Lease:
    """A context manager that holds `<folder>/lease.json`.

    Ages are differences of the file system's own times, so that machines whose clocks disagree, or a clock that jumps,
    do not matter: a lease is as old as a file written now is younger than it.

    Raises Busy on entry where another process holds it. `lost`: another holds it since, as it may once this process
    was suspended for longer than the lease lasts.
    """

    def __init__(self, folder: Path, expires: float = EXPIRES, renewed: float = RENEWED):
        self.path, self.expires, self.renewed = path_in(folder), expires, renewed
        self.token = uuid.uuid4().hex
        self.lost = False

    def __enter__(self) -> "Lease":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mine = self.path.with_name(f".lease.{self.token}")
        try:
            mine.write_text(json.dumps({"token": self.token, **here(), **process(os.getpid())}))
            while True:
                try:
                    _put(mine, self.path)
                    break
                except FileExistsError:
                    holder = self._holder(mine)
                    if holder is not None:
                        raise Busy(
                            f"{self.path.parent} is being worked on by process {holder.get('pid')} on "
                            f"{holder.get('host')}; if that is gone, wait {self.expires:.0f} s"
                        ) from None
        finally:
            mine.unlink(missing_ok=True)
        self._over = threading.Event()
        threading.Thread(target=self._renew, daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self._over.set()
        if read(self.path).get("token") == self.token:
            self.path.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._over.wait(self.renewed):
            with contextlib.suppress(OSError):  # a full disk or a lost mount is not the lease's business
                holder = read(self.path).get("token")
                if holder == self.token:
                    os.utime(self.path)
                elif holder is not None or not self.path.exists():  # or it is with them already, and done
                    self.lost = True

    def _holder(self, now: Path) -> dict | None:
        """Who holds the lease; None, and the lease removed, where it has expired. `now`: a file to tell time by."""
        holder = read(self.path)
        if alive(self.path, self.expires, now):
            return holder
        # Only one of several that find it expired gets to move it away; and what was moved must be what was judged.
        aside = self.path.with_name(f".lease.expired.{self.token}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if read(aside).get("token") != holder.get("token"):  # another took it over in between
                with contextlib.suppress(FileExistsError):
                    _put(aside, self.path)
            aside.unlink(missing_ok=True)
        return None


def _put(file: Path, place: Path) -> None:
    """The file at that place as well, at once, also over NFS; where there are no hard links, a moment in which it is
    empty comes before. FileExistsError where there is one."""
    try:
        os.link(file, place)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        with place.open("x", encoding="utf-8") as there:  # no hard links (exFAT, mounted object stores)
            there.write(file.read_text(encoding="utf-8"))


def path_in(folder: Path) -> Path:
    return Path(folder) / "lease.json"


def alive(path: Path, expires: float = EXPIRES, now: Path | None = None) -> bool:
    """Whether the lease at `path` is held."""
    holder = read(path)
    if "pid" in holder and {name: holder.get(name, mine) for name, mine in here().items()} == here():
        began = process(holder["pid"]).get("began")
        if began is None:
            return False
        if UNKNOWN not in (began, holder.get("began")):
            return began == holder.get("began")
    renewed = _renewed(path)
    if renewed is None:
        return False
    return _now(now or path.with_name(f".lease.now.{uuid.uuid4().hex}"), keep=now is not None) - renewed < expires


def _renewed(path: Path) -> float | None:
    """When the lease was written last; None where there is none, or none that can be looked at."""
    for _ in range(3):
        try:
            return path.stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:  # over NFS: it was made anew meanwhile
            continue
    return None


def _now(file: Path, keep: bool) -> float:
    """The file system's time, by a file; this machine's where none can be written."""
    try:
        file.touch()
        return file.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        if not keep:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


@functools.cache
def here() -> dict:
    """What tells where a process number means something: machines, or containers of one, may share a name."""
    place = {"host": platform.node()}
    with contextlib.suppress(OSError):  # Linux only
        place["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place["processes"] = os.readlink("/proc/self/ns/pid")
    return place


def read(path: Path) -> dict:
    """A half-written or missing lease says nothing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def process(pid: int) -> dict:
    """{"pid", "began"}: `began` tells a process from a later one of the same number; absent where it is gone, UNKNOWN
    where the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # gone, or no /proc (macOS), or one that hides other users' processes
        with contextlib.suppress(ProcessLookupError):
            with contextlib.suppress(PermissionError):  # there, and another user's
                os.kill(pid, 0)
            return {"pid": pid, "began": UNKNOWN}
        return {"pid": pid}
    fields = stat.rpartition(")")[2].split()
    if fields[0] == "Z":
        return {"pid": pid}
    return {"pid": pid, "began": fields[19]}
