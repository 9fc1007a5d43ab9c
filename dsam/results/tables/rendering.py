"""A finished table, and its forms: CSV with full precision, Markdown, LaTeX and HTML for reading."""

import html
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
_LATEX |= {
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "<": r"$<$",
    ">": r"$>$",
    "×": r"$\times$",
    "–": "--",
    "−": "$-$",
    "†": r"$\dagger$",
    "²": r"\textsuperscript{2}",
    "Σ": r"$\Sigma$",
    "∇": r"$\nabla$",
    "ℓ": r"$\ell$",
    "‖": r"$\|$",
}
_LATEX |= {letter: rf"$\{name}$" for letter, name in {"δ": "delta", "ρ": "rho", "η": "eta", "λ": "lambda"}.items()}
_LATEX |= {character: "\\" + character for character in "&%$#_{}"}
_MINUS = re.compile(r"(?<![\w.])-(?=\d)")
_MARKDOWN = re.compile(r"([\\|*`<])")


BOLD, UNDERLINED = "bold", "underlined"


@dataclass(frozen=True)
class Table:
    """`values` has the numbers (CSV), `text` what a reader sees, `styles` how: BOLD, UNDERLINED or "" per cell."""

    name: str
    caption: str
    notes: list[str]
    values: pd.DataFrame
    text: pd.DataFrame
    styles: pd.DataFrame | None = None

    def cells(self, escape, styled: dict[str, str]) -> pd.DataFrame:
        """`text` escaped for one form, the cells of a style set into its format of `styled`."""
        cells = self.text.map(lambda value: escape(str(value)))
        if self.styles is not None:
            for style, template in styled.items():
                cells = cells.where(self.styles != style, cells.map(template.format))
        return cells.rename(columns=escape)

    def without_single_model(self) -> "Table":
        """The table without its model column where that says the same in every row; `values` keep it."""
        if self.text["model"].nunique() > 1:
            return self
        styles = None if self.styles is None else self.styles.drop(columns="model")
        return replace(self, text=self.text.drop(columns="model"), styles=styles)

    def _repr_html_(self) -> str:
        return as_html(self)


def styled(rows: list[dict[str, str]], text: pd.DataFrame) -> pd.DataFrame:
    """The styles of a table's `text` from a dict per row that names the cells which have one."""
    return pd.DataFrame([{column: row.get(column, "") for column in text} for row in rows], columns=text.columns)


def as_markdown(table: Table) -> str:
    """A Markdown section: caption, table, notes."""
    cells = table.cells(escape_markdown, {BOLD: "**{}**", UNDERLINED: "_{}_"})
    body = cells.to_markdown(index=False, disable_numparse=True)
    notes = "".join(f"- {escape_markdown(note)}\n" for note in table.notes)
    return f"**{table.caption}**\n\n{body}\n\n{notes}"


def escape_markdown(text: str) -> str:
    """The text with the characters that Markdown would read as marks made literal."""
    return _MARKDOWN.sub(r"\\\1", text)


def as_latex(table: Table) -> str:
    """A tabular for a paper that loads booktabs; caption and notes are comments above it."""
    cells = table.cells(escape_latex, {BOLD: r"\textbf{{{}}}", UNDERLINED: r"\underline{{{}}}"})
    lines = [" & ".join(row) + r" \\" for row in [list(cells.columns), *cells.to_numpy().tolist()]]
    words = [values.astype(str).str.match("[A-Za-z]").any() for _, values in table.text.items()]
    alignment = "l" + "".join("l" if word else "r" for word in words[1:])
    comments = [f"% {line}" for line in [table.caption, *table.notes, r"Needs \usepackage{booktabs}."]]
    begin, end = rf"\begin{{tabular}}{{{alignment}}}", r"\end{tabular}"
    parts = [*comments, begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", end]
    return "\n".join(parts) + "\n"


def escape_latex(text: str) -> str:
    """The text with every character that LaTeX would read as a command made literal, and a minus of its width."""
    return "".join(_LATEX.get(character, character) for character in _MINUS.sub("−", text))


def as_html(table: Table) -> str:
    """A table element with its caption above and its notes below."""
    cells = table.cells(html.escape, {BOLD: "<strong>{}</strong>", UNDERLINED: "<u>{}</u>"})
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
