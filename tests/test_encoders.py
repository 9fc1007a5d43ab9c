"""Methods that look inside a model, with many families of encoders: each beside a reference that does not look."""

import encoders
import pytest
import torch
import torch.nn.functional as F
import transformers

from dsam import ExampleLosses
from dsam.methods import METHODS, DeltaSAM, PerInstance, factors, one_by_one
from dsam.methods.layer_kinds import kind_of
from dsam.methods.layers import TopLayers
from dsam.methods.per_example import PerExampleGradients
from dsam.methods.perturbation import perturbed
from dsam.methods.step import Step
from dsam.methods.weighting import Equalised, LossChange, Probe

RADIUS = 0.3
WHOLE = {"albert", "funnel", "squeezebert", "xlm"}  # their layers are shared, nested or written over
SINGLY = {"deberta", "xlnet", "funnel", "opt", "convbert", "squeezebert"}
"""Families of which exact per-example quantities come from passes over single examples."""
ROUGH = {"llama", "qwen2", "t5", "deberta", "funnel"}
"""Families that compute their norms in float32, whatever their weights are."""

pytestmark = pytest.mark.filterwarnings(
    "ignore:layers=2", "ignore:per_instance runs one example", "ignore:weighting .* looks at one example"
)


class Seen(LossChange):
    """Keeps what the probe saw."""

    def scores(self, losses, probe):
        self.losses, self.probe = losses, probe
        return super().scores(losses, probe)


def losses_of(model, parts):
    """With the masks that a step draws first."""
    torch.manual_seed(9)
    with torch.no_grad():
        return torch.cat([part() for part in parts])


def moved_by_each(model, parts, layers):
    """(the parameters that move the losses and not what goes into the last `layers` layers; those that move neither, as
    the bias of the keys, which softmax takes out again), found by moving each."""
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(set(map(type, m))) == 1]
    longest = max(map(len, stacks))
    stack = [m for m in stacks if len(m) == longest][-1]
    below = []

    def keep(_, __, output):
        below.extend(x.detach().clone() for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, torch.Tensor))

    def run():
        below.clear()
        return losses_of(model, parts), list(below)

    with stack[-layers - 1].register_forward_hook(keep):
        (losses, given), above, inert = run(), [], []
        for p in model.parameters():
            generator = torch.Generator().manual_seed(4)
            with perturbed([p], [torch.randn(p.shape, generator=generator, dtype=p.dtype)], 0.5):
                losses_now, given_now = run()
            if all(map(torch.equal, given, given_now)):
                (inert if torch.equal(losses_now, losses) else above).append(p)
    return above, inert


@pytest.mark.parametrize("family", encoders.FAMILIES)
def test_probes_of_the_top_layers_are_those_of_a_whole_pass(family):
    """δ-SAM's probes from the top two layers on, batches in pieces of two lengths, dropout and all."""
    model = encoders.model(family)
    parts = [ExampleLosses(model, encoders.batch(5, 9)), ExampleLosses(model, encoders.batch(3, 8, seed=2))]
    weighting = Seen(layers=2, radius=RADIUS)
    method = DeltaSAM(model, 0.05, weighting, seed=3)
    torch.manual_seed(9)
    method.backward(parts)
    assert bool(method.notes) == (family in WHOLE)
    torch.testing.assert_close(weighting.losses, losses_of(model, parts), rtol=1e-9, atol=1e-9)
    if family in WHOLE:
        assert weighting.probe.dimension == sum(p.numel() for p in model.parameters())
        return
    above, (must, may) = method._top.params, moved_by_each(model, parts, 2)
    assert set(must) <= set(above) <= {*must, *may}
    assert weighting.probe.dimension == sum(p.numel() for p in above)
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in above]
    length = torch.sqrt(sum(v.square().sum() for v in noise))
    with perturbed(above, noise, float(RADIUS / length)):
        torch.testing.assert_close(weighting.probe.plus[0], losses_of(model, parts), rtol=1e-9, atol=1e-9)
    assert (weighting.probe.plus[0] - weighting.losses).abs().max() > 1e-6


def gradient(model, loss):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found, strict=True)]


def single(model, data, i):
    """Example i's loss alone."""
    inputs = {name: value[i : i + 1] for name, value in data.items() if name != "labels"}
    return F.cross_entropy(model(**inputs).logits, data["labels"][i : i + 1])


def assert_gradient(model, expected, limit):
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, g, rtol=limit, atol=limit)


def norm_of(gradients):
    return float(torch.sqrt(sum(g.square().sum() for g in gradients)))


