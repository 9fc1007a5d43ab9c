"""One experiment to its tables, its figures and a single-file HTML report: the executed results notebook."""

import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import nbformat
from jinja2 import Template
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbconvert import HTMLExporter

from dsam.errors import UserError
from dsam.results import plots, rendering, tables
from dsam.results.collect import collect

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "results.ipynb"
PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Report:
    """Where everything was written, and the main table as Markdown for the terminal."""

    html: Path
    tables: list[Path]
    figures: list[Path]
    text: str


def make(
    experiment: str, runs_dir: str | Path, tables_dir: str | Path, figures_dir: str | Path, which: str = "best"
) -> Report:
    """Write <tables_dir>/<experiment>/, <figures_dir>/<experiment>/ and report.html beside `tables_dir`.

    Raises UserError where the experiment has no finished run.
    """
    frame = collect(runs_dir, experiment)
    if not (frame["status"] == "finished").any():
        counts = ", ".join(f"{count} {status}" for status, count in Counter(frame["status"]).items())
        raise UserError(f"no run of '{experiment}' is finished ({counts or 'none planned'}): run `make reproduce`")
    built = tables.build(frame, which)
    written = tables.write(built, Path(tables_dir) / experiment)
    drawn = plots.write(frame, Path(figures_dir) / experiment, which)
    page = Path(tables_dir).parent / "report.html"
    page.write_text(_page(experiment, Path(runs_dir).resolve(), page.resolve().parent, which), encoding="utf-8")
    return Report(html=page, tables=written, figures=drawn, text=rendering.as_markdown(built.main))


def _page(experiment: str, runs_dir: Path, folder: Path, which: str) -> str:
    """The executed notebook as one HTML page that needs no network; links to runs are relative to `folder`."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # This interpreter's kernel: one that is registered under the same name may lack dsam.
    kernel = AsyncKernelManager(kernel_name="python3")
    launch = "-m ipykernel_launcher -f {connection_file} --log-level=ERROR"
    kernel.kernel_spec.argv = [sys.executable, *launch.split()]
    settings = {"DSAM_EXPERIMENT": experiment, "DSAM_RUNS": str(runs_dir), "DSAM_EPOCH": which}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    client = NotebookClient(notebook, km=kernel, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute(env=os.environ | settings | {"PYTHONPATH": path}, cleanup_kc=True)
    # nbconvert's 'basic' template is the content alone: its full pages load scripts from a CDN.
    exporter = HTMLExporter(
        template_name="basic", exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True
    )
    exporter.exclude_anchor_links = True
    body, _ = exporter.from_notebook_node(notebook)
    body = body.replace(runs_dir.as_uri(), quote(Path(os.path.relpath(runs_dir, folder)).as_posix()))
    return Template(PAGE.read_text(encoding="utf-8"), autoescape=True).render(title=f"{experiment}: results", body=body)
