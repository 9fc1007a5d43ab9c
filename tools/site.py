"""A hook of mkdocs: what the pages link to in results/ becomes part of the site, and links to the sources say where
they lie. So the same links serve a reader of the files and one of the site."""

import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\((?:\.\./)+(results/[^)#]+)\)")
BESIDE = re.compile(r"\[([^\]]*)\]\(\.\./(?!results/)([^)]*)\)")  # to a file that is no page: its path is the text


def on_files(files, config):
    """Adds the files of results/ that pages link to, and those that the tables among them link to."""
    waiting = [page.abs_src_path for page in files.documentation_pages()]
    while waiting:
        page = Path(waiting.pop())
        text = page.read_text(encoding="utf-8")
        linked = LINK.findall(text) if page.parent == ROOT / "docs" else beside(page, text)
        for path in linked:
            if not (ROOT / path).is_file():
                raise FileNotFoundError(f"{page.relative_to(ROOT)} links to {path}, which is not there")
            if files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
                if path.endswith(".md"):
                    waiting.append(ROOT / path)
    return files


def beside(page: Path, text: str) -> list[str]:
    """The files that a page in results/ links to, from the root."""
    there = [(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    return [str(path.relative_to(ROOT)) for path in there if path.is_file()]


FORMULA = re.compile(r"\$([^$\n]*\\\\?[^$\n]*|[a-zA-Z])\$")  # with a command in it, or one letter: not $OUT


def on_page_markdown(markdown, page, **_):
    if page.file.src_uri.startswith("results/"):
        return markdown
    markdown = FORMULA.sub(lambda found: convert(found[1]), markdown)  # browsers draw MathML by themselves
    return BESIDE.sub(r"`\2`", re.sub(r"\]\(\.\./results/", "](results/", markdown))
