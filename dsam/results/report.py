"""One experiment to its tables, its figures and a single-file HTML report: the executed results notebook."""

import html
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbconvert import HTMLExporter

from dsam.errors import UserError
from dsam.results import plots, rendering, tables
from dsam.results.collect import collect

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "results.ipynb"


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
    body = body.replace(runs_dir.as_uri(), Path(os.path.relpath(runs_dir, folder)).as_posix())
    return PAGE.format(title=html.escape(f"{experiment}: results"), style=STYLE, body=body)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1b1b1b; font: 16px/1.55 system-ui, Helvetica, Arial, sans-serif; }
main { max-width: 76rem; margin: 2.5rem auto 5rem; padding: 0 1.25rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: 1rem; border-top: 1px solid #ddd; }
p, li { max-width: 46rem; }
a { color: #0059a5; }
code { font-size: .9em; }
img { max-width: 100%; height: auto; margin: .6rem 0; }
.table, .jp-OutputArea-output, .output_subarea { overflow-x: auto; }
table { border-collapse: collapse; margin: .4rem 0 .6rem; font-size: .86rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; caption-side: top; }
thead { border-top: 2px solid #1b1b1b; border-bottom: 1px solid #1b1b1b; }
tbody { border-bottom: 2px solid #1b1b1b; }
th, td { padding: .28rem 1.1rem .28rem 0; text-align: left; vertical-align: top; white-space: nowrap; }
td:last-child { white-space: normal; min-width: 6rem; overflow-wrap: anywhere; }
tbody tr + tr td { border-top: 1px solid #eee; }
.notes { margin: .2rem 0 1.2rem; padding-left: 1.1rem; font-size: .82rem; color: #444; }
@media print {
  main { max-width: none; margin: 0; }
  th, td { white-space: normal; }
  h2 { break-after: avoid; }
  table, img { break-inside: avoid; }
}
"""