@pytest.mark.parametrize("tokens", [9, 5])
@pytest.mark.parametrize("family", encoders.FAMILIES)
def test_per_instance_is_a_loop_over_the_examples(family, tokens):
    """With as many tokens as examples, too, where a table of relative positions looks like a batch."""
    if family == "convbert" and tokens == 5:
        pytest.skip("its convolution is wider")
    model, data, rho = encoders.model(family).eval(), encoders.batch(5, tokens), 0.1
    params = list(model.parameters())
    expected = [torch.zeros_like(p) for p in params]
    for i in range(5):
        ascent = gradient(model, single(model, data, i))
        with perturbed(params, ascent, rho / norm_of(ascent)):
            torch._foreach_add_(expected, gradient(model, single(model, data, i)), alpha=1 / 5)
    method = PerInstance(model, rho=rho)
    method.backward(ExampleLosses(model, data))
    assert method.singly == (family in SINGLY) == bool(method.notes)
    assert_gradient(model, expected, 1e-6 if family in ROUGH else 1e-9)


@pytest.mark.parametrize("family", ["bert", "albert", "mpnet", "deberta_v2", "gpt2", "t5", "bart", "llama"])
def test_per_instance_is_that_loop_by_fewer_operators_too(family, monkeypatch):
    """As on a GPU: weights of their own, shared, turned, tied to the words, and without biases."""
    monkeypatch.setattr(factors, "launches_cost", lambda device: True)
    test_per_instance_is_a_loop_over_the_examples(family, 9)
    test_exact_weightings_are_of_each_examples_own_gradient(family, 1, ["exact_curvature"])


UNSHARED = dict(share_att_key=False, norm_rel_ebd="none")
DISENTANGLED = {
    "longer than the table": dict(position_buckets=-1, max_relative_positions=3),
    "projections of its own": UNSHARED,
    "keys alone": UNSHARED | dict(pos_att_type="c2p", position_buckets=-1),
    "queries alone": dict(pos_att_type="p2c"),
    "checkpointed": {},
    "with a convolution": dict(conv_kernel_size=3, conv_act="gelu"),
}


@pytest.mark.parametrize("settings", DISENTANGLED.values(), ids=DISENTANGLED)
def test_relative_positions_of_deberta_are_each_examples_own(settings):
    """With dropout: the losses of a plain pass, their norms by a loop, and the losses where all weights have moved."""
    model, data = encoders.model("deberta_v2", **settings), encoders.batch(5, 9)
    part, gradients = ExampleLosses(model, data), PerExampleGradients(model)
    torch.manual_seed(9)
    expected = part()
    own = [
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True) for loss in expected
    ]
    if not settings:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(9)
    with gradients.record():
        losses = part()
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    gradients.backward(losses)
    norms = torch.stack([sum(g.square().sum() for g in one if g is not None) for one in own])
    torch.testing.assert_close(gradients.squared_norms(), norms, rtol=1e-10, atol=1e-14)
    with torch.no_grad(), gradients.perturbed(torch.full((5,), 0.3, dtype=torch.float64)):
        torch.manual_seed(9)
        moved = part()
    for i, one in enumerate(own):
        ascent = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), one, strict=True)]
        with torch.no_grad(), perturbed(list(model.parameters()), ascent, 0.3):
            torch.manual_seed(9)
            torch.testing.assert_close(part()[i], moved[i], rtol=1e-10, atol=1e-12)
    assert not any("forward" in vars(module) or "get_rel_pos" in vars(module) for module in model.modules())


def curvature(model, data, i, own, length=1e-2):
    """‖H ĝ‖ of example i along its own gradient, by central differences."""
    sides = []
    for sign in (1, -1):
        with perturbed(list(model.parameters()), own, sign * length / norm_of(own)):
            sides.append(gradient(model, single(model, data, i)))
    return norm_of(torch._foreach_sub(*sides)) / (2 * length)


EXACT = ["relative_gap", "exact_curvature", "gibbs"]


