"""Sharpness measures against exact Hessians, closed forms and the real command."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import command
from matplotlib.figure import Figure
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from dsam import ExampleLosses
from dsam.errors import UserError
from dsam.runs.kept import read_run
from dsam.sharpness import Objective, filter_normalised, line, plane, rises, top_eigenvalues, trace
from dsam.sharpness.measure import main
from dsam.sharpness.surface import plane_figure


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(n=11):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g)


def objective(model):
    """In two closures of unequal size."""
    x, y = batch()
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    return Objective(
        [lambda x=x, y=y: nn.functional.cross_entropy(model(x), y, reduction="none") for x, y in parts],
        list(model.parameters()),
    )


def exact_hessian(model):
    """By torch.autograd.functional, of the undivided batch."""
    x, y = batch()
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(flat):
        parts = flat.split([s.numel() for s in shapes])
        values = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, values, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    return torch.autograd.functional.hessian(loss, flat), torch.autograd.functional.jacobian(loss, flat)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def test_gradient_and_hessian_vector_product_are_those_of_the_mean_over_unequal_pieces():
    model = network()
    hessian, gradient = exact_hessian(model)
    ours = objective(model)
    torch.testing.assert_close(flat(ours.gradient()), gradient, rtol=1e-10, atol=1e-12)
    g = torch.Generator().manual_seed(3)
    v = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in model.parameters()]
    torch.testing.assert_close(flat(ours.hessian_vector(v)), hessian @ flat(v), rtol=1e-10, atol=1e-12)


def test_top_eigenvalues_and_vectors_are_those_of_the_exact_hessian():
    model = network()
    hessian, _ = exact_hessian(model)
    values, vectors = torch.linalg.eigh(hessian)
    spectrum = top_eigenvalues(objective(model), 4, tolerance=1e-8)
    assert spectrum.values == pytest.approx(values.flip(0)[:4].tolist(), rel=1e-7)
    for k, v in enumerate(spectrum.vectors):
        assert abs(float(flat(v) @ vectors[:, -1 - k])) == pytest.approx(1, abs=1e-6)
    assert max(spectrum.residuals) < 1e-6
    loose = top_eigenvalues(objective(model), 4, tolerance=0.3)
    distances = [float((values - value).abs().min()) for value in loose.values]
    assert all(d <= r + 1e-12 for d, r in zip(distances, loose.residuals, strict=True))


def test_largest_means_largest_with_its_sign():
    w = nn.Parameter(torch.tensor([0.5, -0.25, 2.0, 1.0], dtype=torch.float64))
    curvatures = torch.tensor([-9.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    quadratic = Objective([lambda: (0.5 * curvatures @ w**2)[None]], [w])
    assert top_eigenvalues(quadratic, 2).values == pytest.approx([2.0, 1.0])
    assert top_eigenvalues(quadratic, 2, in_size=True).values == pytest.approx([-9.0, 2.0])


@pytest.mark.parametrize("k", [0, 4])
def test_a_number_of_eigenvalues_that_the_model_does_not_have_is_refused(k):
    w = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="k must be"):
        top_eigenvalues(Objective([lambda: (w**2).sum()[None]], [w]), k)


def test_hutchinson_is_exact_for_a_diagonal_hessian_and_unbiased_with_the_error_it_says_for_another():
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    diagonal = torch.tensor([1.0, -4.0, 10.0], dtype=torch.float64)
    mean, error = trace(Objective([lambda: (0.5 * diagonal @ w**2)[None]], [w]), 3)
    assert (mean, error) == (pytest.approx(7.0), pytest.approx(0.0, abs=1e-12))

    model = network()
    hessian, _ = exact_hessian(model)
    mean, error = trace(objective(model), 2000)
    one_probe = math.sqrt(2 * float(hessian.square().sum() - hessian.diagonal().square().sum()))  # its deviation
    assert error == pytest.approx(one_probe / 2000**0.5, rel=0.1)
    assert abs(mean - float(hessian.trace())) < 4 * error
    assert error < 0.1 * float(hessian.trace())  # so that the line above says something
    assert trace(objective(model), 1)[1] is None


def test_a_linear_loss_has_no_curvature():
    w = nn.Parameter(torch.ones(5))
    assert trace(Objective([lambda: w.sum()[None]], [w]), 2) == (0.0, 0.0)
    with pytest.raises(UserError, match=r"^no eigenvalues can be computed \(.*\): --eigenvalues 0 leaves them out"):
        top_eigenvalues(Objective([lambda: w.sum()[None]], [w]), 1)


def test_rises_on_a_quadratic_are_the_closed_form():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(4, 3, 3, generator=g, dtype=torch.float64)
    a = a + a.mT
    b = torch.randn(4, 3, generator=g, dtype=torch.float64)
    w = nn.Parameter(torch.randn(3, generator=g, dtype=torch.float64))
    rho = 0.3

    def closure(of):
        return lambda: 0.5 * torch.einsum("i,bij,j->b", w, a[of], w) + b[of] @ w

    def expected(a, b):  # ρ‖g‖ + ½ ρ² ĝᵀAĝ
        gradient = a @ w.detach() + b
        unit = gradient / gradient.norm()
        return float(rho * gradient.norm() + 0.5 * rho**2 * unit @ a @ unit)

    before = w.detach().clone()
    of_batch = rises([closure(slice(0, 4))], [w], rho)
    assert of_batch.tolist() == pytest.approx([expected(a.mean(0), b.mean(0))], rel=1e-6)
    of_instances = rises([closure(slice(i, i + 1)) for i in range(4)], [w], rho)
    assert of_instances.tolist() == pytest.approx([expected(a[i], b[i]) for i in range(4)], rel=1e-6)
    assert torch.equal(w, before)
    assert w.grad is None


def test_no_gradient_no_rise():
    w = nn.Parameter(torch.zeros(3))
    assert rises([lambda: (w**2).sum()[None]], [w], 0.1).tolist() == [0.0]


def test_filter_normalisation_by_hand():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.6, 0.8]]))
    kernel = nn.Parameter(torch.full((2, 2, 2), 0.5))
    bias = nn.Parameter(torch.tensor([7.0, 8.0]))
    d, k, c = filter_normalised([weight, kernel, bias], torch.Generator().manual_seed(2))
    assert d.norm(dim=1).tolist() == pytest.approx([5.0, 0.0, 1.0], abs=1e-6)  # each row as long as the weights' own
    assert k.flatten(1).norm(dim=1).tolist() == pytest.approx([1.0, 1.0])
    assert c.tolist() == [0.0, 0.0]
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(d[0], 5 * noise[0] / noise[0].norm())
    scaled, *_ = filter_normalised([10 * weight, kernel, bias], torch.Generator().manual_seed(2))
    torch.testing.assert_close(scaled, 10 * d)  # relative steps are the same whatever the scale of the weights


def test_a_filter_of_gpt_2_is_a_column():
    weight = nn.Parameter(torch.tensor([[3.0, 0.0, 0.6], [4.0, 0.0, 0.8]]))  # (in, out)
    (d,) = filter_normalised([weight], torch.Generator().manual_seed(2), [weight])
    assert d.norm(dim=0).tolist() == pytest.approx([5.0, 0.0, 1.0], abs=1e-6)


def test_line_and_plane_are_the_losses_where_they_say():
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    loss = Objective([lambda: (w[0] ** 2 + 10 * w[1])[None]], [w])
    e1, e2 = [torch.tensor([1.0, 0.0], dtype=torch.float64)], [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    steps = [-1.0, 0.0, 2.0]
    assert line(loss, e1, steps).tolist() == [20.0, 21.0, 29.0]
    columns_are_first = [[(1 + a) ** 2 + 10 * (2 + b) for a in steps] for b in steps]
    assert plane(loss, e1, e2, steps).tolist() == columns_are_first
    assert w.tolist() == [1.0, 2.0]


def test_the_hessian_of_a_real_bert_agrees_with_differences_of_its_gradient():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8, attn_implementation="eager",
    )  # fmt: skip
    model = BertForSequenceClassification(config).double().eval()
    ids = 1 + torch.arange(24).remainder(19).view(4, 6)  # not 0: PyTorch gives the padding's embedding no gradient
    inputs = {"input_ids": ids, "labels": torch.tensor([0, 1, 1, 0])}

    class Wide(ExampleLosses):  # float64 throughout
        def __call__(self):
            logits = self.model(**self.inputs).logits
            return nn.functional.cross_entropy(logits, self.labels, reduction="none")

    ours = Objective([Wide(model, inputs)], list(model.parameters()))
    g = torch.Generator().manual_seed(1)
    v = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in model.parameters()]
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(model.parameters(), v, strict=True):
                p.add_(d, alpha=sign * 1e-5)
        sides.append(flat(ours.gradient()))
        with torch.no_grad():
            for p, d in zip(model.parameters(), v, strict=True):
                p.sub_(d, alpha=sign * 1e-5)
    difference = (sides[0] - sides[1]) / 2e-5
    product = flat(ours.hessian_vector(v))
    assert float((product - difference).norm() / difference.norm()) < 1e-6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharpness")
    done = command(
        "train.max_steps=6", "train.batch_size=8", "tracking=disabled", "checkpoint.keep_weights=true", "optimizer=sam",
        f"paths.runs={folder}/runs", f"paths.cache={folder}/cache",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (made,) = (folder / "runs").glob("*/*/*/*")
    return made


QUICK = ["--examples", "10", "--eigenvalues", "1", "--tolerance", "0.1", "--probes", "2", "--line", "3", "--grid", "3"]


@pytest.mark.slow
def test_the_command_measures_a_finished_run(run):
    done = command(str(run), *QUICK, script="sharpness.py")
    assert done.returncode == 0, done.stderr
    out = run / "sharpness" / "last"
    assert done.stdout.splitlines()[-1] == str(out)
    for name in ("line", "plane"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    found = json.loads((out / "sharpness.json").read_text())
    assert found["run"] == run.name
    assert (found["examples"], found["batch_size"]) == (10, 8)
    assert found["rise"]["batch"]["count"] == 1  # the two left over make no batch
    assert found["rise"]["instance"]["count"] == 10
    # The loss may rise by little more than ρ‖g‖ so near; an instance's own gradient is longer than the mean one.
    assert 0 < found["rise"]["batch"]["mean"] < found["rise"]["instance"]["mean"]
    surface = found["surface"]
    assert surface["plane"]["losses"][1][1] == pytest.approx(found["loss"], rel=1e-6)
    random = surface["lines"]["random direction (filter-normalised)"]["losses"]
    assert surface["plane"]["losses"][1] == pytest.approx(random, rel=1e-6)
    along = surface["lines"]["step along the gradient (Euclidean)"]["losses"]
    assert along[1] == pytest.approx(found["loss"], rel=1e-6)
    assert found["eigenvalues"]["asked"] == len(found["eigenvalues"]["values"]) == 1
    assert np.isfinite(found["trace"]["standard_error"])


@pytest.mark.slow
def test_the_same_command_gives_the_same_numbers_and_best_weights_have_their_own_place(run, tmp_path):
    options = [*QUICK, "--weights", "best", "--grid", "0"]
    for name in ("a", "b"):
        main([str(run), *options, "--out", str(tmp_path / name)])
    a, b = (json.loads((tmp_path / name / "sharpness.json").read_text()) for name in ("a", "b"))
    assert a | {"seconds": 0} == b | {"seconds": 0}
    assert a["weights"] == "best"
    assert not (tmp_path / "a" / "plane.png").exists()


@pytest.mark.slow
def test_a_tf32_run_is_measured_in_float32_wherever(run, tmp_path):
    there = tmp_path / "run"
    shutil.copytree(run, there, ignore=shutil.ignore_patterns("sharpness"))
    settings = (there / "config.yaml").read_text()
    (there / "config.yaml").write_text(settings.replace("precision: float32", "precision: tf32"))
    for made in (run, there):
        main([str(made), *QUICK, "--grid", "0", "--line", "0", "--device", "cpu", "--out", str(tmp_path / made.name)])
    a, b = (json.loads((tmp_path / made.name / "sharpness.json").read_text()) for made in (run, there))
    assert a["eigenvalues"] == b["eigenvalues"] and a["rise"] == b["rise"]


@pytest.mark.slow
def test_numbers_stay_where_a_figure_cannot_be_written(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    quick = [str(run), *QUICK, "--grid", "0", "--probes", "0", "--eigenvalues", "0", "--out"]
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device; set --out DIR"):
        main([*quick, str(tmp_path / "full")])
    monkeypatch.setattr("dsam.sharpness.measure.line_figure", lambda *_: 1 / 0)  # as one that cannot be drawn
    with pytest.raises(ZeroDivisionError):
        main([*quick, str(tmp_path / "undrawn")])
    for place in ("full", "undrawn"):
        assert json.loads((tmp_path / place / "sharpness.json").read_text())["loss"] > 0


@pytest.mark.slow
def test_what_was_measured_before_is_neither_lost_nor_left_beside_what_it_is_not_of(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    few = [*("--examples", "4", "--line", "3", "--eigenvalues", "0", "--probes", "2"), "--out", str(out)]
    main([str(run), *few, "--grid", "3"])
    assert (out / "plane.png").exists() and (out / "line.pdf").exists()
    main([str(run), *few, "--grid", "0", "--rho", "0.1"])
    assert not (out / "plane.png").exists() and not (out / "plane.pdf").exists() and (out / "line.pdf").exists()
    assert json.loads((out / "sharpness.json").read_text())["complete"] is True

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dsam.sharpness.measure.plane", stopped)
    with pytest.raises(KeyboardInterrupt):
        main([str(run), *few, "--grid", "3", "--rho", "0.2"])
    kept = json.loads((out / "sharpness.json").read_text())
    assert kept["rise"]["rho"] == 0.2 and kept["trace"]["probes"] == 2 and kept["status"] == "finished"
    assert kept["complete"] is False


@pytest.mark.slow
def test_how_a_run_was_launched_does_not_matter_to_who_reads_it(run, tmp_path):
    """A launcher that would be refused today is not in the way."""
    there = tmp_path / "run"
    shutil.copytree(run, there, ignore=shutil.ignore_patterns("sharpness"))
    written = yaml.safe_load((there / "config.yaml").read_text())
    (there / "config.yaml").write_text(yaml.safe_dump(written | {"launcher": {"name": "slurm", "gpus": 2}}))
    assert read_run(there, "last")[0].train == read_run(run, "last")[0].train


@pytest.mark.slow
def test_other_data_than_the_run_s_are_refused(run, tmp_path):
    there = tmp_path / "run"
    shutil.copytree(run, there, ignore=shutil.ignore_patterns("sharpness"))
    noted = json.loads((there / "provenance.json").read_text())
    noted["identity"]["data"] = "local rte 0123"
    (there / "provenance.json").write_text(json.dumps(noted))
    with pytest.raises(UserError, match=r"was made with the data 'local rte 0123', and these are 'builtin "):
        main([str(there), *QUICK])


@pytest.mark.slow
def test_data_that_lie_elsewhere_now_are_found_by_data_root(tmp_path):
    rows = [f"{i}\tone cat {i} sees it\ta cat sees\t{('entailment', 'not_entailment')[i % 2]}" for i in range(16)]
    for name in ("train", "dev"):
        file = tmp_path / "then" / "RTE" / f"{name}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    done = command(
        "task=rte", "data=local", f"data.root={tmp_path}/then", "train.max_steps=2", "tracking=disabled",
        "checkpoint.keep_weights=true", f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "runs").glob("*/*/*/*")
    (tmp_path / "then").rename(tmp_path / "now")
    with pytest.raises(UserError, match=r"then' is not a folder"):
        main([str(made), *QUICK])
    main([str(made), *QUICK, "--data-root", str(tmp_path / "now")])
    assert json.loads((made / "sharpness" / "last" / "sharpness.json").read_text())["complete"]
    other = tmp_path / "now" / "RTE" / "dev.tsv"
    other.write_text(other.read_text().replace("one cat", "two cats"))
    (tmp_path / "now").rename(tmp_path / "others")
    with pytest.raises(UserError, match="was made with the data 'local "):
        main([str(made), *QUICK, "--data-root", str(tmp_path / "others")])


@pytest.mark.parametrize("losses", [[1.0, np.inf, 2.0, np.nan], [np.nan] * 4, [1.0, 1e9, 2.0, -np.inf], [1e8] * 4])
def test_a_loss_that_is_not_finite_is_left_blank(losses, tmp_path):
    plane_figure([-1.0, 1.0], np.reshape(losses, (2, 2)), "far").savefig(tmp_path / "plane.png")


@pytest.mark.slow
def test_mistakes_are_one_line_and_status_2(run, tmp_path):
    (tmp_path / "empty").mkdir()
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.yaml", "result.json"):
        (bare / name).write_text((run / name).read_text())
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text((run / "config.yaml").read_text())
    broken = tmp_path / "broken"
    (broken / "last").mkdir(parents=True)
    for name in ("config.yaml", "result.json", "last/config.json", "last/tokenizer.json", "last/tokenizer_config.json"):
        (broken / name).write_text((run / name).read_text())
    (broken / "last" / "model.safetensors").write_bytes(b"not weights")
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "is not a folder"),
        ([str(tmp_path / "empty")], "has no config.yaml"),
        ([str(unfinished)], "has no result.json"),
        ([str(bare)], "checkpoint.keep_weights=true"),
        ([str(broken)], "cannot read the weights"),
        ([str(run), "--seed", "-1"], "--seed -1 must be at least 0"),
        ([str(run), "--rho", "0"], "--rho 0.0 must be above 0"),
        ([str(run), "--grid", "2"], "--grid 2 must be 0 or at least 3"),
        ([str(run), "--examples", "many"], "invalid int value"),
        ([str(run), "--eigenvalues", "99999999"], "must be below the model's"),
        ([str(run), "--device", "abacus"], "unknown device.name 'abacus'"),
        ([str(run), "--data-root", "/x"], "--data-root is for runs with data=local"),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as error:
            main(arguments)
        assert "\n" not in str(error.value)
    done = command(str(tmp_path / "nowhere"), script="sharpness.py")
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path / 'nowhere'} is not a folder\n")
