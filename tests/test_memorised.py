"""How far wrong labels are learnt, beside a loop over the examples; and that looking changes nothing."""

import json

import numpy as np
import pytest
import torch
from test_config import config

from dsam import glue
from dsam.results import plots
from dsam.results.collect import collect
from dsam.results.tables.memorised import memorised_table
from dsam.runs.run import prepare, run
from dsam.training import loop
from dsam.training.memorised import memorised

CPU = torch.device("cpu")
NOISY = ["task=entailment", "data.label_noise=0.3", "train.max_train_examples=48"]
# fmt: off


def by_hand(examples, model):
    """(losses by the given and by the true label, whether each is answered, gradient norms), one example at a time."""
    given, true, answers, norms = [], [], [], []
    params = [p for p in model.parameters() if p.requires_grad]
    for i in range(len(examples)):
        batch = examples.batch([i])
        label = batch.pop("labels")
        logits = model(**batch).logits
        if model.config.num_labels == 1:
            losses = [(logits.reshape(1) - y).square().sum() for y in (label, torch.tensor([examples.clean_labels[i]]))]
        else:
            losses = [-logits.log_softmax(1)[0, y] for y in (int(label), int(examples.clean_labels[i]))]
        grads = torch.autograd.grad(losses[0], params, allow_unused=True)
        norms.append(sum(g.square().sum() for g in grads if g is not None).sqrt().item())
        given.append(losses[0].item())
        true.append(losses[1].item())
        answers.append(logits.argmax().item())
    return tuple(map(np.array, (given, true, answers, norms)))


@pytest.mark.parametrize("task", ["entailment", "similarity"])
def test_the_measure_is_that_of_a_loop_over_the_examples(task, paths):
    ready = prepare(config(f"task={task}", "data.label_noise=0.3", *paths))
    model, examples = ready.network, ready.data["train"].take(np.arange(40))
    torch.nn.init.normal_(model.classifier.weight)  # so that answers and norms differ
    model.train()
    found = memorised(examples, model, CPU)
    assert model.training and found["examples"] == 40 and all(p.grad is None for p in model.parameters())
    given, true, answers, norms = by_hand(examples, model.eval())
    wrong = examples.labels != examples.clean_labels
    assert found["wrong"] == found["pulling"] == pytest.approx(wrong.mean()) and 5 < wrong.sum() < 20
    close = dict(rel=1e-4)
    kinds = [("clean", given, ~wrong, examples.labels), ("flipped", given, wrong, examples.labels)]
    for name, losses, which, labels in [*kinds, ("true", true, wrong, examples.clean_labels)]:
        assert found[name]["loss"] == pytest.approx(losses[which].mean(), **close)
        right = (answers == labels)[which].mean()
        assert found[name].get("accuracy") == (None if task == "similarity" else pytest.approx(right))
    assert found["pull"] == pytest.approx(norms[wrong].sum() / norms.sum(), **close)


def test_without_formulas_there_is_no_pull(paths):
    ready = prepare(config(*NOISY, *paths))

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(2))

        def forward(self, input_ids, **_):
            hidden = torch.stack([input_ids.float().mean(1), -input_ids.float().mean(1)], 1)
            return type("Output", (), {"logits": hidden * self.scale})

    found = memorised(ready.data["train"].take(np.arange(8)), Own(), CPU)
    assert "pull" not in found and found["flipped"].keys() == {"loss", "accuracy"}


@pytest.mark.parametrize("given, said", [
    (["data.label_noise=0.0001"], "the noise that was asked for leaves each of the 2000 labels of train as it was"),
    (["data.label_noise=0.3"], None),
])  # fmt: skip
def test_noise_that_changes_no_label_is_said(paths, given, said):
    notes = prepare(config("task=majority", *given, *paths)).notes
    assert said in notes if said else not any("noise" in note for note in notes)


def test_a_clean_set_has_no_wrong_part(paths):
    examples = prepare(config("task=entailment", *paths)).data["train"].take(np.arange(8))
    assert examples.clean_labels is None
    clean = glue.noisy(config("task=entailment").task, examples, 0.0, 0)
    found = memorised(clean, prepare(config("task=entailment", *paths)).network, CPU)
    assert found["wrong"] == 0 and found["flipped"] == found["true"] == {} and found["pull"] == 0


def test_looking_changes_nothing_and_is_drawn(paths, tmp_path, monkeypatch):
    given = [*NOISY, "optimizer=sam", "train.epochs=2", "tracking=disabled", *paths]
    result = run(config(*given))
    points = [e["memorised"] for e in result["evaluations"]]
    assert len(points) == 2 and points[0]["examples"] == 48
    where = tmp_path / "other"
    monkeypatch.setattr(loop, "memorised", lambda *_: {})
    again = run(config(*given, f"paths.runs={where}"))
    assert again["weights_sha256"] == result["weights_sha256"]
    assert [{k: v for k, v in e.items() if k != "memorised"} for e in again["evaluations"]] == [
        {k: v for k, v in e.items() if k != "memorised"} for e in result["evaluations"]]
    clean = run(config(*given, "data.label_noise=0", f"paths.runs={where}"))
    assert all("memorised" not in e for e in clean["evaluations"])

    (folder,) = (tmp_path / "runs").glob("entailment/*/*/*")
    assert json.loads((folder / "result.json").read_text())["evaluations"][1]["memorised"] == points[1]
    drawn = {name: figure for name, _, figure in plots.figures(collect(tmp_path / "runs"))}
    figure = drawn["memorised_tiny_entailment-noise-0.3"]
    first, _, pull = figure.axes
    line = next(line for line in first.lines if line.get_label() == "sam")
    assert list(line.get_ydata()) == pytest.approx([100 * p["flipped"]["accuracy"] for p in points])
    assert list(pull.lines[-2].get_ydata()) == pytest.approx([100 * p["pull"] for p in points])
    table = memorised_table(collect(tmp_path / "runs"))
    (row,) = table.text.to_dict("records")
    last = {column: 100 * points[1][of]["accuracy"] for column, of in (("wrong", "flipped"), ("right", "clean"))}
    for column, value in last.items():
        assert row[f"{column} labels fitted (%)"] == f"{value:.2f}"
    assert (row["task"], row["runs"]) == ("entailment noise 0.3", 1)
    assert row["development set"] == f"{100 * result['last']['score']:.2f}"
    assert f"{100 * points[1]['wrong']:.2f} %" in table.notes[0]
    assert memorised_table(collect(where)) is not None  # of the runs that looked, and not of the clean one
    assert memorised_table(collect(where).query("task == 'entailment'")) is None


def test_a_table_of_wrong_scores_has_losses_alone(paths, tmp_path):
    run(config("task=similarity", "data.label_noise=0.3", "train.max_train_examples=48", "train.epochs=1",
               "tracking=disabled", *paths))  # fmt: skip
    table = memorised_table(collect(tmp_path / "runs"))
    assert [column for column in table.text if "fitted" in column] == []
    assert {"loss on wrong labels", "loss on right labels"} <= set(table.text)
