"""Two real processes (gloo) against one process with the joint batch, in float64."""

import socket
from pathlib import Path
from types import SimpleNamespace

import encoders
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import warm
from classifier import Classifier, Losses
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dsam
from dsam import ASAM, SAM, DeltaSAM, GroupSAM, LookSAM, NonFiniteGradient, Plain
from dsam.integrations.distributed import Distributed, JointStep
from dsam.methods.weighting import LossChange

EXACT = {"rtol": 1e-12, "atol": 1e-14}
METHODS = {
    "plain": lambda m: Plain(m),
    "sam": lambda m: SAM(m, 0.3),
    "asam": lambda m: ASAM(m, 0.5),
    "delta_sam": lambda m: DeltaSAM(m, 0.3, seed=3),
    "delta_sam-curvature": lambda m: DeltaSAM(m, 0.3, "curvature", probes=2, seed=3),
    "delta_sam-gauss_newton": lambda m: DeltaSAM(m, 0.3, "gauss_newton"),  # exact norms, logits, labels
    "delta_sam-recompute": lambda m: DeltaSAM(m, 0.3, power=0.5, mix=0.2, recompute=True, seed=3),
}
PARTS = {"equal": [6, 6], "unequal": [4, 8]}
STEPS = 3


class Network(nn.Module):
    """With a parameter that no pass reaches and a layer that only rank 1's inputs reach."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)
        self.sometimes = nn.Linear(8, 8)
        self.drop = nn.Dropout(dropout)
        self.double()

    def forward(self, x, sometimes=False):
        hidden = self.drop(torch.tanh(self.first(x)))
        if sometimes:
            hidden = hidden + torch.tanh(self.sometimes(hidden))
        return self.last(hidden)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head, self.without = nn.ModuleList(Layer() for _ in range(4)), nn.Linear(5, 3), None
        self.double()

    def forward(self, x, sometimes=False):
        for k, layer in enumerate(self.layers):
            if k != self.without:
                x = layer(x)
        return self.head(x)


class Seen(LossChange):
    """Keeps rank 0's share of the p_i and the number of weights that were probed."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def __call__(self, losses, probe):
        weights = super().__call__(losses, probe)
        self.seen.append((float(weights[: len(weights) // 2].sum()), probe.dimension))
        return weights


def batch(step):
    g = torch.Generator().manual_seed(step + 1)
    return torch.randn(12, 5, generator=g, dtype=torch.float64), torch.randint(0, 3, (12,), generator=g)


class closure:
    """Keeps its logits and labels, which some weightings read."""

    def __init__(self, model, step, start, stop, scale=1.0):
        x, y = batch(step)
        self.model, self.x, self.labels, self.scale = model, x[start:stop], y[start:stop], scale
        self.sometimes = start >= 6

    def __call__(self):
        logits = self.model(self.x, self.sometimes)
        self.logits = logits.detach()
        return self.scale * nn.functional.cross_entropy(logits, self.labels, reduction="none")


def trained(method, closures_of):
    """SGD with momentum and weight decay; (losses, gradient norms, weights)."""
    params = method.params
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(float(method.backward(closures_of(step))))
        norms.append(float(method.report["gradient_norm"]))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, [p.detach().clone() for p in params]


def bounds(parts, rank):
    start = sum(parts[:rank])
    return start, start + parts[rank]


EXAMPLES = (5, 7)
OPTIONS = {"m_sam": {"m": 4}, "r3f": {"sigma": 0.1}, "smart": {"sigma": 0.1, "radius": 1.0, "step_size": 0.3}}
NOT_JOINT = {"m_sam"}  # whose groups of examples are each rank's own
NOISY = ["freelb", "r3f", "smart"]


def rows(*ranks):
    """The ranks' examples: 5 of the first and 7 of the second."""
    parts = []
    for rank in ranks:
        g = torch.Generator().manual_seed(rank)
        ids = torch.randint(0, 30, (EXAMPLES[rank], 4), generator=g)
        mask = torch.ones_like(ids)
        mask[rank, 2:] = 0
        parts.append((ids, mask, torch.randint(0, 3, (EXAMPLES[rank],), generator=g)))
    return dict(zip(("input_ids", "attention_mask", "labels"), map(torch.cat, zip(*parts, strict=True)), strict=True))


class Overflowing(Losses):
    """Its gradient overflows in float32 sums, its loss does not."""

    def outputs(self, noise=None, **how):
        losses, logits = super().outputs(noise, **how)
        return losses + 1e200 * (losses - losses.detach()), logits


def with_noise_on_words(name, rank, wrapped):
    """The gradient of a Hugging Face classifier, which the closure has as it is or as the whole."""
    network = encoders.model("bert", torch.float64).eval()
    model = DistributedDataParallel(network) if wrapped else network
    method = Distributed(dsam.METHODS[name](network, seed=3, **OPTIONS.get(name, {})), model)
    method.backward(dsam.ExampleLosses(model, encoders.batch(3 + rank, 6)))
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def one_overflows(name, rank, ascent):
    """Whether the ranks agree, and go on, where the gradient of one of them overflows."""
    network = Classifier()
    method = Distributed(dsam.METHODS[name](network, seed=3, **OPTIONS.get(name, {})), ascent=ascent)
    raised = False
    try:
        method.backward((Overflowing if rank == 0 else Losses)(network, rows(rank)))
    except NonFiniteGradient:
        raised = True
    network.zero_grad()
    return raised, float(method.backward(Losses(network, rows(rank))))


def a_step(name, batch, seed, dropout=True, ascent=None):
    """(loss, gradient) of one step of the method; of this rank's part of it where `ascent` is given."""
    network = Classifier(dropout=0.1).train(dropout)
    method = dsam.METHODS[name](network, seed=3, **OPTIONS.get(name, {}))
    method = method if ascent is None else Distributed(method, ascent=ascent)
    torch.manual_seed(seed)
    loss = method.backward(Losses(network, batch))
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]
    return float(loss), torch.cat([g.flatten() for g in grads])


def every_method(rank):
    found = {}
    for name in dsam.METHODS:
        found[name, "local"] = a_step(name, rows(rank), 100 + rank, ascent="local")
        found[name, "overflow", "local"] = one_overflows(name, rank, "local")
        if name not in NOT_JOINT:
            found[name, "overflow", "global"] = one_overflows(name, rank, "global")
            found[name, "global"] = a_step(name, rows(rank), 0, dropout=False, ascent="global")
    return found


def a_rank(rank, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = {}
    for name, make in METHODS.items():
        for ascent in ("global", "local"):
            for sizes, parts in PARTS.items():
                for wrapped in (True, False):
                    network = Network()
                    model = DistributedDataParallel(network) if wrapped else network
                    method = Distributed(make(network), model, ascent=ascent)
                    start, stop = bounds(parts, rank)
                    pieces = [(start, start + 2), (start + 2, stop)] if wrapped else [(start, stop)]
                    found[name, ascent, sizes, wrapped] = (
                        *trained(method, lambda step, m=model, p=pieces: [closure(m, step, *ends) for ends in p]),
                        float(method.report.get("effective_sample_size", 0)),
                    )
    found["every"] = every_method(rank)
    found["words"] = {name: [with_noise_on_words(name, rank, wrapped) for wrapped in (False, True)] for name in NOISY}
    found["not finite"] = not_finite(rank)
    found["earlier"] = earlier(rank)
    found["scaled"] = scaled(rank)
    found["fresh"] = fresh(rank)
    found["no_sync"] = reductions_by_ddp(rank)
    found["phases"] = {scaled: phases(rank, scaled) for scaled in (False, True)}
    found["scheduled"] = scheduled(rank)
    found["left out"] = one_leaves_a_layer_out(rank)
    torch.save(found, folder / f"{rank}.pt")
    warm.leave_group()


def not_finite(rank):
    """Rank 1's losses are infinite: (error, are weights and gradients untouched?, a good step's loss) for each mode."""
    out = []
    for ascent in ("global", "local"):
        network = Network()
        before = [p.detach().clone() for p in network.parameters()]
        method = Distributed(SAM(network, 0.3), ascent=ascent)
        try:
            method.backward(closure(network, 0, 6 * rank, 6 * rank + 6, scale=1.0 + rank * torch.inf))
            raised = None
        except NonFiniteGradient:
            raised = "NonFiniteGradient"
        same = all(torch.equal(p, q) for p, q in zip(before, network.parameters(), strict=True))
        no_gradient = all(p.grad is None for p in network.parameters())
        loss = method.backward(closure(network, 0, 6 * rank, 6 * rank + 6))
        out.append((raised, same, no_gradient, float(loss)))
    return out


def earlier(rank):
    network = Network()
    network.first.bias.grad = torch.full_like(network.first.bias, 7.0)
    network.unused.bias.grad = torch.full_like(network.unused.bias, 5.0)
    Distributed(SAM(network, 0.3)).backward(closure(network, 0, 6 * rank, 6 * rank + 6))
    return network.first.bias.grad, network.unused.bias.grad


def scaled(rank):
    network = Network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    Distributed(SAM(network, 0.3)).backward(closure(network, 0, 6 * rank, 6 * rank + 6), scaler)
    return network.last.weight.grad


def fresh(rank):
    """Unequal numbers of micro-batches with fresh masks would let the ranks' probes part: refused on both."""
    network = Network(dropout=0.3)
    method = Distributed(DeltaSAM(network, 0.3, mask="fresh", seed=1))
    pieces = [(6 * rank, 6 * rank + 3), (6 * rank + 3, 6 * rank + 6)]
    method.backward([closure(network, 0, *ends) for ends in pieces])
    state = method.generator.get_state()
    try:
        method.backward([closure(network, 0, *ends) for ends in pieces[: 1 + rank]])
    except ValueError as error:
        return state, str(error)


def phases(rank, scaled):
    """Which of LookSAM's steps ascend where the second is not finite on rank 0 alone; with a scaler it is skipped."""
    network, ascended = Network(), []
    method = Distributed(LookSAM(network, 0.3, k=3), ascent="local")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    for step in range(6):
        bad = torch.inf if step == 1 and rank == 0 else 0.0
        try:
            method.backward(closure(network, step, 6 * rank, 6 * rank + 6, scale=1.0 + bad), scaler)
            ascended.append(float(method.report["ascended"]))
        except NonFiniteGradient:
            ascended.append(-1.0)
        network.zero_grad()
    return ascended, method.step


def one_leaves_a_layer_out(rank):
    """Both ranks have the same examples, and in the second step rank 0 leaves a layer out, as LayerDrop does:
    [(rank 0's share of the p_i, how many weights were probed, the generator's state) of each step], notes."""
    network = Stack()
    method = Distributed(DeltaSAM(network, 0.3, Seen(layers=2), seed=3))
    steps = []
    for step in range(4):
        network.without = 2 if step == 1 and rank == 0 else None
        method.backward(closure(network, 0, 0, 6))
        network.zero_grad()
        steps.append((*method.weighting.seen[-1], method.generator.get_state()))
    return steps, method.notes


def scheduled(rank):
    """SAM's ρ, set on the wrapper as on the method itself: (as read, as found in the step)."""
    network = Network()
    method = Distributed(SAM(network, 0.3))
    method.rho = 0.7
    method.backward(closure(network, 0, 6 * rank, 6 * rank + 6))
    return method.rho, method.method.rho, float(method.report["perturbation_norm"])


def reductions_by_ddp(rank):
    """How often DistributedDataParallel itself reduced a bucket in one δ-SAM step, and in one step of its own."""
    network = Network()
    model, count = DistributedDataParallel(network, find_unused_parameters=True), []

    def hook(state, bucket):
        count.append(1)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, hook)
    Distributed(DeltaSAM(network, 0.3), model).backward(
        [closure(model, 0, 6 * rank, 6 * rank + 3), closure(model, 0, 6 * rank + 3, 6 * rank + 6)]
    )
    ours = len(count)
    closure(model, 0, 6 * rank, 6 * rank + 6)().mean().backward()
    return ours, len(count) - ours


def tolerance(name):
    return {"rtol": 1e-6, "atol": 1e-7} if "delta" in name else EXACT  # δ-SAM's weights are float32


def both_ranks(port, folder):
    mp.spawn(a_rank, (port, Path(folder)), nprocs=2)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    warm.call("test_distributed:both_ranks", port, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def joint(network, step):
    """One process with all twelve examples; two closures only because the last six go through another layer."""
    return [closure(network, step, 0, 6), closure(network, step, 6, 12)]


class LocalReference:
    """m-SAM by its definition: the mean, by size, of the gradients that the method gives on each rank's part alone."""

    def __init__(self, make, network, parts):
        self.methods, self.parts = [make(network) for _ in parts], parts
        self.params, self.report = list(network.parameters()), {}

    def backward(self, parts):
        total, loss = [None] * len(self.params), 0.0
        for method, pieces, size in zip(self.methods, parts, self.parts, strict=True):
            loss += float(method.backward(pieces)) * size / 12
            for k, p in enumerate(self.params):
                if p.grad is not None:
                    total[k] = p.grad * size / 12 + (0 if total[k] is None else total[k])
                p.grad = None
        for p, g in zip(self.params, total, strict=True):
            p.grad = g
        self.report["gradient_norm"] = torch.cat([g.flatten() for g in total if g is not None]).norm()
        return loss


def split(network, step, parts):
    """The joint batch as the ranks' parts, cut where the layer changes (closure() routes by `start`)."""
    out = []
    for rank in (0, 1):
        start, stop = bounds(parts, rank)
        out.append([closure(network, step, start, stop)])
    return out


@pytest.mark.parametrize("name", dsam.METHODS)
def test_a_local_step_of_any_method_is_the_mean_of_the_ranks_by_their_sizes(found, name):
    alone = [a_step(name, rows(rank), 100 + rank) for rank in (0, 1)]
    loss, gradient = (sum(one[i] * n for one, n in zip(alone, EXAMPLES, strict=True)) / 12 for i in (0, 1))
    for rank in (0, 1):
        got = found[rank]["every"][name, "local"]
        assert got[0] == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(got[1], gradient, **tolerance(name))


@pytest.mark.parametrize("name", sorted(set(dsam.METHODS) - NOT_JOINT - {"delta_sam", *NOISY}))
def test_a_global_step_of_any_method_is_that_of_one_process_with_the_joint_batch(found, name):
    """δ-SAM's, with the same probes, is above; noise on embeddings is drawn for each rank's examples from one seed."""
    loss, gradient = a_step(name, rows(0, 1), 0, dropout=False)
    for rank in (0, 1):
        got = found[rank]["every"][name, "global"]
        assert got[0] == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(got[1], gradient, **tolerance(name))


@pytest.mark.parametrize("name", dsam.METHODS)
@pytest.mark.parametrize("ascent", ["local", "global"])
def test_ranks_agree_where_one_overflows_and_the_next_step_goes_well(found, name, ascent):
    if (name, ascent) != ("m_sam", "global"):
        (raised, loss), (other_raised, other_loss) = (found[rank]["every"][name, "overflow", ascent] for rank in (0, 1))
        assert raised == other_raised
        assert loss == pytest.approx(other_loss, rel=1e-12)


@pytest.mark.parametrize("name", NOISY)
def test_noise_on_words_takes_the_whole_as_the_model_of_the_closure(found, name):
    for rank in (0, 1):
        bare, wrapped = found[rank]["words"][name]
        assert bare.norm() > 0
        torch.testing.assert_close(wrapped, bare, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NOISY)
def test_a_global_step_with_noise_on_embeddings_is_the_mean_of_the_ranks(found, name):
    alone = [a_step(name, rows(rank), 0, dropout=False) for rank in (0, 1)]
    gradient = sum(one[1] * n for one, n in zip(alone, EXAMPLES, strict=True)) / 12
    torch.testing.assert_close(found[0]["every"][name, "global"][1], gradient, **tolerance(name))


@pytest.mark.parametrize("wrapped", [True, False], ids=["DDP-2-pieces", "module"])
@pytest.mark.parametrize("name", METHODS)
def test_a_global_ascent_equals_one_process_with_the_joint_batch(found, name, wrapped):
    network = Network()
    method = METHODS[name](network)
    losses, norms, weights = trained(method, lambda step: joint(network, step))
    for rank in (0, 1):
        ours = found[rank][name, "global", "equal", wrapped]
        assert ours[0] == pytest.approx(losses, rel=tolerance(name)["rtol"])
        assert ours[1] == pytest.approx(norms, rel=2e-6)
        torch.testing.assert_close(ours[2], weights, **tolerance(name))
        assert ours[3] == pytest.approx(float(method.report.get("effective_sample_size", 0)), rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_ranks_with_unequal_parts_count_by_size(found, name):
    network = Network()
    method = METHODS[name](network)

    def pieces(step):  # what the ranks ran: 4 and 8 examples
        return [closure(network, step, 0, 4), closure(network, step, 4, 12)]

    losses, _, weights = trained(method, pieces)
    for rank in (0, 1):
        ours = found[rank][name, "global", "unequal", False]
        assert ours[0] == pytest.approx(losses, rel=tolerance(name)["rtol"])
        torch.testing.assert_close(ours[2], weights, **tolerance(name))


@pytest.mark.parametrize("sizes", PARTS)
@pytest.mark.parametrize("name", METHODS)
def test_a_local_ascent_is_the_mean_of_each_ranks_own(found, name, sizes):
    network = Network()
    parts = PARTS[sizes]
    reference = LocalReference(METHODS[name], network, parts)
    losses, norms, weights = trained(reference, lambda step: split(network, step, parts))
    for rank in (0, 1):
        ours = found[rank][name, "local", sizes, False]
        assert ours[0] == pytest.approx(losses, rel=1e-12)
        assert ours[1] == pytest.approx(norms, rel=1e-9)
        torch.testing.assert_close(ours[2], weights, **EXACT)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "plain"])
def test_the_two_modes_differ(found, name):
    a, b = (found[0][name, ascent, "equal", False][2] for ascent in ("global", "local"))
    assert max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) > 1e-4


def test_ranks_hold_the_same_bits(found):
    for key in found[0]:
        if len(key) == 4:
            assert all(torch.equal(x, y) for x, y in zip(found[0][key][2], found[1][key][2], strict=True)), key


def test_a_parameter_that_no_rank_reached_gets_no_gradient(found):
    start = Network()
    names = [n for n, _ in start.named_parameters()]
    after = dict(zip(names, found[0]["sam", "global", "equal", True][2], strict=True))
    assert torch.equal(after["unused.weight"], start.unused.weight)  # else weight decay would have shrunk it
    assert not torch.equal(after["sometimes.weight"], start.sometimes.weight)


def test_one_ranks_infinite_loss_stops_both_and_leaves_the_weights(found):
    network = Network()
    mean = float(Plain(network).backward(joint(network, 0)))
    for rank in (0, 1):
        for raised, same, no_gradient, loss in found[rank]["not finite"]:
            assert (raised, same, no_gradient) == ("NonFiniteGradient", True, True)
            assert loss == pytest.approx(mean, rel=1e-12)


def test_the_gradient_is_added_to_an_earlier_one(found):
    network = Network()
    SAM(network, 0.3).backward(joint(network, 0))
    bias, unused = found[1]["earlier"]
    torch.testing.assert_close(bias, network.first.bias.grad + 7, **EXACT)
    torch.testing.assert_close(unused, torch.full_like(unused, 5.0))


def test_a_scaler_scales_the_joint_gradient_once(found):
    network = Network()
    SAM(network, 0.3).backward(joint(network, 0))
    torch.testing.assert_close(found[0]["scaled"], 1024 * network.last.weight.grad, **EXACT)


def test_fresh_masks_keep_the_ranks_probes_together(found):
    (state_0, error_0), (state_1, error_1) = found[0]["fresh"], found[1]["fresh"]
    assert torch.equal(state_0, state_1)
    assert error_0 == error_1
    assert "[1, 2]" in error_0


def test_a_rank_whose_pass_does_not_fit_the_layers_takes_the_others_with_it(found):
    """What the ranks probe, and so the directions that they draw, are the same again from that step on."""
    (ours, our_notes), (theirs, their_notes) = found[0]["left out"], found[1]["left out"]
    whole = sum(p.numel() for p in Stack().parameters())
    assert [size for _, size, _ in ours] == [size for _, size, _ in theirs] == [78, whole, whole, whole]
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(one[2], other[2]) and one[0] == pytest.approx(other[0])
        if step != 1:  # in which the ranks' losses are not the same
            assert one[0] == pytest.approx(0.5)
    assert "leave layers out" in our_notes[0] and "another process's passes do not fit" in their_notes[0]


def test_distributed_data_parallel_reduces_nothing_itself(found):
    ours, its_own = found[0]["no_sync"]
    assert ours == 0
    assert its_own > 0  # so the count can see one


def test_what_cannot_be_done_is_refused(tmp_path):
    network = Network()
    with pytest.raises(ValueError, match="init_process_group"):
        Distributed(SAM(network))
    with pytest.raises(ValueError, match="'global' or 'local'"):
        Distributed(SAM(network), ascent="both")

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"GroupSAM cannot ascend on the joint batch \(its groups.*'local'"):
            Distributed(GroupSAM(network))
        with pytest.raises(ValueError, match=r"\(weighting Gap needs the joint batch's cosines\); use ascent='local'"):
            Distributed(DeltaSAM(network, weighting="gap"))
        with pytest.raises(ValueError, match="none of the method's parameters"):
            Distributed(SAM(Network())).backward(closure(network, 0, 0, 6))
    finally:
        dist.destroy_process_group()


def test_every_rank_reduces_the_dtypes_in_the_parameters_order(monkeypatch):
    """A set's order is each process's own, and ranks in other orders would add up what does not belong together."""
    dtypes = [torch.float64, torch.float16, torch.float32, torch.bfloat16]
    params = [torch.ones(2, dtype=dtype) for dtype in dtypes]
    seen = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: seen.append(tensor.dtype))
    step = SimpleNamespace(params=params, group=None, sum=lambda *values: [torch.as_tensor(v) for v in values])
    reduced = JointStep.reduced(step, [2 * p for p in params], 0.5)
    assert seen == dtypes
    assert all(torch.equal(one, p) for one, p in zip(reduced, params, strict=True))


@pytest.mark.parametrize("scaled", [False, True])
def test_looksam_s_steps_stay_of_one_kind_on_all_ranks(found, scaled):
    """A step that is not taken anywhere is counted nowhere: the third is then of the second's kind."""
    own, other = (found[rank]["phases"][scaled] for rank in (0, 1))
    skipped = 0.0 if scaled else -1.0
    assert own == other == ([1.0, skipped, 0.0, 0.0, 1.0, 0.0], 5)


def test_what_is_set_on_the_wrapper_is_the_method_s(found):
    for rank in (0, 1):
        assert found[rank]["scheduled"] == pytest.approx((0.7, 0.7, 0.7))
