"""One experiment to all that a paper or a reader needs: tables, figures, README, model card, and one HTML report."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import nbformat
import pandas as pd
from jinja2 import Template
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbconvert import HTMLExporter

from dsam.errors import NothingFinished, UserError
from dsam.results import plots
from dsam.results.collect import collect
from dsam.results.report import card
from dsam.results.tables import build as tables
from dsam.results.tables import rendering

ROOT = Path(__file__).parents[3]
NOTEBOOK = ROOT / "notebooks" / "results.ipynb"
PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Report:
    """Where everything was written, and for the terminal, as Markdown, the main table and that of wrong labels."""

    html: Path
    tables: list[Path]
    figures: list[Path]
    text: str

    @property
    def left_over(self) -> list[Path]:
        """Files of earlier runs or other people beside what was written: they do not come from these runs."""
        written = {*self.tables, *self.figures}
        folders = dict.fromkeys(path.parent for path in [*self.tables, *self.figures])
        return [path for folder in folders for path in sorted(folder.iterdir()) if path not in written]


def make(
    experiment: str, runs_dir: str | Path, tables_dir: str | Path, figures_dir: str | Path, which: str = "best"
) -> Report:
    """Write <tables_dir>/<experiment>/, <figures_dir>/<experiment>/ and report.html beside `tables_dir`.

    Raises UserError where the experiment has no finished run.
    """
    frame, runs_dir = collect(runs_dir, experiment), Path(runs_dir).resolve()
    if not (frame["status"] == "finished").any():
        counts = ", ".join(f"{count} {status}" for status, count in Counter(frame["status"]).items())
        raise NothingFinished(
            f"no run of '{experiment}' is finished ({counts or 'none planned'}); `make reproduce` runs what is missing"
        )
    page = Path(tables_dir).parent / "report.html"
    with TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as beside:
        collected = Path(scratch) / "collected.pickle"  # the runs as they are now: a sweep may be going on
        frame.to_pickle(collected)
        # Waits for a process of its own most of the time: the notebook's kernel.
        body = beside.submit(_page, experiment, runs_dir, collected, page.resolve().parent, which)
        built = tables.build(frame, which)
        with _writing(tables_dir):
            written = write_tables(built, frame, experiment, runs_dir, Path(tables_dir) / experiment, which)
            drawn = plots.write(frame, Path(figures_dir) / experiment, which)
        told = body.result()
        with _writing(tables_dir):
            page.write_text(told, encoding="utf-8")
    text = "\n".join(rendering.as_markdown(table) for table in (built.main, built.memorised) if table is not None)
    return Report(html=page, tables=written, figures=drawn, text=text)


@contextmanager
def _writing(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = f"{error.filename or folder}: {error.strerror or error}"
        raise UserError(f"cannot write {why}; set paths.tables=DIR and paths.figures=DIR") from None


def write_tables(
    built: tables.Tables, frame: pd.DataFrame, experiment: str, runs_dir: Path, folder: Path, which: str = "best"
) -> list[Path]:
    """Everything that lies in a run set's folder of tables; returns the paths. The same runs give the same bytes."""
    paths = tables.write(built, folder)
    for name, text in card.documents(built, frame, experiment, runs_dir, which, paths).items():
        paths.append(folder / name)
        paths[-1].write_text(text, encoding="utf-8", newline="\n")
    return paths


def _page(experiment: str, runs_dir: Path, collected: Path, folder: Path, which: str) -> str:
    """The executed notebook as one HTML page that needs no network; links to runs are relative to `folder`."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells[0].source = notebook.cells[0].source.replace("# Results", f"# {experiment}: results", 1)
    # This interpreter's kernel: one that is registered under the same name may lack dsam.
    kernel = AsyncKernelManager(kernel_name="python3")
    launch = "-m ipykernel_launcher -f {connection_file} --log-level=ERROR"
    assert kernel.kernel_spec is not None
    kernel.kernel_spec.argv = [sys.executable, *launch.split()]
    settings = {"DSAM_EXPERIMENT": experiment, "DSAM_RUNS": str(runs_dir), "DSAM_EPOCH": which}
    settings["DSAM_COLLECTED"] = str(collected)
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
