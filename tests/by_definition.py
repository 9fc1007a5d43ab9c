"""Each method's gradient from its formula, one example after the other by `functional_call`: it knows nothing of what a
model is wrapped in, and nothing of the library."""

import copy

import torch
import torch.nn.functional as F
from torch.func import functional_call

RHO, RADIUS, SEED = 0.3, 0.3, 3


class Examples:
    """The losses of a batch and their gradients at any weights, in float64; of a model in evaluation mode, whose
    trained weights are one vector `w`. `drawn_in` are the weights' own precisions, in which noise is drawn."""

    def __init__(self, model, data):
        named = [(name, p.dtype) for name, p in model.named_parameters() if p.requires_grad]
        self.drawn_in, model = dict(named), copy.deepcopy(model).double()
        self.model, self.labels = model, data["labels"]
        self.inputs = {name: value for name, value in data.items() if name != "labels"}
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.w = torch.cat([p.detach().flatten() for p in self.named.values()])
        self.everyone = range(len(self.labels))

    def split(self, w):
        parts = w.split([p.numel() for p in self.named.values()])
        return {name: part.view_as(p) for (name, p), part in zip(self.named.items(), parts, strict=True)}

    def logits(self, w, i, noise=None):
        """(1, C) of example i; noise (T, d) on its embedded words."""
        inputs = {name: value[i : i + 1] for name, value in self.inputs.items()}
        words = self.model.get_input_embeddings()
        with words.register_forward_hook(lambda _, __, out: out if noise is None else out + noise):
            return functional_call(self.model, self.split(w), kwargs=inputs).logits

    def loss(self, w, i, noise=None):
        return F.cross_entropy(self.logits(w, i, noise), self.labels[i : i + 1])

    def losses(self, w):
        with torch.no_grad():
            return torch.stack([self.loss(w, i) for i in self.everyone])

    def gradient(self, w, of=None):
        """Of `of(w)`, by default of the mean loss."""
        w = w.detach().requires_grad_()
        loss = torch.stack([self.loss(w, i) for i in self.everyone]).mean() if of is None else of(w)
        return torch.autograd.grad(loss, w)[0]

    def own(self, w, i):
        return self.gradient(w, lambda w: self.loss(w, i))


def unit(g):
    return g / g.norm()


def sam(x, ascent=None):
    return x.gradient(x.w + RHO * unit(x.gradient(x.w) if ascent is None else ascent))


def asam(x, eta=0.01):
    """T = 1 for what is not called a weight."""
    g, scaled = x.gradient(x.w), [torch.full_like(p, "weight" in name).flatten() for name, p in x.named.items()]
    t = torch.where(torch.cat(scaled) == 1, x.w.abs() + eta, 1)
    return x.gradient(x.w + RHO * t * t * g / (t * g).norm())


def gsam(x, alpha=0.4):
    g, there = x.gradient(x.w), sam(x)
    return there - alpha * (g - (g @ unit(there)) * unit(there))


def in_groups(x, m):
    total = 0
    for start in range(0, len(x.labels), m):
        group = x.everyone[start : start + m]

        def loss(w, group=group):
            return torch.stack([x.loss(w, i) for i in group]).mean()

        total = total + len(group) * x.gradient(x.w + RHO * unit(x.gradient(x.w, loss)), loss)
    return total / len(x.labels)


def probe(x, top=lambda name: True):
    """|ℓ_i(w+v) − ℓ_i(w)|, v Gaussian of norm RADIUS in the weights that `top` names."""
    generator = torch.Generator().manual_seed(SEED)
    v = [
        torch.randn(p.shape, generator=generator, dtype=x.drawn_in[name]).double() if top(name) else torch.zeros_like(p)
        for name, p in x.named.items()
    ]
    v = torch.cat([part.flatten() for part in v])
    return (x.losses(x.w + RADIUS * unit(v)) - x.losses(x.w)).abs()


def gibbs(x):
    norms = torch.stack([x.own(x.w, i).norm() for i in x.everyone])
    return (norms - norms.max()).exp()


def relative_gap(x):
    g = x.gradient(x.w)
    return torch.stack([1 - unit(x.own(x.w, i)) @ unit(g) for i in x.everyone])


def gauss_newton(x):
    """Of two classes: ‖g_i‖ p_y/(1 − p_y)."""
    p = (-x.losses(x.w)).exp()
    return torch.stack([x.own(x.w, i).norm() for i in x.everyone]) * p / (1 - p)


def exact_curvature(x, length=1e-2):
    scores = []
    for i in x.everyone:
        g = x.own(x.w, i)
        bent = x.own(x.w + length * unit(g), i) - x.own(x.w - length * unit(g), i)
        scores.append(bent.norm() / (2 * length) / g.norm())
    return torch.stack(scores)


def weighted(x, scores):
    p = scores / scores.sum()
    return sam(x, sum(float(p[i]) * x.own(x.w, i) for i in x.everyone))


def freelb(x, steps=3, step_size=0.1):
    """From no noise at first, init=0."""
    ids, mask = x.inputs["input_ids"], x.inputs["attention_mask"]
    total = 0
    for i in x.everyone:
        noise = torch.zeros(ids.shape[1], x.model.get_input_embeddings().weight.shape[1], dtype=x.w.dtype)
        for _ in range(steps):
            total = total + x.gradient(x.w, lambda w, i=i, noise=noise: x.loss(w, i, noise)) / steps / len(ids)
            noise = noise.detach().requires_grad_()
            slope = torch.autograd.grad(x.loss(x.w, i, noise), noise)[0] * mask[i, :, None]
            noise = noise.detach() + step_size * unit(slope)
    return total


def top_layers(name):
    """Of BERT with three layers: what the upper two and the head own."""
    return "layer.0." not in name and "embeddings" not in name


FORMULAS = {
    "plain": lambda x: x.gradient(x.w),
    "sam": sam,
    "asam": asam,
    "gsam": gsam,
    "looksam": sam,  # in its first step, as the next two
    "fsam": sam,
    "ae_sam": sam,
    "m_sam": lambda x: in_groups(x, 2),
    "per_instance": lambda x: in_groups(x, 1),
    "freelb": freelb,
    "rdrop": lambda x: 2 * x.gradient(x.w),  # without dropout
    "delta_sam-uniform": sam,
    "delta_sam-probe": lambda x: weighted(x, probe(x)),
    "delta_sam-top": lambda x: weighted(x, probe(x, top_layers)),
    "delta_sam-gibbs": lambda x: weighted(x, gibbs(x)),
    "delta_sam-relative_gap": lambda x: weighted(x, relative_gap(x)),
    "delta_sam-gauss_newton": lambda x: weighted(x, gauss_newton(x)),
    "delta_sam-exact_curvature": lambda x: weighted(x, exact_curvature(x)),
}
"""The first step of each, by a name of METHODS and of a weighting."""

OPTIONS = {
    "m_sam": {"m": 2},
    "freelb": {"init": 0.0},
    "delta_sam-probe": {"weighting": "probe", "radius": RADIUS},
    "delta_sam-top": {"weighting": "probe", "radius": RADIUS, "layers": 2},
    "delta_sam-gibbs": {"weighting": "gibbs", "norms": "exact"},
}


def options(name):
    """With which the library's method is that of FORMULAS."""
    kind, _, weighting = name.partition("-")
    found = {"weighting": weighting} if weighting else {}
    if kind not in ("plain", "freelb", "rdrop"):
        found["rho"] = RHO
    return {"seed": SEED} | found | OPTIONS.get(name, {})
