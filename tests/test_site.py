"""The site: it builds without a warning, its links lead somewhere, and what its guides show works."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import dsam
from dsam.methods import METHODS
from dsam.overrides import check

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    where = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(where), strict=True))
    return where


class _Seen(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.anchors = [], set()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.links += [given[name] for name in ("href", "src") if given.get(name)]
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}


def test_every_link_leads_somewhere_and_none_is_loaded_from_elsewhere(site):
    seen = {}
    for page in site.rglob("*.html"):
        seen[page] = _Seen()
        seen[page].feed(page.read_text(encoding="utf-8"))
    assert len(seen) > 20
    for page, found in seen.items():
        if page.name == "404.html":  # its links begin at the server's root
            continue
        for link in found.links:
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            there = (page.parent / path.split("?")[0]).resolve() if path else page
            if there.is_dir():
                there = there / "index.html"
            assert there.exists(), f"{page.relative_to(site)}: {link}"
            if anchor and there in seen:
                assert anchor in seen[there].anchors, f"{page.relative_to(site)}: {link}"
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)', page.read_text(encoding="utf-8"))
        assert not [address for address in loaded if "canonical" not in address], page


def test_the_reference_has_every_public_name(site):
    text = (site / "reference.html").read_text(encoding="utf-8")
    missing = [name for name in dsam.__all__ if f">{name}<" not in text and f"dsam.{name}" not in text
               and f'id="dsam.methods.weighting.{name}"' not in text]  # fmt: skip
    assert set(missing) <= {"METHODS", "WEIGHTINGS"}
    assert {cls.__name__ for cls in METHODS.values()} <= set(dsam.__all__)


PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_guides_are_ones_that_their_scripts_take(page):
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["make"]:
            assert words[1] in targets, line
            for experiment in re.findall(r"EXPERIMENT=(\w+)", line):
                assert (ROOT / "conf" / "experiment" / f"{experiment}.yaml").exists(), line
        elif words[:1] == ["python"]:
            assert (ROOT / words[1]).exists(), line
            own = "--config-dir" in words  # a folder of the reader's
            settings = [w.strip("'\"") for w in words[2:] if re.match(r"'?[a-z_.]+=", w)]
            if words[1].endswith("train.py") and not own:
                check(settings, ROOT / "conf")


def test_the_method_of_the_guide_is_what_it_says():
    text = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
    made, used = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    torch.manual_seed(0)
    names = {}
    names["model"] = model = torch.nn.Linear(3, 1).double()
    names["batch"] = x, y = torch.randn(5, 3).double(), torch.randn(5).double()
    exec(made, names)
    names["ExampleLosses"] = lambda model, batch: lambda: (model(batch[0]).squeeze(1) - batch[1]).square()
    exec(used, names)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])  # by hand: f = x·w + b, ℓ = (f − y)²

    def gradient(w):
        rest = x @ w[:3] + w[3] - y
        return torch.cat([(2 * rest[:, None] * x).mean(0), (2 * rest).mean()[None]])

    at = weights + 0.05 * gradient(weights).sign() / 2
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, gradient(at), rtol=1e-12, atol=1e-12)
    assert float(names["loss"]) == pytest.approx(float((x @ weights[:3] + weights[3] - y).square().mean()))


def test_a_page_that_links_to_what_is_not_there_stops_the_build(tmp_path, monkeypatch):
    import runpy

    hook = runpy.run_path(str(ROOT / "tools" / "site.py"))
    page = ROOT / "docs" / "results.md"

    class Files:
        def documentation_pages(self):
            class Found:
                abs_src_path = str(page)

            return [Found]

    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, **how: "[x](../results/no/such.png)" if self == page else read(self, **how)
    )
    with pytest.raises(FileNotFoundError, match=r"docs/results.md links to results/no/such.png"):
        hook["on_files"](Files(), None)
