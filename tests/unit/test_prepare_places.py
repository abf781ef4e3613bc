"""Where `prepare` reads and writes: links, names that are no UTF-8, places that have no name."""

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from bitscale.data.prepare import PrepareOptions, prepare
from bitscale.data.sources import SourceOptions, find_inputs
from bitscale.errors import DataError

pytestmark = pytest.mark.unit


def options(folder: Path, out: Path, **changes: object) -> PrepareOptions:
    """For the texts in `folder`/texts; all of them go into the train split."""
    (folder / "texts").mkdir(exist_ok=True)
    (folder / "texts" / "a.txt").write_text("a")
    tokenizer = folder / "tokenizer.json"
    Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a")).save(str(tokenizer))
    given = {"tokenizer": tokenizer, "split": (1.0, 0.0, 0.0), "workers": 1, **changes}
    return PrepareOptions(inputs=(str(folder / "texts"),), out=out, **given)  # type: ignore[arg-type]


def test_a_linked_folder_is_filled_and_the_link_stays(tmp_path: Path) -> None:
    """It may lead to another disk: nothing may come to lie on this one."""
    (tmp_path / "disk" / "corpus").mkdir(parents=True)
    out = tmp_path / "corpus"
    out.symlink_to(tmp_path / "disk" / "corpus")
    prepare(options(tmp_path, out))
    assert out.is_symlink() and (tmp_path / "disk" / "corpus" / "corpus.json").is_file()
    assert not list(tmp_path.glob("*.partial")) + list((tmp_path / "disk").glob("*.partial"))
    prepare(options(tmp_path, out, eod_token="a", overwrite=True))
    assert out.is_symlink() and (out / "corpus.json").is_file()


def test_places_that_cannot_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, mount = tmp_path / "here", tmp_path / "mount"
    here.mkdir()
    mount.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(Path, "is_mount", lambda self: self == mount)
    for out in (Path(), mount):
        with pytest.raises(DataError, match="is a place that no folder can be renamed to; name"):
            prepare(options(tmp_path, out))
    assert not list(tmp_path.rglob("*partial*"))


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    made = options(tmp_path, tmp_path / "out")
    name = os.fsdecode(b"M\xfcller.txt")
    (tmp_path / "texts" / name).write_text("a")
    corpus = prepare(made)
    assert [entry[0] for entry in corpus.manifest.inputs] == ["M\\xfcller.txt", "a.txt"]
    assert prepare(made).fingerprint == corpus.fingerprint  # up to date


def test_links_that_are_not_followed_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_text("b")
    (folder / "file.txt").symlink_to(tmp_path / "more" / "b.txt")
    found = find_inputs((str(folder),), SourceOptions())
    assert ([file.name for file in found.files], found.notes) == (["file.txt"], [])
    (folder / "wiki").symlink_to(tmp_path / "more")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    found = find_inputs((str(folder),), SourceOptions())
    assert [file.name for file in found.files] == ["file.txt"]
    assert found.notes == [
        f"folder {str(folder)!r}: 2 links to folders, or to nothing, are not followed (gone.txt, "
        "wiki); name what they lead to as inputs of their own"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": (float("nan"), 0.0, 1.0)}, "--split nan,0,1 is not three shares that sum to 1"),
        ({"tokenizer": None, "vocab_size": 10**12}, "1000000000000 is more than a tokenizer can"),
    ],
)
def test_numbers_that_mean_nothing(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(options(tmp_path, tmp_path / "out", **changes))
    assert not (tmp_path / "out.partial").exists()