@pytest.mark.parametrize(
    ("family", "pieces"),
    [(family, 1) for family in (*sorted(SINGLY), "mpnet", "deberta_v2", "gpt2", "qwen2", "t5", "bart")]
    + [(family, 2) for family in ("xlnet", "deberta_v2", "bart")],
)
def test_exact_weightings_are_of_each_examples_own_gradient(family, pieces, names=EXACT):
    """The step's gradient beside that at w + ρ Σ p_i g_i / ‖…‖; pieces of different lengths, too."""
    model, rho = encoders.model(family).eval(), 0.1
    parts = [encoders.batch(5, 9)] if pieces == 1 else [encoders.batch(3, 9), encoders.batch(2, 12, seed=4)]
    places = [(part, i) for part in parts for i in range(len(part["labels"]))]
    own = [gradient(model, single(model, part, i)) for part, i in places]
    norms = torch.tensor([norm_of(g) for g in own], dtype=torch.float64)
    for name in names:
        if name == "exact_curvature":
            bent = [curvature(model, *place, g) for place, g in zip(places, own, strict=True)]
            scores = torch.tensor(bent, dtype=torch.float64) / norms
        elif name == "relative_gap":
            mean = [sum(several) / len(own) for several in zip(*own, strict=True)]
            along = torch.stack([sum((a * b).sum() for a, b in zip(g, mean, strict=True)) for g in own])
            scores = 1 - along / (norms * norm_of(mean))
        else:
            scores = torch.exp(norms - norms.max())
        p = scores / scores.sum()
        ascent = [sum(float(w) * g for w, g in zip(p, several, strict=True)) for several in zip(*own, strict=True)]
        with perturbed(list(model.parameters()), ascent, rho / norm_of(ascent)):
            expected = mean_gradient(model, places)
        method = DeltaSAM(model, rho, name, **({"norms": "exact"} if name == "gibbs" else {}))
        model.zero_grad()
        method.backward([ExampleLosses(model, part) for part in parts])
        assert method.singly == (family in SINGLY) == bool(method.notes)
        assert_gradient(model, expected, 1e-5 if family in ROUGH else 1e-8)


@pytest.mark.parametrize("family", encoders.FAMILIES)
def test_what_looks_at_single_examples_is_right_in_pieces(family):
    """Per-instance perturbation, by layers and in groups of one, and weightings of exact gradients, in two pieces of
    different lengths, beside a loop over the examples."""
    model, rho = encoders.model(family).eval(), 0.1
    parts = [encoders.batch(2, 9), encoders.batch(2, 12, seed=4)]
    places = [(part, i) for part in parts for i in range(len(part["labels"]))]
    own = [gradient(model, single(model, *place)) for place in places]
    flat = torch.stack([torch.cat([g.flatten() for g in one]) for one in own])
    norms, mean = flat.norm(dim=1), flat.mean(0)
    apart = 1 - flat @ mean / (norms * mean.norm())
    with torch.no_grad():
        likely = torch.stack([single(model, *place) for place in places]).neg().exp()
    # Of two classes Gauss-Newton's score is ‖g_i‖ p_y/(1 − p_y).
    scores = {"gap": norms * apart, "gauss_newton": norms * likely / (1 - likely)}
    scores["equalised"] = Equalised().scores(norms, Probe(norms=norms, gram=flat @ flat.T))
    expected = {}
    for name, score in scores.items():
        ascent = [sum(float(p) * g for p, g in zip(score, one, strict=True)) for one in zip(*own, strict=True)]
        with perturbed(list(model.parameters()), ascent, rho / norm_of(ascent)):
            expected[name] = mean_gradient(model, places)
    each = [torch.zeros_like(p) for p in model.parameters()]
    for place, g in zip(places, own, strict=True):
        with perturbed(list(model.parameters()), g, rho / norm_of(g)):
            torch._foreach_add_(each, gradient(model, single(model, *place)), alpha=1 / len(places))
    limit = 1e-5 if family in ROUGH else 1e-6
    methods = {name: DeltaSAM(model, rho, name) for name in scores}
    methods |= {"per_instance": PerInstance(model, rho=rho), "m_sam": METHODS["m_sam"](model, rho=rho, m=1)}
    for name, method in methods.items():
        model.zero_grad()
        method.backward([ExampleLosses(model, part) for part in parts])
        wanted = expected.get(name, each)
        largest = max(float(g.abs().max()) for g in wanted)
        for p, g in zip(model.parameters(), wanted, strict=True):
            found = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(found, g, rtol=0, atol=limit * largest, msg=lambda m, name=name: f"{name}: {m}")


