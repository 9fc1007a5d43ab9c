"""The process that runs are forked from: it has imported torch and transformers and done nothing else, so that a run
starts at once and inherits no state. A sweep's own process takes PyTorch alone, to check the methods' options."""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess

from ..errors import UserError
from ..output import reader_may_leave

GONE = 255  # multiprocessing's exit code of a process whose server went before it, so that nobody knows its own
PATIENCE = [0.01, 0.1, 1.0, 5.0]  # seconds, between one server's end, which takes a while, and the next
OVER_AND_OVER = "the process that others are forked from is killed again and again, probably for want of memory"
PRELOADED = ["dsam.runs.run", "sklearn.metrics", "scipy.stats", "wandb", "dsam.sweeps.imported"]


class Killed(Exception):
    """The process was killed before it had an answer."""


def warm() -> None:
    """Has the server begin with its imports, which take seconds, while this process goes on."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # before the server starts, which keeps its environment
    resource_tracker.ensure_running()  # unblocks SIGINT when it starts, as the server otherwise would have it do
    try:
        with _deaf():
            forkserver.ensure_running()
    except OSError as error:
        raise UserError(
            f"no socket can be made in {tempfile.gettempdir()}, by which a sweep's processes find each other: {error}; "
            "set TMPDIR to another folder, of a short path, such as /tmp"
        ) from None


@contextlib.contextmanager
def _deaf():
    """Inside, Ctrl-C waits; processes that are started, and what they fork, inherit that."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def start(function: Callable, *arguments, daemon: bool = False) -> BaseProcess:
    """`function(*arguments)` in a process forked from the server. It is deaf to Ctrl-C, which reaches a terminal's
    whole group, and gets SIGTERM when this process, or the server, goes. This process waits for it before it ends, but
    for a daemon, which gets SIGTERM then. Raises Killed."""
    waits = iter(PATIENCE)
    while True:
        warm()  # again, should it be gone
        with _deaf():
            process = multiprocessing.get_context("forkserver").Process(
                target=_body, args=(function, arguments), daemon=daemon
            )
            try:
                process.start()
                return process
            except (EOFError, ConnectionError):  # it has been killed, and is not gone yet or went just now
                seconds = next(waits, None)
        if seconds is None:
            raise Killed(OVER_AND_OVER)
        time.sleep(seconds)


def call(function: Callable, *arguments):
    """What `function(*arguments)` returns or raises, from a process as `start` makes them. Raises Killed."""
    ours, theirs = multiprocessing.get_context("forkserver").Pipe(duplex=False)
    process = start(_answer, theirs, function, arguments, daemon=True)  # so that Ctrl-C just here leaves none
    theirs.close()
    try:
        fine, answer = ours.recv()
    except EOFError:
        raise Killed(f"{function.__name__} was killed, probably for want of memory") from None
    finally:
        process.terminate()
        process.join()
        ours.close()
    if fine:
        return answer
    raise answer


def _body(function: Callable, arguments: tuple) -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    threading.Thread(target=_end_with_caller, daemon=True).start()
    function(*arguments)


def _end_with_caller() -> None:
    """The server lives as long as one of its processes does: that it is there says nothing of who started them."""
    caller = multiprocessing.parent_process()
    assert caller is not None
    multiprocessing.connection.wait([caller.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _answer(pipe, function: Callable, arguments: tuple) -> None:
    try:
        with reader_may_leave():  # what is printed is not lost where the caller then ends this process
            answer = True, function(*arguments)
    except Exception as error:
        error.add_note(traceback.format_exc())  # tracebacks do not travel
        answer = False, error
    try:
        pickle.loads(pickle.dumps(answer))
    except Exception as error:  # whatever the exceptions of other libraries do when they are copied
        answer = False, RuntimeError(f"{answer[1]!r}, which cannot be sent: {error!r}")
    pipe.send(answer)
