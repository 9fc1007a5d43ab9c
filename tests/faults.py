"""What tests make go wrong: given to a command as `before`, each function changes this process and those that are
forked from it. Runs of the seeds 101 to 106 then meet the ends that a run can meet:

101 killed by the kernel (SIGKILL), the first time or, after `kills_always`, each time
102 segmentation fault
103 os._exit(7)
104 an exception
105 a hang, deaf to SIGTERM
106 memory without end
"""

import ctypes
import functools
import os
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import torch
from joblib.externals import loky

from dsam.config import Config
from dsam.errors import OutOfMemory, Stopped, UserError
from dsam.runs import provenance, record, run
from dsam.sweeps import server, sweep
from dsam.training import loop


def ends_of_runs(always: bool = False) -> None:
    fine_tune = loop.fine_tune

    def fails(config, task, data, model, method, device, checkpoints, **options):
        folder = Path(checkpoints.folder).parent
        print("slot", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
        if config.seed == 101 and (always or not (folder / "killed-before").exists()):
            (folder / "killed-before").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if config.seed == 102:
            ctypes.string_at(0)
        if config.seed == 103:
            os._exit(7)
        if config.seed == 104:
            raise ValueError("a loss of patience")
        if config.seed == 105:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(3600)
        if config.seed == 106:
            held = []
            while True:
                held.append(bytearray(os.urandom(1) * 50_000_000))
                time.sleep(0.02)
        return fine_tune(config, task, data, model, method, device, checkpoints, **options)

    run.fine_tune = loop.fine_tune = fails
    sweep.GRACE = 0.5


def kills_always() -> None:
    ends_of_runs(always=True)


def kills_loading() -> None:
    """The process that loads data and models before a sweep's runs."""
    loop.total_steps = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def kills_servers() -> None:
    """The process that runs are forked from, and each that takes its place, once data and models are loaded."""
    warm, survey, server.PATIENCE = server.warm, sweep._survey, [0.1, 0.1]

    def loaded(configs):
        costs = server_call(survey, configs)
        server.warm = killed
        return costs

    def killed():
        vars(forkserver._forkserver).pop("ensure_running", None)
        warm()
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
        forkserver._forkserver.ensure_running = lambda: None  # which would replace one that is gone at once

    server_call, server.call = server.call, lambda _, configs: loaded(configs)


def calls_between_kills(kills: int) -> list[int]:
    answers = [server.call(abs, -1)]
    for number in range(kills):
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
        answers.append(server.call(abs, -2 - number))
    return answers


class Odd(Exception):
    def __init__(self, one, other):
        super().__init__(one)


def _odd():
    raise Odd("one", "other")


def _raises(error):
    raise error


def answers_of_the_server() -> list:
    answers = []
    for asked in (
        (divmod, 7, 3),
        (_raises, UserError("no such thing")),
        (_raises, Stopped(signal.SIGTERM)),
        (_odd,),
        (os._exit, 1),
    ):
        try:
            answers.append(server.call(*asked))
        except Exception as error:
            answers.append(f"{type(error).__name__}: {error}")
    return answers


def code_differs() -> None:
    """From the last commit, whatever is true of this checkout."""
    provenance.git = lambda: {"commit": "0" * 40, "dirty": True, "repository": None}


def loading_takes_long() -> None:
    def loading(*_) -> None:
        print("loading", flush=True)
        time.sleep(3600)

    loop.total_steps = loading


def memory_for_one() -> None:
    """A device on which one run has room: a second one that starts beside it has none."""
    train = run._train

    def needs_it_all(config, identity, folder, ready):
        room = Path(config.paths.cache) / f"room-{os.environ.get('CUDA_VISIBLE_DEVICES')}"
        try:
            room.mkdir()
        except FileExistsError:
            raise OutOfMemory("the device is out of memory") from None
        try:
            time.sleep(1)
            return train(config, identity, folder, ready)
        finally:
            room.rmdir()

    run._train = needs_it_all


def three_fit() -> None:
    """GPUs of 10 GB, of which one run has 3 in use, beside 8 CPU cores. A run's log says how many it found there."""
    _gpus_of_ten_gigabytes(3)


def two_fit() -> None:
    """As `three_fit`, but the third at once finds no memory."""
    _gpus_of_ten_gigabytes(2)


def _gpus_of_ten_gigabytes(holds: int) -> None:
    train = run._train
    run.memory_in_use = lambda device: {"in_use": 3_000_000_000, "total": 10_000_000_000}
    loky.cpu_count = lambda: 8

    def beside(config, identity, folder, ready):
        here = Path(config.paths.runs) / f"device-{os.environ['CUDA_VISIBLE_DEVICES']}"
        here.mkdir(parents=True, exist_ok=True)
        mine = here / str(os.getpid())
        mine.touch()
        try:
            found = len(list(here.iterdir())) - 1
            print("beside", found, "threads", torch.get_num_threads(), flush=True)
            if found >= holds:
                raise OutOfMemory("the device is out of memory")
            time.sleep(1)
            return train(config, identity, folder, ready)
        finally:
            mine.unlink()

    run._train = beside


def says_in_passing() -> None:
    server.call(print, "said in passing")


def forgets_dsam() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("dsam", "hydra_plugins")]:
        del sys.modules[name]


def run_that_dies(config: dict, where: str, n: int) -> None:
    """A run that dies of SIGKILL at its n-th passage of `where`, in the middle of what is done there; "beside": at its
    n-th step from where its first checkpoint is half written."""
    passed = 0

    def passes(name, first=lambda *arguments: None):
        def around(function):
            @functools.wraps(function)  # the scheduler looks at what the optimizer's step wraps
            def wrapped(*arguments, **options):
                nonlocal passed
                passed += where == name
                if where == name and passed == n:
                    first(*arguments)
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return wrapped

        return around

    def half_a_checkpoint(state, stream):
        stream.write(b"half a checkpoint" * 100)
        stream.flush()

    def half_and_no_more(state, stream):
        nonlocal where
        half_a_checkpoint(state, stream)
        where = "step"
        time.sleep(60)

    def half_a_line(self, line):
        with self.metrics.open("a") as stream:
            stream.write('{"event": "train", "st')

    def rename(function):
        at_result, at_any = passes("result")(function), passes("rename")(function)
        return lambda self, target: (at_result if Path(target).name == "result.json" else at_any)(self, target)

    loop.SAVING = float("inf")  # at each evaluation, whatever it costs
    torch.save = half_and_no_more if where == "beside" else passes("save", half_a_checkpoint)(torch.save)
    os.fsync = passes("fsync")(os.fsync)
    loop.compute = passes("evaluate")(loop.compute)
    torch.optim.AdamW.step = passes("step")(torch.optim.AdamW.step)
    Path.rename = rename(Path.rename)
    record.Record.log = passes("log", half_a_line)(record.Record.log)
    run.run(Config.load(config))