def mean_gradient(model, places, weights=None):
    """Σ_i p_i g_i, one example after the other; uniform p where none are given."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    for k, (part, i) in enumerate(places):
        share = 1 / len(places) if weights is None else float(weights[k])
        torch._foreach_add_(total, gradient(model, single(model, part, i)), alpha=share)
    return total


@pytest.mark.parametrize(("name", "pieces"), [("plain", 2), ("sam", 2), ("dsam", 1), ("dsam", 2), ("dsam_whole", 2)])
@pytest.mark.parametrize("family", encoders.FAMILIES)
def test_a_step_is_that_of_a_loop_over_the_examples(family, name, pieces):
    """The gradient of the mean loss at w + ρ Σ p_i g_i / ‖…‖, from single examples; pieces of different lengths."""
    model, rho = encoders.model(family).eval(), 0.1
    parts = [encoders.batch(3, 9)] if pieces == 1 else [encoders.batch(2, 9), encoders.batch(2, 12, seed=4)]
    weighting = Seen(layers=2 if name == "dsam" else None, radius=RADIUS)
    method = METHODS[name](model, **({"rho": rho} if name == "sam" else {})) if name in METHODS else None
    method = method or DeltaSAM(model, rho, weighting, seed=3)
    loss = method.backward([ExampleLosses(model, part) for part in parts])
    places, rise = [(part, i) for part in parts for i in range(len(part["labels"]))], None
    torch.testing.assert_close(loss, torch.stack([single(model, *place) for place in places]).mean().detach())
    if name.startswith("dsam"):
        rise = (weighting.probe.plus[0] - weighting.losses).abs()
    ascent = mean_gradient(model, places, None if rise is None else rise / rise.sum())
    with perturbed(list(model.parameters()), ascent, 0 if name == "plain" else rho / norm_of(ascent)):
        expected = mean_gradient(model, places)
    assert_gradient(model, expected, 1e-6 if family in ROUGH else 1e-9)


def logits_from(model, embedded, inputs):
    """The logits where the words are embedded already, each kind of model asked in its own way."""
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    if model.config.is_encoder_decoder:
        return model(**inputs, encoder_outputs=model.get_encoder()(inputs_embeds=embedded, attention_mask=mask)).logits
    if hasattr(model, "score"):  # a decoder, which would look for the last word in the ids
        hidden = model.base_model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        return model.score(hidden)[torch.arange(len(ids)), mask.sum(1) - 1]
    return model(inputs_embeds=embedded, attention_mask=mask).logits


@pytest.mark.parametrize("tokens", [9, 5])
@pytest.mark.parametrize("family", encoders.FAMILIES)
def test_noise_is_on_each_examples_own_words(family, tokens):
    """As many tokens as examples too, where a table whose sequence comes first looks like one whose batch does."""
    if family == "convbert" and tokens == 5:
        pytest.skip("its convolution is wider")
    model, data = encoders.model(family).eval(), encoders.batch(5, tokens)
    inputs = {name: value for name, value in data.items() if name != "labels"}
    table = model.get_encoder().embed_tokens if model.config.is_encoder_decoder else model.get_input_embeddings()
    words = table(inputs["input_ids"])
    noise = 0.3 * torch.randn(words.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = logits_from(model, words + noise * inputs["attention_mask"].unsqueeze(-1), inputs)
    _, logits = ExampleLosses(model, data).outputs(noise)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert (logits - model(**inputs).logits).abs().max() > 1e-6
    assert not any(module._forward_hooks for module in model.modules())


LOUD = {"r3f": {"sigma": 0.1}, "freelb": {}, "smart": {"sigma": 0.1, "radius": 0.3}}


@pytest.mark.parametrize("name", LOUD)
@pytest.mark.parametrize("family", ["mpnet", "deberta_v2", "modernbert", "xlnet", "t5", "bart"])
def test_methods_with_noise_are_not_plain_training(family, name):
    model = encoders.model(family).eval()
    METHODS[name](model, **LOUD[name]).backward(ExampleLosses(model, encoders.batch()))
    plain = gradient(model, ExampleLosses(model, encoders.batch())().mean())
    moved = max(
        float((p.grad - g).abs().max()) for p, g in zip(model.parameters(), plain, strict=True) if p.grad is not None
    )
    assert moved > 1e-12  # of plain training, which is equal to 1e-16


def test_noise_is_on_the_words_of_a_model_that_pads_to_its_window():
    torch.manual_seed(0)
    config = transformers.LongformerConfig(
        **encoders.PLACES | {"attention_window": [8] * encoders.L, "num_labels": 2, "max_position_embeddings": 60}
    )
    model, data = transformers.LongformerForSequenceClassification(config).double().eval(), encoders.batch(5, 9)
    inputs = {name: value for name, value in data.items() if name != "labels"}
    words = model.get_input_embeddings()(inputs["input_ids"])
    noise = 0.3 * torch.randn(words.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = []
    hook = model.longformer.embeddings.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    _, logits = ExampleLosses(model, data).outputs(noise)
    hook.remove()
    assert seen == [16]  # of 9
    embedded = words + noise * inputs["attention_mask"].unsqueeze(-1)
    wide = torch.nn.functional.pad(inputs["input_ids"], (0, 7), value=1)
    embedded = torch.cat([embedded, model.get_input_embeddings()(wide[:, 9:])], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 7))
    places = transformers.models.longformer.modeling_longformer.create_position_ids_from_input_ids(wide, 1)
    first = torch.zeros_like(wide).index_fill(1, torch.tensor([0]), 1)
    expected = model(
        inputs_embeds=embedded, attention_mask=mask, position_ids=places, global_attention_mask=first
    ).logits
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def test_noise_is_refused_where_other_words_are_looked_up():
    model = encoders.model("bert").eval()
    words = model.get_input_embeddings()
    words.register_forward_pre_hook(lambda _, args: (args[0].roll(1),))
    data = encoders.batch(5, 5)
    with pytest.raises(ValueError, match="BertForSequenceClassification looks up other words than its input_ids"):
        METHODS["r3f"](model).backward(ExampleLosses(model, data))


def test_examples_that_depend_on_one_another_have_no_gradient_of_their_own():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\) makes an example's loss depend"):
        PerInstance(model)
    assert PerInstance(model.eval()).singly


def test_a_stack_that_is_left_whole_is_itself_again_whatever_happens():
    model = encoders.model("mpnet")
    top = TopLayers(model, 2)
    part = ExampleLosses(model, encoders.batch())
    with top.record():
        part()
    with pytest.raises(RuntimeError, match="on purpose"), top.resume():
        raise RuntimeError("on purpose")
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["electra", "mpnet", "t5"])
def test_probes_go_on_in_float32_from_what_autocast_left_narrow(family):
    """ELECTRA's words are narrower than its layers, which a layer in bfloat16 widens."""
    model, weighting = encoders.model(family, torch.float32).eval(), Seen(layers=3, radius=1e-3)
    data, probed = encoders.batch(), set()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda _, __, y: None if torch.is_grad_enabled() else probed.add(y.dtype))
    DeltaSAM(model, 0.05, weighting).backward(ExampleLosses(model, data, torch.bfloat16))
    assert probed == {weighting.probe.plus.dtype} == {torch.float32}
    clean = ExampleLosses(model, data)().detach()
    torch.testing.assert_close(weighting.probe.plus[0], clean, rtol=0.02, atol=0.02)


