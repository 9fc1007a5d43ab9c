"""The device that a run trains on: chosen, waited for as little as possible, and what it says when its memory ends."""

import contextlib
import ctypes
import functools
import os
import time
import timeit
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ..config import Config
from ..cpus import cpus
from ..errors import OutOfMemory, UserError
from ..methods.casts import CastAtOnce


def find_device(config: Config) -> torch.device:
    """The device that `device.name` asks for. Raises UserError where there is none such, or it lacks the precision as
    far as its kind tells. Does not start CUDA."""
    name = config.device.name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device.name={name}: this machine shows {torch.cuda.device_count()} CUDA devices")
    if config.train.precision == "tf32" and device.type != "cuda":
        raise UserError("train.precision=tf32 is NVIDIA GPUs' own: take float32 or bfloat16 on a CPU")
    return device


def choose_device(config: Config) -> torch.device:
    """The device of `find_device`, set up as the run wants it. UserError where it cannot compute in its precision."""
    if config.device.deterministic:  # read when CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device, precision = find_device(config), config.train.precision
    with memory_said(device):
        if device.index is not None:  # whose streams an event, a graph and torch.cuda.synchronize() take
            torch.cuda.set_device(device)
        if device.type == "cuda" and precision == "bfloat16" and not torch.cuda.is_bf16_supported(False):
            raise UserError(f"train.precision=bfloat16: {torch.cuda.get_device_name(device)} has none; take float32")
    torch.set_num_threads(_threads(config))
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.use_deterministic_algorithms(config.device.deterministic)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return device


