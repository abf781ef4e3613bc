"""The commit that results carry."""

import shutil
import subprocess
from pathlib import Path

import pytest

from bitscale import source_commit as module
from bitscale.source_commit import source_commit

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed"),
]


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of which a file is imported."""
    file = tmp_path / "checkout" / "bitscale" / "source_commit.py"
    file.parent.mkdir(parents=True)
    file.write_text("1")
    git(tmp_path, "init", "-q", "checkout")
    git(file.parent, "add", ".")
    git(file.parent, "commit", "-qm", "first")
    monkeypatch.setattr(module, "__file__", str(file))
    return file


def test_a_changed_checkout_is_marked(source: Path) -> None:
    head = git(source.parent, "rev-parse", "HEAD")
    assert source_commit() == head[:12]
    (source.parent / "new.txt").touch()  # untracked: it is not what runs
    assert source_commit() == head[:12]
    source.write_text("2")
    assert source_commit() == f"{head[:12]}+"


def test_an_environment_within_another_repository_is_not_a_checkout(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = source.parents[1] / ".venv" / "bitscale" / "source_commit.py"
    monkeypatch.setattr(module, "__file__", str(installed))
    assert source_commit() == ""