def test_products_are_the_same_however_few_gradients_are_held(monkeypatch):
    model = encoders.model("xlnet").eval()
    found = []
    for held in (2**28, 2 * sum(p.numel() for p in model.parameters())):
        monkeypatch.setattr(one_by_one, "HELD", held)
        part = ExampleLosses(model, encoders.batch())
        found.append(one_by_one.OneByOne(Step(DeltaSAM(model), part)).gram())
    own = [gradient(model, single(model, encoders.batch(), i)) for i in range(5)]
    flat = torch.stack([torch.cat([g.flatten() for g in one]) for one in own])
    for gram in found:
        torch.testing.assert_close(gram, flat @ flat.T, rtol=1e-10, atol=1e-14)


def test_one_example_at_a_time_is_refused_on_the_joint_batch_of_several_processes():
    class Joint(Step):
        alone = False

    model = encoders.model("xlnet")
    method = PerInstance(model)
    with pytest.raises(ValueError, match="use ascent='local'"):
        method.take(Joint(method, ExampleLosses(model, encoders.batch())))


class Norm(torch.nn.Module):
    def __init__(self, mean=None, bias=True):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(4))
        self.bias = torch.nn.Parameter(torch.rand(4)) if bias else None
        self.mean = mean

    def forward(self, x):
        x = x if self.mean is None else x - x.mean(self.mean, keepdim=True)
        return x * (1 + self.weight) + (0 if self.bias is None else self.bias)


class Soft(Norm):
    def forward(self, x):
        return x * self.weight.softmax(0)


@pytest.mark.parametrize(
    ("module", "known"),
    [
        (Norm(), True),
        (Norm(mean=-1, bias=False), True),
        (Norm(mean=0), False),  # over the batch
        (Soft(bias=False), False),
        (torch.nn.RMSNorm(4), True),
        (torch.nn.BatchNorm1d(4).eval(), False),
        (torch.nn.GroupNorm(2, 4), False),
        (torch.nn.PReLU(4), False),
        (torch.nn.Conv1d(4, 4, 1), False),
    ],
)
def test_a_layer_that_scales_is_known_by_what_it_computes(module, known):
    before = [p.detach().clone() for p in module.parameters()]
    assert (kind_of(module) == "scale") == known
    assert all(map(torch.equal, before, module.parameters()))
