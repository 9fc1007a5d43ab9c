"""Put on PYTHONPATH by tests: runs of the seeds 101 to 105 meet the ends that a run can meet.

101 killed by the kernel (SIGKILL), the first time or, with DSAM_KILL_ALWAYS, each time
102 segmentation fault
103 os._exit(7)
104 an exception
105 a hang
106 memory without end

With DSAM_KILL_LOADING a sweep is killed while it loads data and models, before its runs.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path


def patch(loop) -> None:
    fine_tune = loop.fine_tune

    def fails(config, *arguments, checkpoints=None, **options):
        folder = Path(arguments[5].folder).parent
        print("slot", os.environ.get("CUDA_VISIBLE_DEVICES"), "until", time.monotonic(), flush=True)
        if config.seed == 101 and (os.environ.get("DSAM_KILL_ALWAYS") or not (folder / "killed-before").exists()):
            (folder / "killed-before").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if config.seed == 102:
            ctypes.string_at(0)
        if config.seed == 103:
            os._exit(7)
        if config.seed == 104:
            raise ValueError("a loss of patience")
        if config.seed == 105:
            time.sleep(3600)
        if config.seed == 106:
            held = []
            while True:
                held.append(bytearray(os.urandom(1) * 50_000_000))
                time.sleep(0.02)
        return fine_tune(config, *arguments, **options)

    loop.fine_tune = fails
    if os.environ.get("DSAM_KILL_LOADING"):
        loop.total_steps = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)


class Finder:
    """Patches the training loop as soon as it is imported, and costs other programs nothing."""

    def find_spec(self, name, path=None, target=None):
        if name != "dsam.training.loop":
            return None
        sys.meta_path.remove(self)
        import importlib.util

        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
