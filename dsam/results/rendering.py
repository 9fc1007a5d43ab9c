"""A finished table, and its forms: CSV with full precision, Markdown, LaTeX and HTML for reading."""

import html
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
_LATEX |= {"≥": r"$\geq$", "<": r"$<$", ">": r"$>$", "×": r"$\times$", "δ": r"$\delta$", "–": "--"}
_LATEX |= {character: "\\" + character for character in "&%$#_{}"}
_MARKDOWN = re.compile(r"([\\|*`<])")


@dataclass(frozen=True)
class Table:
    """`values` has the numbers (CSV), `text` what a reader sees, `bold` the cells of `text` to stress."""

    name: str
    caption: str
    notes: list[str]
    values: pd.DataFrame
    text: pd.DataFrame
    bold: pd.DataFrame | None = None

    def cells(self, escape, stress) -> pd.DataFrame:
        """`text` escaped for one form, its bold cells wrapped by `stress`."""
        cells = self.text.map(lambda value: escape(str(value)))
        if self.bold is not None:
            cells = cells.where(~self.bold, cells.map(stress))
        return cells.rename(columns=escape)

    def without_single_model(self) -> "Table":
        """The table without its model column where that says the same in every row; `values` keep it."""
        if self.text["model"].nunique() > 1:
            return self
        bold = None if self.bold is None else self.bold.drop(columns="model")
        return replace(self, text=self.text.drop(columns="model"), bold=bold)

    def _repr_html_(self) -> str:
        return as_html(self)


def as_markdown(table: Table) -> str:
    """A Markdown section: caption, table, notes."""
    cells = table.cells(escape_markdown, "**{}**".format)
    body = cells.to_markdown(index=False, disable_numparse=True)
    notes = "".join(f"- {escape_markdown(note)}\n" for note in table.notes)
    return f"**{table.caption}**\n\n{body}\n\n{notes}"


def escape_markdown(text: str) -> str:
    """The text with the characters that Markdown would read as marks made literal."""
    return _MARKDOWN.sub(r"\\\1", text)


def as_latex(table: Table) -> str:
    """A tabular for a paper that loads booktabs; caption and notes are comments above it."""
    cells = table.cells(escape_latex, r"\textbf{{{}}}".format)
    lines = [" & ".join(row) + r" \\" for row in [list(cells.columns), *cells.to_numpy().tolist()]]
    alignment = "l" + "r" * (len(cells.columns) - 1)
    comments = [f"% {line}" for line in [table.caption, *table.notes, r"Needs \usepackage{booktabs}."]]
    begin, end = rf"\begin{{tabular}}{{{alignment}}}", r"\end{tabular}"
    parts = [*comments, begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", end]
    return "\n".join(parts) + "\n"


def escape_latex(text: str) -> str:
    """The text with every character that LaTeX would read as a command made literal."""
    return "".join(_LATEX.get(character, character) for character in text)


def as_html(table: Table) -> str:
    """A table element with its caption above and its notes below."""
    cells = table.cells(html.escape, "<strong>{}</strong>".format)
    body = cells.to_html(index=False, escape=False, border=0, classes="results", justify="unset")
    body = body.replace("<thead>", f"<caption>{html.escape(table.caption)}</caption>\n<thead>", 1)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    return f'<div class="table">{body}</div>\n' + (f'<ul class="notes">{notes}</ul>\n' if notes else "")


def write(table: Table, folder: Path) -> list[Path]:
    """<folder>/<name>.csv, .md, .tex and .html; returns their paths."""
    forms = {
        "csv": table.values.to_csv(index=False, lineterminator="\n"),
        "md": as_markdown(table),
        "tex": as_latex(table),
        "html": '<!doctype html>\n<meta charset="utf-8">\n' + as_html(table),
    }
    paths = []
    for suffix, content in forms.items():
        paths.append(folder / f"{table.name}.{suffix}")
        paths[-1].write_text(content, encoding="utf-8", newline="\n")
    return paths
