"""Provenance is that of the code that ran: which repository, which commit, what differs, and the files themselves."""

import os
import shutil
import subprocess

import pytest

from dsam.config import Config
from dsam.errors import UserError
from dsam.runs import provenance
from dsam.sweeps import sweep

COMMIT = ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "-qm", "all"]


def git(folder, *words):
    subprocess.run(["git", *words], cwd=folder, check=True, env=os.environ | {"GIT_CONFIG_GLOBAL": os.devnull})


@pytest.fixture
def code(tmp_path):
    """A package of one module in a repository of its own."""
    folder = tmp_path / "code"
    (folder / "dsam").mkdir(parents=True)
    (folder / "dsam" / "__init__.py").write_text("x = 1\n")
    (folder / "results").mkdir()
    (folder / "results" / "main.csv").write_text("made\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, *COMMIT)
    return folder


def state(folder):
    provenance.git.cache_clear()
    return provenance.git(folder)


def test_a_commit_counts_as_clean_only_without_changes_and_new_sources(code):
    clean = state(code)
    assert clean["dirty"] is False and len(clean["commit"]) == 40
    assert clean["repository"] == clean["commit"]  # the first
    (code / "notes.md").write_text("beside the sources\n")
    assert state(code) == clean
    (code / "results" / "main.csv").write_text("made again\n")  # what a paper's command writes bars no other
    assert state(code) == clean
    (code / "dsam" / "method.py").write_text("new = True\n")  # the README's own way to add a method
    assert state(code)["dirty"] is True
    (code / "dsam" / "method.py").unlink()
    (code / "dsam" / "__init__.py").write_text("x = 2\n")
    assert state(code)["dirty"] is True


def test_a_copy_inside_another_repository_has_none_of_its_own(code):
    copy = code / "vendored"
    shutil.copytree(code / "dsam", copy / "dsam")
    assert state(copy) == {"commit": None, "dirty": None, "repository": None}


def test_without_git_or_a_repository_nothing_is_known_and_nothing_is_clean(code, tmp_path, monkeypatch):
    unknown = {"commit": None, "dirty": None, "repository": None}
    (tmp_path / "alone" / "dsam").mkdir(parents=True)
    assert state(tmp_path / "alone") == unknown
    monkeypatch.setenv("PATH", str(tmp_path))
    assert state(code) == unknown
    from test_config import config

    wanted: Config = config("launcher.require_clean=true")
    for dirty, said in ((None, "in no git repository of its own"), (True, "files differ from the last commit, or are")):
        monkeypatch.setattr(provenance, "git", lambda dirty=dirty: {"dirty": dirty})
        with pytest.raises(UserError, match=said):
            sweep.require_clean([wanted])
    monkeypatch.setattr(provenance, "git", lambda: {"dirty": False})
    sweep.require_clean([wanted])


def test_the_digest_of_the_sources_follows_their_bytes_and_names(code):
    def digest():
        provenance.source_digest.cache_clear()
        return provenance.source_digest(code)

    first = digest()
    (code / "dsam" / "__init__.py").write_text("x = 3\n")
    changed = digest()
    (code / "dsam" / "__init__.py").write_text("x = 1\n")
    assert changed != first == digest()
    (code / "dsam" / "__init__.py").rename(code / "dsam" / "other.py")
    assert digest() != first
