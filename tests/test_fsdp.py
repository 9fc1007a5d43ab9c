"""FSDP2 (`fully_shard`) on two real processes (gloo), against one process with the joint batch, in float64."""

import socket
from pathlib import Path

import encoders
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import warm
from classifier import Classifier, Losses, batch, part
from test_stacks import shown
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_outputs import SequenceClassifierOutput

from dsam import ESAM, METHODS, SAM, DeltaSAM, ExampleLosses, GroupSAM, PerInstance
from dsam.integrations.distributed import Distributed

OPTIONS = {
    "looksam": {"k": 2},
    "r3f": {"sigma": 0.1},
    "smart": {"sigma": 0.1, "radius": 1.0, "step_size": 0.3},
    "freelb": {"init": 0.0},
}
APART = ("m_sam", "per_instance", "esam")  # which are refused
CASES = {name: (name, OPTIONS.get(name, {})) for name in METHODS if name not in APART}
CASES |= {f"delta_sam-{w}": ("delta_sam", {"weighting": w}) for w in ("uniform", "curvature", "confidence", "gibbs")}
CASES["delta_sam-recompute"] = ("delta_sam", {"recompute": True, "power": 0.5, "mix": 0.2})
NOISY = {"r3f", "smart"}  # which draw for each rank's examples from one seed
STEPS = 3


def made(name, model):
    kind, options = CASES[name]
    return METHODS[kind](model, seed=3, **options | ({} if kind in ("plain", "rdrop", *OPTIONS) else {"rho": 0.3}))


def whole(x):
    x = x.full_tensor() if hasattr(x, "full_tensor") else x
    return x.detach().clone()


def trained(method, model, rows, bare):
    """(losses, gradient norms, weights) of some steps on these rows of each batch, cut in two."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, norms = [], []
    for t in range(STEPS):
        pieces = [Losses(model, part(batch(seed=t), piece)) for piece in rows]
        before = [whole(p) for p in model.parameters()]
        # A bare call says no words: one process, too, then probes all of their table, and not only the batch's rows.
        losses.append(float(method.backward([piece.__call__ for piece in pieces] if bare else pieces)))
        assert all(torch.equal(b, whole(p)) for b, p in zip(before, model.parameters(), strict=True))
        norms.append(float(method.report["gradient_norm"]))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, [whole(p) for p in model.parameters()]


def rows_of(rank):
    """Six of twelve examples, in two pieces."""
    return [slice(6 * rank, 6 * rank + 4), slice(6 * rank + 4, 6 * rank + 6)]


class Shardable(Classifier):
    """With an output that FSDP2 looks into for the tensors at which its backward pass begins."""

    def forward(self, **inputs):
        return SequenceClassifierOutput(logits=super().forward(**inputs).logits)


def sharded():
    model = Shardable()
    for module in (model.first, model.norm, model):
        fully_shard(module)
    return model


def a_rank(rank, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = {}
    for name in CASES:
        model = sharded()
        found[name] = trained(Distributed(made(name, model), model), model, rows_of(rank), "delta" in name)
    model = sharded()
    for wrong, rows in {"pieces": rows_of(0)[: 1 + rank], "examples": [slice(0, 6 + rank)]}.items():
        try:
            Distributed(SAM(model), model).backward([Losses(model, part(batch(), piece)) for piece in rows])
        except ValueError as error:
            found[wrong] = str(error)
    torch.save(found, Path(folder) / f"{rank}.pt")
    warm.leave_group()


def both_ranks(port, folder):
    mp.spawn(a_rank, (port, folder), nprocs=2)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    warm.call("test_fsdp:both_ranks", port, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


class Joint:
    """One process in the ranks' stead; where noise is drawn for each rank's examples from one seed, rank by rank."""

    def __init__(self, name, model):
        self.methods = [made(name, model) for _ in range(2 if name in NOISY else 1)]
        self.report = self.methods[0].report

    def backward(self, pieces):
        parts = [pieces[:2], pieces[2:]] if len(self.methods) == 2 else [pieces]
        losses = [method.backward(part) for method, part in zip(self.methods, parts, strict=True)]
        grads = [p.grad.div_(len(parts)) for p in self.methods[0].params]
        self.report = {"gradient_norm": torch.cat([g.flatten() for g in grads]).norm()}
        return sum(losses) / len(losses)


@pytest.mark.filterwarnings("ignore:rdrop")
@pytest.mark.parametrize("name", CASES)
def test_sharded_weights_are_trained_as_one_process_trains_them_on_the_joint_batch(found, name):
    model = Classifier()
    losses, norms, weights = trained(Joint(name, model), model, [*rows_of(0), *rows_of(1)], "delta" in name)
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if "delta" in name else {"rtol": 1e-10, "atol": 1e-12}
    for ours in found:
        assert ours[name][0] == pytest.approx(losses, rel=tolerance["rtol"])
        assert ours[name][1] == pytest.approx(norms, rel=2e-6)
        torch.testing.assert_close(ours[name][2], weights, **tolerance)


def test_unequal_parts_are_refused_on_every_rank(found):
    for ours in found:
        assert "equally many micro-batches on every rank, got [1, 2]" in ours["pieces"]
        assert ours["examples"] == "fully_shard needs equally many examples on every rank, got [6, 7]"


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


REFUSED = {
    "m_sam": (GroupSAM, "GroupSAM does not go with fully_shard: its groups of examples"),
    "per_instance": (PerInstance, "PerInstance does not go with fully_shard: it looks into the layers; take SAM"),
    "esam": (ESAM, "ESAM does not go with fully_shard: its selection .* unequal numbers of examples; take SAM"),
    "exact": (lambda m: DeltaSAM(m, weighting="gauss_newton"), "weighting GaussNewton looks into the layers; take"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_needs_whole_layers_is_refused_before_the_first_step(alone, name):
    make, message = REFUSED[name]
    model = sharded()
    with pytest.raises(ValueError, match=message):
        Distributed(make(model), model)


def test_probes_of_the_top_layers_are_refused_and_those_of_all_are_named(alone):
    model = encoders.model("bert")
    fully_shard(model)
    with pytest.raises(ValueError, match="DeltaSAM does not go with fully_shard: probes of the top .* layers=None"):
        Distributed(DeltaSAM(model, layers=2), model)


def test_what_cannot_be_seen_from_here_is_refused(alone):
    model = Shardable()
    early = SAM(model)
    fully_shard(model)
    with pytest.raises(ValueError, match=r"make the method after fully_shard\(model\)"):
        Distributed(early, model)
    with pytest.raises(ValueError, match="use ascent='global'"):
        Distributed(SAM(model), model, ascent="local")
    with pytest.raises(ValueError, match=r"parameters are shards.*Distributed\(method, model\)"):
        SAM(model).backward(Losses(model, batch()))


def test_the_pages_examples_run(alone):
    """On one process, whose loss is that of the model by itself."""
    for title, model in (("Several processes", encoders.model("bert")), ("FSDP2", encoders.model("bert"))):
        names = {
            "fully_shard": fully_shard,
            "Distributed": Distributed,
            "DeltaSAM": DeltaSAM,
            "SAM": SAM,
            "torch": torch,
        }
        names |= {"DistributedDataParallel": DistributedDataParallel, "ExampleLosses": ExampleLosses}
        expected = ExampleLosses(model.eval(), encoders.batch())().mean().detach()
        exec(shown(title), names := names | {"model": model, "network": model, "batch": encoders.batch()})
        torch.testing.assert_close(names["loss"], expected)
