"""A sweep in the jobs of a Slurm cluster: one array, whose every job does its pack of runs as the local launcher does.

Which runs wait in which job stands in `<runs>/.slurm/<job>.json`, so that the same command finds its jobs again.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from ..config import Config, Launcher
from ..cpus import cpus
from ..errors import UserError
from ..files import write_atomically
from ..runs.lease import path_in
from ..text import counted, first_line
from . import estimate, sweep
from .display import Display
from .planned import Planned, unfinished

JOB_NAME = "dsam"
# All other states of Slurm's are on the way to one of these.
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
)
SLOWEST = 30.0  # seconds between looks at the queue and the run folders, once a sweep has gone on for a while
REQUEUEING = 30.0  # seconds for which a controller is asked that does not answer
LATE = 10.0  # seconds after a job's end in which a shared file system may still bring a result


def require() -> None:
    """Raises UserError where no job can be submitted from here."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError("launcher=slurm: this machine has no Slurm (no sbatch and srun); launcher=local runs here")
    if importlib.util.find_spec("submitit") is None:
        raise UserError("launcher=slurm needs submitit: pip install submitit")
    queue()


def run_all(runs: list[Planned], launcher: Launcher) -> list[Planned]:
    """Submits what is neither finished nor in a job already, waits for all of it and returns what failed.

    With `launcher.wait=false`, and at Ctrl-C, the jobs are left to themselves and nothing has failed yet.
    """
    folder = Path(runs[0].config.paths.runs).absolute() / ".slurm"
    jobs = submitted(folder, queue())
    for r in unfinished(runs):  # a job that has ended since the plan was made has left its result
        if result := r.outcome():
            r.status, r.seconds = result["status"], result["train"]["seconds"]
    left = unfinished(runs)
    new = [r for r in left if r.identity.id not in jobs]
    if len(new) < len(left):
        print(f"in jobs already: {counted(len(left) - len(new), 'run')}")
    if new:
        jobs |= submit(new, launcher, folder)
    jobs = {r.identity.id: jobs[r.identity.id] for r in left}
    arrays = " ".join(sorted({job.split("_")[0] for job in jobs.values()}, key=int))
    if jobs and not launcher.wait:
        print(f"not waiting; `squeue --me --name={JOB_NAME}` shows the jobs, `scancel {arrays}` cancels them")
    elif jobs:
        try:
            wait(runs, jobs, folder)
        except KeyboardInterrupt:
            print(f"the jobs go on: the same command waits for them, `scancel {arrays}` cancels them", file=sys.stderr)
            raise SystemExit(130) from None
    return [r for r in runs if r.status == "failed"] if launcher.wait else []


