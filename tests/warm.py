"""Commands in processes that are forked from one that has imported everything: each starts in milliseconds, where a
fresh interpreter needs four seconds of a processor for PyTorch and transformers alone.

A command finds what it finds in a fresh interpreter: its arguments, environment, folder, streams and signals, a
`__main__` of its own, no cache and no random state of another command; and it ends as an interpreter does. What it
starts by multiprocessing, as a sweep does its server, is forked from it by the same rules.

What only a fresh interpreter shows stays with the tests that say cold=True: an import that is missing, what a library
says while it is imported, another order of sets.

Run as a script, this is that process. It serves all of xdist's workers, for as long as lives what has started it.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = [
    *("dsam.command_line", "dsam.overrides", "dsam.runs.run", "dsam.runs.export", "dsam.runs.archive"),
    *("dsam.sweeps.sweep", "dsam.sweeps.choose", "dsam.sweeps.slurm", "dsam.results.report.make"),
    *("dsam.results.verify", "dsam.approximation.study", "dsam.approximation.summary", "dsam.approximation.times"),
    *("dsam.sharpness.measure", "dsam.submission.make", "dsam.benchmark", "hydra.main", "hydra._internal.hydra"),
    *("sklearn.metrics", "scipy.stats", "wandb", "transformers.models.bert.modeling_bert", "rich.progress"),
]
READ_AT_IMPORT = re.compile("PYTHON|LC_|LANG|HOME|XDG|HF_|HUGGING|TRANSFORMERS|TOKENIZERS|OMP|MKL|MPL|HYDRA")
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
STARTED_WITH = dict(os.environ)
ADDRESS = "DSAM_TESTS_WARM"  # the environment variable that holds it


def start_server() -> None:
    """Here, and for the processes started from here."""
    folder = tempfile.mkdtemp(prefix="dsam-warm-")
    os.environ[ADDRESS] = f"{folder}/socket"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.environ[ADDRESS])
    listener.listen(64)
    alive, _never_closed = os.pipe()
    given = listener.fileno(), alive
    subprocess.Popen([sys.executable, __file__, *map(str, given)], pass_fds=given, stdin=subprocess.DEVNULL)
    listener.close()
    os.close(alive)


class Command:
    """A command that was started; of subprocess.Popen what tests use.

    Args:
        target: a script's path, or "module:function", which is given the arguments.
        before: "module:function" to be called first, without arguments.
        session: whether it leads a session, and so a process group, of its own.
        unbuffered: as python -u.
    """

    def __init__(self, target, arguments, cwd, environment, before=None, session=False, unbuffered=False):
        changed = {name for name, _ in environment.items() ^ STARTED_WITH.items() if READ_AT_IMPORT.match(name)}
        assert not changed, f"read when modules are imported, and so too late: {changed}"
        self.args, self.returncode = [str(target), *arguments], None
        environment = {name: value for name, value in environment.items() if name != ADDRESS}
        asked = {"target": str(target), "arguments": arguments, "cwd": str(cwd), "environment": environment}
        asked |= {"before": before, "session": session, "unbuffered": unbuffered}
        pipes = [os.pipe() for _ in range(3)]
        with tempfile.TemporaryFile() as request, socket.socket(socket.AF_UNIX) as server:
            request.write(json.dumps(asked).encode())
            request.seek(0)
            server.connect(os.environ[ADDRESS])
            socket.send_fds(server, [b"!"], [request.fileno(), *(theirs for _, theirs in pipes)])
            for _, theirs in pipes:
                os.close(theirs)
        self._status, self.stdout, self.stderr = (os.fdopen(ours) for ours, _ in pipes)
        self.pid = int(self._status.readline())

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._status, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def communicate(self, timeout=None):
        said = {}
        readers = [
            threading.Thread(target=lambda s=stream: said.__setitem__(s, s.read()), daemon=True)
            for stream in (self.stdout, self.stderr)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(timeout)
        self.stdout.close()
        self.stderr.close()
        return said[self.stdout], said[self.stderr]

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


def call(name: str, *arguments):
    """(what "module:function" returns for these arguments, what it said to stderr), in a process of its own: for what
    starts processes by multiprocessing, which then are forked as well. All as JSON knows it."""
    process = Command("warm:answer", [name, *arguments], ROOT, os.environ)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), err


def leave_group() -> None:
    """Ends a rank of a gloo group as soon as all have come here. Without the destructors: now and then
    ~ProcessGroupGloo joins a thread for ever (PyTorch 2.13, seen in one of eight runs, a DDP model still alive)."""
    import torch.distributed

    torch.distributed.barrier()
    os._exit(0)


def answer(name: str, *arguments) -> None:
    print(json.dumps(called(name, *arguments)))


# What follows happens in the server and the processes forked from it.


def serve(listener: socket.socket, alive: int) -> tuple[dict, Exception | None]:
    """Forks a process for each request, and tells its exit status. Returns in each such process, with the request and
    with what was raised by the imports, if anything was."""
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which reaches a terminal's whole group
    signal.set_wakeup_fd(wake)
    children: dict[int, int] = {}
    with selectors.DefaultSelector() as selector:
        for readable in (listener, alive, woken):
            selector.register(readable, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if alive in ready:
                shutil.rmtree(Path(listener.getsockname()).parent)
                os._exit(0)
            if woken in ready:
                os.read(woken, 65536)
                for pid in list(children):
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        with contextlib.suppress(BrokenPipeError), os.fdopen(children.pop(pid), "w") as told:
                            print(os.waitstatus_to_exitcode(status), file=told)
            if listener in ready:
                with listener.accept()[0] as client:
                    _, (request, status, out, err), *_ = socket.recv_fds(client, 1, 4)
                failure = import_all()
                pid = os.fork()
                if pid == 0:
                    break
                children[pid] = status
                for descriptor in (request, out, err):
                    os.close(descriptor)
    # What tests started goes on no longer than they do, where these are killed.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    listener.close()
    for descriptor in (alive, woken, wake, *children.values()):
        os.close(descriptor)
    with os.fdopen(request) as stream:
        asked = json.load(stream)
    if asked["session"]:
        os.setsid()
    for descriptor, number in ((out, 1), (err, 2)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    with os.fdopen(status, "w") as told:
        print(os.getpid(), file=told)
    return asked, failure


@functools.cache
def import_all() -> Exception | None:
    """At the first request: who only runs tests of the methods does not wait for it."""
    try:
        for name in IMPORTED:
            importlib.import_module(name)
    except Exception as error:
        return error
    gc.collect()
    gc.freeze()  # what the collector never looks at stays shared
    return None


def as_started(argv: list[str]) -> dict:
    """Makes this process what an interpreter is that was started with these arguments; returns its `__main__`."""
    import numpy

    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    numpy.random.seed()  # as the standard library does by itself; torch's is always the same at first
    sys.argv, tempfile.tempdir = argv, None
    sys.modules["__main__"] = types.ModuleType("__main__")
    return sys.modules["__main__"].__dict__


def spawned(execute, path: str, arguments: list[str], keep: list[int]) -> int:
    """multiprocessing's way to start an interpreter, here by forking this process. `execute` really starts one."""
    import multiprocessing.forkserver
    import multiprocessing.util

    code, *more = arguments[arguments.index("-c") + 1 :]
    if "resource_tracker" in code:  # needs no import that takes time
        return execute(path, arguments, keep)
    if pid := os.fork():
        return pid
    with ending():
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        with open(os.devnull, "r+b") as null:  # over what an interpreter would not have: an object may still close it
            for descriptor in map(int, os.listdir("/dev/fd")):
                if descriptor not in (0, 1, 2, null.fileno(), *keep):
                    with contextlib.suppress(OSError):
                        os.fstat(descriptor)
                        os.dup2(null.fileno(), descriptor)
        atexit._clear()
        multiprocessing.util._finalizer_registry.clear()
        importlib.reload(multiprocessing.forkserver)
        exec(code, as_started(["-c", *more]))


