"""Each method and weighting on the GPU against the CPU, and against itself. Writes $OUT/methods.json.

One step without dropout in float64 and float32 beside the same step on the CPU (random numbers drawn on the CPU for
both); with dropout: weights untouched, seven steps repeated bit for bit, with a checkpoint in between, bfloat16.
"""

import contextlib
import json
import os
import time
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from transformers import BertConfig, BertForSequenceClassification

from dsam import ExampleLosses
from dsam.methods import METHODS, WEIGHTINGS
from dsam.methods.embedding_noise import OutputMethod
from dsam.methods.step import Step

DEVICE = torch.device(os.environ["GPU_CHECK_DEVICE"])
OUT = Path(os.environ["OUT"], "methods.json")
CASES = {name: (name, {}) for name in METHODS if name != "delta_sam"}
CASES |= {f"delta_sam {w}": ("delta_sam", {"weighting": w}) for w in WEIGHTINGS}
CASES |= {
    "delta_sam probe layers=2": ("delta_sam", {"weighting": "probe", "layers": 2}),
    "delta_sam gibbs norms=exact": ("delta_sam", {"weighting": "gibbs", "norms": "exact"}),
    "sam mask=fresh": ("sam", {"mask": "fresh"}),
}
if "GPU_METHODS" in os.environ:
    CASES = {name: CASES[name] for name in os.environ["GPU_METHODS"].split(",")}
TIGHT = {torch.float64: 1e-9, torch.float32: 1e-3}


class DrawnOnCPU(TorchFunctionMode):
    """Inside, random numbers come from one CPU generator, whatever device asks, so that two devices see the same."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.randn, torch.rand, torch.randint):
            device = kwargs.pop("device", None)
            return func(*args, **kwargs | {"generator": self.generator}).to(device or "cpu")
        if func is torch.Tensor.random_:
            drawn = torch.empty_like(args[0], device="cpu").random_(*args[1:], generator=self.generator)
            return args[0].copy_(drawn)
        return func(*args, **kwargs)


def model(device, dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    shape = dict(vocab_size=200, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    config = BertConfig(**shape, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return BertForSequenceClassification(config).to(device, dtype).train()


def closures(network, autocast=None):
    """One batch of eight in two pieces of different lengths, with padding."""
    g, found, device = torch.Generator().manual_seed(1), [], next(network.parameters()).device
    for examples, length in ((5, 12), (3, 20)):
        mask = torch.ones(examples, length, dtype=torch.int64)
        mask[0, length - 4 :] = 0
        ids = torch.randint(5, 200, (examples, length), generator=g)
        labels = torch.randint(0, 2, (examples,), generator=g)
        batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0, "labels": labels}
        found.append(ExampleLosses(network, {k: v.to(device) for k, v in batch.items()}, autocast))
    return found


def gradient(network):
    return torch.cat([(p * 0 if p.grad is None else p.grad).detach().flatten().cpu() for p in network.parameters()])


def one_step(name, options, device, dtype):
    """The gradient where both devices draw the same numbers: noise by the batch, and for all words."""
    network = model(device, dtype=dtype)
    with DrawnOnCPU(), patched(Step, "words", property(lambda self: None)), patched(OutputMethod, "_noise", noise):
        METHODS[name](network, **options).backward(closures(network))
    return gradient(network).double()


def noise(method, closure, kind):
    drawn = (torch.randn if kind == "normal" else torch.rand)(*closure.embedding_shape)
    drawn = drawn.to(method.params[0])
    return (drawn if kind == "normal" else drawn * 2 - 1) * closure.token_mask


@contextlib.contextmanager
def patched(owner, name, value):
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def masks_agree(precision):
    """Whether a float32 pass replays the attention and hidden masks of one in `precision`, as a probe does."""
    network = model(DEVICE, dropout=0.5)
    seen = []
    for autocast in (precision, None):
        kept = []
        dropouts = [m for m in network.modules() if type(m) is torch.nn.Dropout]
        hooks = [m.register_forward_hook(lambda _, i, o, kept=kept: kept.append(o == 0)) for m in dropouts]
        torch.manual_seed(5)
        (_, longer) = closures(network, autocast)
        longer()
        seen.append(kept)
        for hook in hooks:
            hook.remove()
    return all(map(torch.equal, *seen))


def some_steps(name, options, checkpoints=(), autocast=None):
    """(all gradients of seven steps with dropout, whether each step left the weights as they were)."""
    network, kept, seen = model(DEVICE, dropout=0.1), True, []
    method, data = METHODS[name](network, **options), closures(network, autocast)
    torch.manual_seed(3)
    for step in range(7):
        if step in checkpoints:  # as dsam.training.checkpoint writes and reads it
            torch.save(method.state_dict(), OUT.with_suffix(".pt"))
            method.load_state_dict(torch.load(OUT.with_suffix(".pt"), map_location="cpu", weights_only=True))
        before = [p.detach().clone() for p in network.parameters()]
        network.zero_grad()
        method.backward(data)
        kept &= all(map(torch.equal, before, network.parameters()))
        seen.append(gradient(network))
        with torch.no_grad():
            for p in network.parameters():
                p -= 0.01 * p.grad if p.grad is not None else 0
    return torch.stack(seen), kept


def checks(name, options):
    for dtype, tight in TIGHT.items():
        ours, cpu = one_step(name, options, DEVICE, dtype), one_step(name, options, "cpu", dtype)
        error = float((ours - cpu).norm() / cpu.norm())
        yield f"as on the CPU, {dtype}", error < tight or f"relative error {error:.1e}"
    first, kept = some_steps(name, options)
    yield "weights untouched", kept
    yield "repeats bit for bit", torch.equal(first, some_steps(name, options)[0]) or "differs"
    half, kept = some_steps(name, options, autocast=torch.bfloat16)
    yield "bfloat16", bool(kept and half.isfinite().all())
    yield "goes on from a checkpoint", torch.equal(first, some_steps(name, options, checkpoints=(2, 6))[0]) or "differs"


found, began = {"device": str(DEVICE), "torch": torch.__version__}, time.time()
for label, (name, options) in CASES.items():
    rows = found[label] = {}
    try:
        for what, answer in checks(name, options):
            rows[what] = answer
    except Exception as error:  # the next method may do
        rows["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
    print(label, "fine" if all(v is True for v in rows.values()) else rows, flush=True)
    found["seconds"] = round(time.time() - began, 1)
    OUT.write_text(json.dumps(found, indent=1))
found["a float32 probe replays the masks of a bfloat16 pass"] = masks_agree(torch.bfloat16)
OUT.write_text(json.dumps(found, indent=1))
OUT.with_suffix(".pt").unlink(missing_ok=True)