def submit(runs: list[Planned], launcher: Launcher, folder: Path) -> dict[str, str]:
    """One array, the longest runs in its first jobs. Returns each run's job. Raises UserError with sbatch's reason."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    ordered = estimate.order(runs)
    packs = [ordered[i : i + launcher.pack] for i in range(0, len(ordered), launcher.pack)]
    root = Path(__file__).parent.parent.parent  # the nodes' Python finds dsam also where it was not installed
    more = {name: value if equals else True for name, equals, value in (o[2:].partition("=") for o in launcher.sbatch)}
    options = {
        "job_name": JOB_NAME,
        "partition": launcher.partition,
        "account": launcher.account,
        "cpus_per_task": launcher.cpus,
        "srun_args": launcher.cpus and [f"--cpus-per-task={launcher.cpus}"],  # since 22.05 srun does not take sbatch's
        "gpus_per_node": launcher.gpus,
        "mem": None if launcher.job_memory_gb is None else f"{launcher.job_memory_gb * 1024:.0f}M",
        "time": launcher.job_minutes,
        "array_parallelism": launcher.jobs_at_once,
        "setup": [f"export PYTHONPATH={shlex.quote(str(root))}${{PYTHONPATH:+:$PYTHONPATH}}", *launcher.setup],
        # The warning is the signal that preemption sends too, since nothing but the runs' own handler is needed then.
        "additional_parameters": {"requeue": True, "signal": f"TERM@{launcher.warning_seconds}"} | more,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        executor = SlurmExecutor(folder)
        executor.update_parameters(**{k: v for k, v in options.items() if v is not None})
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            jobs = executor.map_array(partial(work, launcher), [[r.config for r in pack] for pack in packs])
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"Slurm took no job: {first_line(error)}") from None
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; set paths.runs=DIR") from None
    array = jobs[0].job_id.split("_")[0]
    contents = {job.job_id: [r.identity.id for r in pack] for job, pack in zip(jobs, packs, strict=True)}
    write_atomically(folder / f"{array}.json", json.dumps(contents, indent=1))
    print(f"{counted(len(runs), 'run')} in {counted(len(packs), 'job')}: Slurm array {array}, logs in {folder}")
    if not asks_for_gpu(launcher) and any(r.config.device.name == "auto" for r in runs):
        print("note: the jobs ask for no GPU (launcher.gpus=N): where the cluster gives none, they train on CPUs")
    return {run: job for job, ids in contents.items() for run in ids}


def asks_for_gpu(launcher: Launcher) -> bool:
    """Whether the job does, or for a part of one; other resources, as --gres=tmp:10, are none of these."""
    gpus = re.compile(r"--(gpus|(gres|tres).*\b(gpu|mps|shard)\b)")
    return bool(launcher.gpus) or any(map(gpus.match, launcher.sbatch))


def work(launcher: Launcher, configs: list[Config]) -> None:
    """The body of a job. A requeued one does what is missing: the rest is finished or has a checkpoint.

    Slurm sends SIGTERM before it preempts and before time is up; the local launcher then stops the runs at a
    checkpoint. A preempted job Slurm requeues itself; one that was only warned is still running, and asks for it.
    """
    signal.signal(signal.SIGTERM, _leave)  # until the local launcher listens; submitit would ignore it
    launcher, configs = here(launcher, configs, os.environ)
    try:
        for r in sweep.run_all(sweep.plan(configs), launcher):
            print(f"failed: {r.title}: {r.reason}")
    except SystemExit:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # requeueing sends another
        _requeue(os.environ)
        raise


def _requeue(environment: Mapping[str, str]) -> None:
    """Asks for it where the job is still running. A controller that does not answer, as where many jobs end at once, is
    asked again."""
    # The last job of an array has the array's number, which stands for all of its jobs.
    array, task = (environment.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    job = f"{array}_{task}" if array and task else environment["SLURM_JOB_ID"]
    end = time.monotonic() + REQUEUEING
    while True:
        try:
            if _output("squeue", "--noheader", "--format=%T", f"--jobs={job}").strip() == "RUNNING":
                print(f"requeueing job {job}", flush=True)
                _output("scontrol", "requeue", job)
            return
        except UserError as error:
            if time.monotonic() > end:
                print(f"job {job} could not be requeued: {error}", flush=True)
                return
        time.sleep(1)


def here(launcher: Launcher, configs: list[Config], environment: Mapping[str, str]) -> tuple[Launcher, list[Config]]:
    """Launcher and configurations with what the job was given: a slot per GPU, the CPUs shared among the runs."""
    devices = environment.get("CUDA_VISIBLE_DEVICES") if asks_for_gpu(launcher) else None
    launcher = launcher.model_copy(update={"devices": devices.split(",") if devices else None})
    # Not all clusters bind a job to its CPUs, and some bind it to fewer than it has on the node.
    threads = max(1, min(int(environment["SLURM_CPUS_ON_NODE"]), cpus()) // min(len(launcher.slots), launcher.pack))

    def given(config: Config) -> Config:
        device = config.device.model_copy(update={"threads": config.device.threads or threads})
        return config.model_copy(update={"launcher": launcher, "device": device})

    return launcher, [given(config) for config in configs]


def _leave(signum, frame) -> None:
    raise SystemExit(128 + signum)


def wait(runs: list[Planned], jobs: dict[str, str], folder: Path) -> None:
    """Until each run of `jobs` has a result, or its job has ended without one.

    A failure counts only at the job's end: until then the job may try the run again.
    """
    waiting = [r for r in runs if r.identity.id in jobs]
    for r in waiting:
        r.status, r.reason = "missing", ""
    over: dict[str, float] = {}
    states, shown = dict.fromkeys(jobs.values(), "PENDING"), ""  # until the controller has answered once
    begin = time.monotonic()
    with Display(runs) as display:
        while waiting:
            with contextlib.suppress(UserError):  # a controller that does not answer for a while
                states = queue()
            now = time.monotonic()
            for r in list(waiting):
                job = jobs[r.identity.id]
                state = states.get(job, "COMPLETED")  # Slurm forgets a job some minutes after its end
                if result := r.outcome():
                    r.status, r.seconds = result["status"], result["train"]["seconds"]
                elif state not in ENDED:
                    over.pop(job, None)
                    _follow(r, now)
                elif now - over.setdefault(job, now) > LATE:
                    r.status, r.reason = "failed", _reason(r, job, state, folder)
                if r.status not in ("missing", "running"):
                    waiting.remove(r)
                    display.ended(r)
            line = summary(states.get(job, "ended") for job in sorted({jobs[r.identity.id] for r in waiting}))
            if waiting and line != shown:
                display.note(f"jobs: {line}")
                shown = line
            display.show()
            if waiting:
                time.sleep(min(SLOWEST, 1 + (now - begin) / 20))


def summary(states: Iterable[str]) -> str:
    return ", ".join(f"{n} {state.lower().replace('_', ' ')}" for state, n in Counter(states).items())


def _follow(r: Planned, now: float) -> None:
    """Whether a run of a job that has not ended is being worked on."""
    if not path_in(r.identity.folder).exists():
        r.status = "missing"
    elif r.status != "running":
        r.status, r.started = "running", now


def _reason(r: Planned, job: str, state: str, folder: Path) -> str:
    failure = r.record.failure()
    if failure and state == "COMPLETED":
        return failure["reason"]
    told = f"; {failure['reason']}" if failure else ""
    return f"Slurm job {job} ended as {state} without its result{told} (job's log: {folder / f'{job}_0_log.err'})"


def submitted(folder: Path, states: dict[str, str]) -> dict[str, str]:
    """{run id: job id} of the runs whose jobs have not ended."""
    found: dict[str, str] = {}
    for path in folder.glob("*.json"):
        for job, ids in json.loads(path.read_text()).items():
            if states.get(job, "COMPLETED") not in ENDED:
                found |= dict.fromkeys(ids, job)
    return found


def queue() -> dict[str, str]:
    """{job id: state} of this user's jobs that Slurm knows, ended ones for some minutes. Raises UserError."""
    arguments = ("--me", f"--name={JOB_NAME}", "--array", "--states=all", "--noheader", "--format=%i %T")
    return dict(line.split() for line in _output("squeue", *arguments).splitlines())


def _output(*command: str) -> str:
    """What one of Slurm's commands prints. Raises UserError with its reason."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{command[0]}: {first_line(Exception(done.stderr)) or f'status {done.returncode}'}")
    return done.stdout