def _threads(config: Config) -> int:
    """Those of each run: where the configuration names no number, an equal part of the CPUs."""
    return config.device.threads or max(1, cpus() // len(config.launcher.slots))


def notes(config: Config, at_once: int = 1) -> list[str]:
    """What is to be said of the device that `find_device` finds for runs of which so many go on at once: that
    device.name=auto takes the CPU although PyTorch is built for GPUs; that they have more threads than there are CPUs;
    that the CPU is slow in bfloat16."""
    found = []
    threads, there = _threads(config), cpus()
    if at_once * threads > there and find_device(config).type == "cpu":
        asked = [f"{at_once} runs at once"] * (at_once > 1) + [f"device.threads={threads}"] * (threads > 1)
        found.append(
            f"{' of '.join(asked)}: that is {at_once * threads} threads on {there} CPUs, which wait for each other; "
            f"take {there} together"
        )
    if config.device.name == "auto" and torch.version.cuda and not torch.cuda.is_available():
        found.append(f"device.name=auto: PyTorch is built for CUDA {torch.version.cuda} but finds no GPU: on the CPU")
    narrow = config.train.precision == "bfloat16" and find_device(config).type == "cpu"
    if narrow and (times := times_of_bfloat16()) > SLOW:
        found.append(
            f"train.precision=bfloat16: this CPU takes about {times:.0f} times as long for a product of matrices as in "
            "float32; train.precision=float32 is faster, and gives runs of another name and other numbers"
        )
    return found


SLOW = 4.0
"""Of `times_of_bfloat16`: CPUs with units for bfloat16 were seen to take up to 2, one without 60."""


@functools.cache
def times_of_bfloat16() -> float:
    """How many times as long as in float32 a product of matrices takes on this CPU, measured in less than a second: the
    names of its units do not tell it (docs/speed.md). 1 where the system's clock of a thread is too coarse for it."""

    def seconds(dtype: torch.dtype) -> float:
        one, other = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        one @ other
        return min(timeit.repeat(lambda: one @ other, timer=time.thread_time, number=1, repeat=5))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # whose own time is the same where other processes run
    try:
        plain = seconds(torch.float32)
        return seconds(torch.bfloat16) / plain if plain else 1.0
    finally:
        torch.set_num_threads(threads)


def check_devices(devices: Sequence[str]) -> None:
    """UserError where this machine lacks one of launcher.devices, or CUDA_VISIBLE_DEVICES keeps it from this process,
    as it may be somebody else's. To be called where CUDA has not started."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    for device in devices:
        if before is not None and device not in before.replace(" ", "").split(","):
            raise UserError(
                f"launcher.devices={device}: CUDA_VISIBLE_DEVICES={before} shows this process others; name those, or "
                "unset it"
            )
    try:
        for device in dict.fromkeys(devices):
            os.environ["CUDA_VISIBLE_DEVICES"] = device
            if not torch.cuda.device_count():
                os.environ.pop("CUDA_VISIBLE_DEVICES")
                there = torch.cuda.device_count()
                raise UserError(f"launcher.devices={device}: this machine has no such GPU; it shows {there}")
    finally:
        if before is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def keep_freed_memory() -> None:
    """Has glibc keep freed blocks for the next step instead of giving them back to the kernel.

    A step frees and takes several copies of the weights, and each time the kernel would clear their pages anew, which
    is about a tenth of a SAM step of MiniLM on short sentences.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def memory_said(
    device: torch.device,
    cure: str = (
        "take train.micro_batch_size=8, whose gradient is the whole batch's, or fewer runs at once "
        "(launcher.per_device=1)"
    ),
) -> Iterator[None]:
    """Inside, a GPU whose memory ends says so in one line, as OutOfMemory, and what to do."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError, and what CUDA raises where it cannot even start
        if device.type == "cpu" or "out of memory" not in str(error):
            raise
        try:
            free, total = torch.cuda.mem_get_info(device)
            ours = torch.cuda.memory_reserved(device)
            had = f" ({total / 1e9:.1f} GB, {free / 1e9:.1f} free, {ours / 1e9:.1f} this run's)"
        except (RuntimeError, AssertionError, ValueError):  # CUDA has not started, or it is no GPU of CUDA
            had = ""
        raise OutOfMemory(f"{device} is out of memory{had}: {cure}") from error


def memory_in_use(device: torch.device) -> dict[str, int] | None:
    """{"in_use", "total"}: bytes of a GPU, by all that is on it and with CUDA's own context. None on a CPU.

    At a run's end that is the most that it had: the allocator gives nothing back while there is enough.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return {"in_use": total - free, "total": total}


def to(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch there, without a wait. A mask that hides nothing is left out, which the model would wait to learn."""
    if device.type == "cpu":
        return batch
    batch = {name: value for name, value in batch.items() if name != "attention_mask" or not value.all()}
    pin = device.type == "cuda" and torch.cuda.is_available()
    return {name: (value.pin_memory() if pin else value).to(device, non_blocking=True) for name, value in batch.items()}


def _unread(mask: Callable) -> Callable:
    """That maker of masks, but for its look whether the padding's mask hides anything and can be left out."""

    def made(**options) -> Tensor | None:
        if options.get("attention_mask") is not None:
            options |= {"allow_is_bidirectional_skip": False, "allow_is_causal_skip": False}
        return mask(**options)

    return made


NAME = "dsam_without_wait"
AttentionInterface.register(NAME, sdpa_attention_forward)
AttentionMaskInterface.register(NAME, _unread(sdpa_mask))


def attend_without_wait(network: PreTrainedModel) -> None:
    """Has the network's attention take a mask as it is: transformers otherwise waits for the device in each pass, to
    learn whether the mask hides anything (`to` has seen to that)."""
    if network.config._attn_implementation == "sdpa":
        network.set_attn_implementation(NAME)
    elif network.config._attn_implementation == "eager":  # a model's own: by whatever name, it would not be found
        AttentionMaskInterface.register("eager", _unread(eager_mask))  # of all models in this process


def prepare_for_gpu(network: PreTrainedModel, autocast: torch.dtype | None) -> None:
    """Has the network's passes wait for nothing and, where they are to run in `autocast`, cast its weights at once."""
    attend_without_wait(network)
    if autocast is not None:
        CastAtOnce(network)


class Outcome(NamedTuple):
    """What came of one step."""

    step: int
    loss: float
    norm: float
    finite: bool
    forwards: float
    backwards: float


class Outcomes:
    """What came of the steps, read when the device is done with them: a step later, so that the host does not wait for
    what it has just asked for. On a CPU, which is done when it returns, at once.

    `found` (0-dim) is 1 from the first step on that was not finite: an optimizer that is given it as `found_inf` leaves
    the weights as they were before that step.
    """

    def __init__(self, device: torch.device, later: bool | None = None):
        self.later = device.type == "cuda" if later is None else later
        self.found = torch.zeros((), device=device)
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None, float, float]] = deque()

    def add(self, step: int, loss: Tensor, report: dict) -> None:
        norm = torch.as_tensor(report["gradient_norm"], device=loss.device)
        finite = report.pop("finite", torch.ones((), dtype=torch.bool, device=loss.device))
        if self.later:
            self.found = torch.maximum(self.found, (~finite).float())
        told = torch.stack([loss.double(), norm.double(), finite.double()]).to("cpu", non_blocking=True)
        event = None
        if loss.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((step, told, event, float(report["forwards"]), float(report["backwards"])))

    def read(self, all_of_them: bool) -> Iterator[Outcome]:
        """Those of all steps but the latest, or `all_of_them`; each once, in order."""
        while len(self._waiting) > (self.later and not all_of_them):
            step, told, event, forwards, backwards = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            loss, norm, finite = told.tolist()
            yield Outcome(step, loss, norm, bool(finite), forwards, backwards)