@contextlib.contextmanager
def ending():
    """Ends this process after the block, as an interpreter ends, but for taking itself apart: a third of a second."""
    status, interrupted = 0, False
    try:
        yield
    except SystemExit as leaving:
        status = leaving.code
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        status, interrupted = 1, isinstance(error, KeyboardInterrupt)
    finally:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        if status is not None and not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            status = 120
        if interrupted:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit((status or 0) & 255)


def called(name: str, *arguments):
    """What the function "module:function" makes of `arguments`."""
    if str(ROOT) not in sys.path:  # as pytest has it for the tests themselves
        sys.path.insert(0, str(ROOT))
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)(*arguments)


def main() -> None:
    asked, failure = serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
    import multiprocessing.util

    with ending():
        if failure is not None:
            raise failure
        target, arguments = asked["target"], asked["arguments"]
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        if asked["unbuffered"]:
            sys.stdout.reconfigure(write_through=True)
        multiprocessing.util.spawnv_passfds = functools.partial(spawned, multiprocessing.util.spawnv_passfds)
        if asked["before"]:
            called(asked["before"])
        if ":" in target:
            as_started([target])
            called(target, *arguments)
        else:
            names = as_started([target, *arguments])
            names["__file__"], sys.path[0] = target, str(Path(target).parent)
            exec(compile(Path(target).read_bytes(), target, "exec"), names)


if __name__ == "__main__":
    main()
