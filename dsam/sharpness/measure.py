"""Everything that is measured of one finished run, from its folder to `sharpness.json` and the figures."""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from .. import glue
from ..config import Config, on_device, without_tf32
from ..errors import Parser, UserError
from ..files import for_json, write_atomically
from ..methods import ExampleLosses
from ..methods.layer_kinds import TURNED, kind_of
from ..methods.perturbation import total_norm
from ..progress import Stages
from ..runs.identity import RECORD_VERSION, data_fingerprint
from ..runs.kept import read_run
from ..runs.record import Record
from ..runs.run import load_data
from ..text import first_line
from ..training import model as models
from ..training.batches import training_subset
from ..training.device import choose_device, find_device, memory_said, to
from .curvature import top_eigenvalues, trace
from .objective import Objective
from .rise import rises
from .surface import filter_normalised, line, line_figure, plane, plane_figure

FIGURES = ("line", "plane")
EXPECTED_PRODUCTS = 40  # of Lanczos; only for the time left


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises UserError for what cannot be meant."""
    parser = Parser(prog="sharpness.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run made with checkpoint.keep_weights=true")
    parser.add_argument("--weights", choices=("last", "best"), default="last", help="which of its weights")
    parser.add_argument("--examples", type=int, default=128, help="of the training set: a fixed random choice")
    parser.add_argument("--batch", type=int, default=None, help="examples in a batch [the run's batch size]")
    parser.add_argument("--rho", type=float, default=0.05, help="radius of the worst case")
    parser.add_argument("--eigenvalues", type=int, default=3, help="how many of the largest; 0: none")
    parser.add_argument("--in-size", action="store_true", help="the largest in size, not the algebraically largest")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="relative, of the eigenvalues")
    parser.add_argument("--probes", type=int, default=30, help="of the trace; 0: none")
    parser.add_argument("--line", type=int, default=21, help="points of a 1-D surface; 0: none")
    parser.add_argument("--grid", type=int, default=15, help="points of a side of the 2-D surface; 0: none")
    parser.add_argument("--range", type=float, default=1.0, help="of the surfaces, in lengths of the weights' filters")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of examples, probes and directions")
    parser.add_argument(
        "--data-root", metavar="DIR", help="where the data of a run with data=local lie now [the run's]"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:0 [the run's]")
    parser.add_argument("--out", type=Path, default=None, help="[RUN/sharpness/WEIGHTS]")
    options = parser.parse_args(list(arguments))
    for name, smallest in (
        ("examples", 1),
        ("batch", 1),
        ("eigenvalues", 0),
        ("probes", 0),
        ("line", 0),
        ("grid", 0),
        ("seed", 0),
    ):
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name} {value} must be at least {smallest}")
    for name in ("line", "grid"):
        if getattr(options, name) in (1, 2):
            raise UserError(f"--{name} {getattr(options, name)} must be 0 or at least 3")
    for name in ("rho", "range", "tolerance"):
        if not 0 < getattr(options, name) < float("inf"):
            raise UserError(f"--{name} {getattr(options, name)} must be above 0")
    return options


def main(arguments: Sequence[str]) -> None:
    """Measures, writes and says where."""
    options = parse(arguments)
    config, result = read_run(options.run, options.weights)
    if options.device:
        config = on_device(config, options.device)
    if options.data_root:
        if config.data.source != "local":
            raise UserError(f"--data-root is for runs with data=local; {options.run} has data={config.data.source}")
        config = config.model_copy(update={"data": config.data.model_copy(update={"root": options.data_root})})
    out = options.out or options.run / "sharpness" / options.weights
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; set --out DIR") from None
    unchecked = require_same_data(config, options.run)
    of_run = {"run": result["id"], **{k: result.get(k) for k in ("model", "optimizer", "seed", "status")}}
    of_run |= {"task": config.task_label} | ({"data": unchecked} if unchecked else {})

    def keep(found: dict) -> None:
        try:
            said = of_run | {"complete": "seconds" in found} | found
            write_atomically(out / "sharpness.json", json.dumps(for_json(said), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror or error}; set --out DIR") from None

    with memory_said(find_device(without_tf32(config)), "take a smaller --batch, or --device cpu"):
        found, drawn = measure(config, options, keep)
    keep(found)
    print(summary(found))
    try:
        for name in FIGURES:
            if name not in drawn:  # an earlier measurement's
                for suffix in ("png", "pdf"):
                    (out / f"{name}.{suffix}").unlink(missing_ok=True)
        for name, draw in drawn.items():
            figure = draw()
            for suffix, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
                figure.savefig(out / f"{name}.{suffix}", dpi=200, metadata=metadata)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; set --out DIR") from None
    print(out)


def require_same_data(config: Config, folder: Path) -> str | None:
    """UserError where the data that lie there now are not those that the run was made with; a line where the run's
    record does not tell, or None."""
    made_with = (Record(folder).provenance() or {}).get("identity") or {}
    if made_with.get("record_version") != RECORD_VERSION:
        note = "not checked: the run's record is of another version, or has lost what it was made with"
        print(f"{folder}: data {note}", file=sys.stderr)
        return note
    if made_with.get("data") != (now := data_fingerprint(config)):
        raise UserError(f"{folder} was made with the data '{made_with.get('data')}', and these are '{now}'")
    return None


def load(config: Config, device: torch.device) -> tuple[PreTrainedModel, glue.Tokenised]:
    """The model in evaluation mode (no dropout: one function of the weights) and what it was trained on."""
    data, _ = load_data(config, models.load_tokenizer(config.model))
    try:
        network = AutoModelForSequenceClassification.from_pretrained(
            config.model.path,
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation="eager",  # the fused kernels have no second derivative
        )
    except Exception as error:  # whatever a broken file raises inside transformers or safetensors
        raise UserError(f"{config.model.path}: cannot read the weights: {first_line(error)}") from None
    return network.to(device).eval(), data[config.task.train[0]]


def measure(
    config: Config, options: argparse.Namespace, keep: Callable[[dict], None] = lambda found: None
) -> tuple[dict, dict]:
    """(what sharpness.json holds, {file name: what draws its figure}). `keep` is handed what there is after each part
    that takes long."""
    started = time.monotonic()
    device = choose_device(without_tf32(config))
    network, examples = load(config, device)
    params = [p for p in network.parameters() if p.requires_grad]
    size = sum(p.numel() for p in params)
    if options.eigenvalues >= size:
        raise UserError(f"--eigenvalues {options.eigenvalues} must be below the model's {size} parameters")
    subset = training_subset(len(examples), config.train.max_train_examples, config.seeds.data)
    chosen = np.random.default_rng(options.seed).permutation(subset)[: options.examples]
    per_batch = min(options.batch or config.train.batch_size, len(chosen))
    batches = [chosen[i : i + per_batch] for i in range(0, len(chosen), per_batch)]

    def closures(cuts):
        return [ExampleLosses(network, to(examples.batch(np.atleast_1d(cut)), device)) for cut in cuts]

    whole_batches = len(chosen) // per_batch
    points = 3 * options.line + options.grid**2
    products = (EXPECTED_PRODUCTS if options.eigenvalues else 0) + options.probes
    total = 4 * (whole_batches + len(chosen)) + (4 + 6 * products + points) * len(batches)
    title = f"{config.task_label}, {config.model.name}, {config.optimizer.name}, seed {config.seed}"
    drawn: dict[str, Callable[[], Figure]] = {}
    with Stages(title, total) as stages:
        stages.enter("loss")
        objective = Objective(closures(batches), params, stages.passed)
        loss = objective.loss()
        if not np.isfinite(loss):
            raise UserError(f"the loss at the {options.weights} weights is {loss}: there is no sharpness to measure")
        gradient = objective.gradient()
        found = {
            "weights": options.weights,
            "examples": len(chosen),
            "batch_size": per_batch,
            "parameters": size,
            "seed_of_measurement": options.seed,
            "loss": loss,
            "gradient_norm": float(total_norm(gradient)),
        }
        stages.enter("rise, batches")
        # A smaller last batch would be sharper only because it is smaller.
        of_batches = rises(closures(batches[:whole_batches]), params, options.rho, stages.passed)
        stages.enter("rise, instances")
        of_instances = rises(closures(chosen), params, options.rho, stages.passed)
        found["rise"] = {
            "rho": options.rho,
            "batch": mean_and_error(of_batches),
            "instance": mean_and_error(of_instances),
        }

        keep(found)
        spectrum = None
        if options.eigenvalues:
            stages.enter("eigenvalues", EXPECTED_PRODUCTS * 6 * len(batches))
            spectrum = top_eigenvalues(
                objective,
                options.eigenvalues,
                tolerance=options.tolerance,
                seed=options.seed,
                in_size=options.in_size,
            )
            found["eigenvalues"] = {
                "values": spectrum.values,
                "residuals": spectrum.residuals,
                "asked": options.eigenvalues,
                "largest": "in size" if options.in_size else "algebraically",
                "products": spectrum.products,
            }
            keep(found)
        if options.probes:
            stages.enter("trace")
            estimate, error = trace(objective, options.probes, seed=options.seed)
            found["trace"] = {"mean": estimate, "standard_error": error, "probes": options.probes}
            keep(found)

        generator = torch.Generator().manual_seed(options.seed)
        turned = [module.weight for module in network.modules() if kind_of(module) == TURNED]
        first, second = (filter_normalised(params, generator, turned) for _ in range(2))
        found["surface"] = {}
        if options.line:
            stages.enter("lines")
            unit = float(total_norm(gradient))
            directions = {"step along the gradient (Euclidean)": (gradient, 1 / unit if unit else 0.0)}
            if spectrum is not None and spectrum.vectors:
                directions["step along the top eigenvector (Euclidean)"] = (spectrum.vectors[0], 1.0)
            directions["random direction (filter-normalised)"] = (first, None)
            panels = {}
            for label, (direction, scale) in directions.items():
                steps = np.linspace(-options.range, options.range, options.line)
                if scale is not None:
                    direction = torch._foreach_mul(list(direction), scale)
                panels[label] = (steps.tolist(), line(objective, direction, steps).tolist())
            found["surface"]["lines"] = {k: {"steps": s, "losses": v} for k, (s, v) in panels.items()}
            drawn["line"] = partial(line_figure, panels, title)
        if options.grid:
            stages.enter("plane")
            steps = np.linspace(-options.range, options.range, options.grid)
            losses = plane(objective, first, second, steps)
            found["surface"]["plane"] = {"steps": steps.tolist(), "losses": losses.tolist()}
            drawn["plane"] = partial(plane_figure, steps, losses, title)
    found["seconds"] = round(time.monotonic() - started, 1)
    found["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "device": str(device)}
    return found, drawn


def mean_and_error(values: torch.Tensor) -> dict:
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(values.mean()), "standard_error": error, "count": len(values)}


def summary(found: dict) -> str:
    def figure(name: str, value: float, error: float | None = None) -> str:
        return f"{name:32} {value:.6g}" + (f" ± {error:.2g}" if error is not None else "")

    rise = found["rise"]
    lines = [figure("loss", found["loss"]), figure("gradient norm", found["gradient_norm"])]
    for name in ("batch", "instance"):
        label = f"rise at rho={rise['rho']}, per {name}"
        lines.append(figure(label, rise[name]["mean"], rise[name]["standard_error"]))
    for value, residual in zip(
        *(found.get("eigenvalues", {}).get(k, []) for k in ("values", "residuals")), strict=True
    ):
        lines.append(figure("Hessian eigenvalue", value, residual))
    if "trace" in found:
        lines.append(figure("Hessian trace", found["trace"]["mean"], found["trace"]["standard_error"]))
    return "\n".join(lines)
