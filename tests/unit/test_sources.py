"""Documents from every kind of input: sections, ranges, newlines, encodings, every message."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from bitscale.data import python_docs, text_files
from bitscale.data.parts import (
    MAX_PART_BYTES,
    MIN_PART_BYTES,
    plan_parts,
    split_of,
    wanted_splits,
)
from bitscale.data.sources import SourceOptions, Span, find_inputs, read_span
from bitscale.errors import DataError

pytestmark = pytest.mark.unit


def read(*inputs: Path | str, **options: object) -> list[str]:
    source = SourceOptions(**options)  # type: ignore[arg-type]
    found = find_inputs(tuple(map(str, inputs)), source)
    return [text for span in found.spans for text in read_span(span, source)]


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# Plain text


def test_folder_is_read_sorted_recursive_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/.hidden", ".git/x", "c"):
        write(tmp_path / name, name)
    assert read(tmp_path) == ["a/z.md", "b.txt", "c"]
    files = find_inputs((str(tmp_path),), SourceOptions()).files
    assert [file.name for file in files] == ["a/z.md", "b.txt", "c"]


@given(text=st.text(st.sampled_from("ab é漢\n"), max_size=200), section_bytes=st.integers(1, 40))
def test_sections_lose_nothing_and_fit(text: str, section_bytes: int) -> None:
    sections = list(text_files.cut_sections(text, section_bytes))
    assert "".join(sections) == text
    for section in sections:
        # longer only where one line alone is
        assert len(section.encode()) <= section_bytes or "\n" not in section[:-1]


def test_sections_are_cut_at_blank_lines_then_at_lines() -> None:
    assert list(text_files.cut_sections("a\nb\n\nc\nd\n\ne", 5)) == ["a\nb\n\n", "c\nd\n\n", "e"]
    assert list(text_files.cut_sections("aa\nbb\ncc\n", 7)) == ["aa\nbb\n", "cc\n"]
    assert list(text_files.cut_sections("a" * 9 + "\nb", 4)) == ["a" * 9 + "\n", "b"]
    assert list(text_files.cut_sections("a" * 9, 4)) == ["a" * 9]


def test_section_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\n\ntwo\n\nthree\n")
    assert read(path) == ["one\n\ntwo\n\nthree\n"]
    assert read(path, section_bytes=6) == ["one\n\n", "two\n\n", "three\n"]
    assert read(path, section_bytes=0) == ["one\n\ntwo\n\nthree\n"]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"a\r\nb\r\n", "a\nb\n"),
        (b"a\rb\r\rc", "a\nb\n\nc"),
        (b"a\n\r\nb", "a\n\nb"),
        (b"\xef\xbb\xbfa", "a"),
        (b"", ""),
    ],
)
def test_newlines_and_byte_order_mark(tmp_path: Path, raw: bytes, text: str) -> None:
    path = write(tmp_path / "a.txt", raw)
    assert read(path) == [text]
    assert read(path, section_bytes=0) == [text]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("paragraph_lines", [3, 10_000_000])
def test_ranges_of_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newline: str, paragraph_lines: int
) -> None:
    monkeypatch.setattr(text_files, "RANGE_BYTES", 1000)
    monkeypatch.setattr(text_files, "SEARCH_BYTES", 100)
    lines = [f"line {i} é漢" + ("\n" if i % paragraph_lines == 2 else "") for i in range(500)]
    text = "\n".join(lines)
    path = write(tmp_path / "a.txt", text.replace("\n", newline))
    found = find_inputs((str(path),), SourceOptions())
    assert len(found.spans) > 5
    assert sum(span.num_bytes for span in found.spans) == path.stat().st_size
    sections = read(path, section_bytes=200)
    assert "".join(sections) == text
    if paragraph_lines == 3:
        assert all(section.endswith("\n\n") for section in sections[:-1])
    assert len(find_inputs((str(path),), SourceOptions(section_bytes=0)).spans) == 1


def test_one_long_line_is_one_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "RANGE_BYTES", 100)
    path = write(tmp_path / "a.txt", "x" * 1000 + "\n" + "y" * 1000)
    assert read(path) == ["x" * 1000 + "\n", "y" * 1000]
    spans = find_inputs((str(path),), SourceOptions()).spans
    assert [(span.start, span.stop) for span in spans] == [(0, 1001), (1001, 2001)]


def test_invalid_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "RANGE_BYTES", 100)
    raw = b"line\n\n" * 50 + b"caf\xe9 au lait\n"
    path = write(tmp_path / "latin.txt", raw)
    with pytest.raises(DataError, match=r"latin\.txt: invalid UTF-8 at byte 303 \(0xe9\)") as e:
        read(path)
    assert "--encoding-errors replace" in str(e.value)
    assert "caf\ufffd au lait" in "".join(read(path, encoding_errors="replace"))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    compress(path, b"one\r\n\r\ntwo")
    assert read(path, section_bytes=5) == ["one\n\n", "two"]


# JSONL


def compress(path: Path, data: bytes) -> None:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data[:7]) + gzip.compress(data[7:]))  # two members
    elif path.suffix == ".zst":
        compressor = zstandard.ZstdCompressor()
        path.write_bytes(compressor.compress(data[:7]) + compressor.compress(data[7:]))
    else:
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    content = jsonl({"body": "one\r\ntwo"}, {"body": "\ufeffé 漢"}, {"body": None}, {"body": ""})
    compress(tmp_path / name, b"\xef\xbb\xbf" + content.encode() + b"\n  \n")
    assert read(tmp_path / name, text_key="body") == ["one\ntwo", "é 漢", "", ""]


def test_jsonl_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "RANGE_BYTES", 500)
    texts = [f"document {i}\n\nwith a blank line" for i in range(100)]
    path = write(tmp_path / "a.jsonl", jsonl(*({"text": text} for text in texts)))
    assert len(find_inputs((str(path),), SourceOptions()).spans) > 5
    assert read(path) == texts
    with path.open("a") as stream:
        stream.write("{broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl:101: not a JSON object"):
        read(path)


GOOD = '{"text": "a"}\n'


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"\.jsonl{}:3: not a JSON object \(.*; mend or remove the line"),
        ("[" * 100_000, r"\.jsonl{}:3: not a JSON object"),
        ('["a"]', r"\.jsonl{}:3: a list instead of an object with key 'text'"),
        ('{{"body": "a", "id": 1}}', r"\.jsonl{}:3: no 'text'; found body, id; .*--text-key"),
        ("{{}}", r"\.jsonl{}:3: no 'text'; found nothing"),
        ('{{"text": 7}}', r"\.jsonl{}:3: 'text' holds a value of type int .*--text-key"),
        ('{{"text": "\\ud83d"}}', r"\.jsonl{}:3: .*lone surrogate U\+D83D.*--encoding-errors"),
    ],
)
def test_jsonl_messages(tmp_path: Path, line: str, message: str, suffix: str) -> None:
    path = tmp_path / f"bad.jsonl{suffix}"
    compress(path, (GOOD + "\n" + line.replace("{{", "{").replace("}}", "}") + "\n").encode())
    with pytest.raises(DataError, match=message.replace("{}", suffix.replace(".", r"\."))):
        read(path)


def test_jsonl_replaces_what_is_not_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "\\ud83d!"}\n{"text": "caf\xe9"}\n')
    assert read(path, encoding_errors="replace") == ["\ufffd!", "caf\ufffd"]
    path = write(tmp_path / "b.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl: invalid UTF-8 at byte 27 \(0xe9\)"):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "not compressed"])
def test_damaged_compression(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    compress(path, jsonl(*({"text": f"{i} text"} for i in range(1000))).encode())
    raw = path.read_bytes()
    path.write_bytes(raw[:-9] if damage == "truncated" else GOOD.encode())
    with pytest.raises(DataError, match=r"input .*a\.jsonl.* cannot be read .*copy it again"):
        read(path)


# Parquet


def write_parquet(path: Path, rows_per_group: int = 3, **columns: list[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_per_group)
    return path


def test_parquet_row_groups(tmp_path: Path) -> None:
    texts = [f"row {i}\r\n" for i in range(10)] + [None, ""]
    path = write_parquet(tmp_path / "a.parquet", body=texts, n=list(range(12)))
    assert len(find_inputs((str(path),), SourceOptions(text_key="body")).spans) == 4
    assert read(path, text_key="body") == [f"row {i}\n" for i in range(10)] + ["", ""]


def test_parquet_messages(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", body=["a"], n=[1])
    with pytest.raises(DataError, match=r"a\.parquet: no 'text'; found body, n; .*--text-key"):
        read(path)
    with pytest.raises(DataError, match=r"column 'n' holds int64 instead of text"):
        read(path, text_key="n")
    broken = write(tmp_path / "b.parquet", "no parquet")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read as parquet \(.*\); copy"):
        read(broken)


def test_parquet_with_damaged_pages(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=[f"some text {i}" for i in range(1000)])
    raw = bytearray(path.read_bytes())
    raw[4:60] = b"\xff" * 56
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet"):
        read(path)


def test_parquet_invalid_utf8(tmp_path: Path) -> None:
    strings = pyarrow.array([b"good", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": strings}), path)
    with pytest.raises(DataError, match=r"a\.parquet row 1: invalid UTF-8 at byte 3"):
        read(path)
    assert read(path, encoding_errors="replace") == ["good", "caf\ufffd"]


# Hugging Face datasets, from a local folder


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for shard in range(3):
        records = [{"text": f"shard {shard} row {row}\r\n", "n": row} for row in range(4)]
        write(tmp_path / "ds" / f"train-{shard}.jsonl", jsonl(*records))
    write(tmp_path / "ds" / "test.jsonl", jsonl({"text": None, "n": 1}))
    return tmp_path / "ds"


def test_hf_dataset(dataset: Path) -> None:
    texts = read(dataset, format="hf")
    assert texts == [f"shard {shard} row {row}\n" for shard in range(3) for row in range(4)]
    assert read(dataset, format="hf", hf_split="test") == [""]
    found = find_inputs((str(dataset),), SourceOptions(format="hf"))
    assert [(span.start, span.stop) for span in found.spans] == [(0, 3), (1, 3), (2, 3)]
    assert [len(part.spans) for part in plan_parts(found.spans)] == [1, 1, 1]


def test_hf_messages(dataset: Path) -> None:
    with pytest.raises(DataError, match=r"dataset '.*ds': no 'body'; found text, n; .*--text-key"):
        read(dataset, format="hf", text_key="body")
    with pytest.raises(DataError, match=r"row 0: 'n' holds a value of type int"):
        read(dataset, format="hf", text_key="n")
    with pytest.raises(DataError, match=r"split 'dev', cannot be opened \(.*--hf-split"):
        read(dataset, format="hf", hf_split="dev")
    with pytest.raises(DataError, match=r"cannot be opened \(.*--hf-config"):
        read(dataset, format="hf", hf_config="de")


def test_hf_dataset_with_a_lone_surrogate_names_the_row(dataset: Path) -> None:
    source = SourceOptions(format="hf")
    from bitscale.data import sources

    where = "dataset 'x' shard 0 row 7".__str__
    with pytest.raises(DataError, match="dataset 'x' shard 0 row 7: the text holds a lone"):
        sources._text_of({"text": "\udc00"}, where, source)


# The embedded corpus


def test_python_docs() -> None:
    sys.modules.pop("antigravity", None)  # importing it would open a web browser
    texts = read(python_docs.NAME)
    assert "antigravity" not in sys.modules
    assert sum(len(text.encode()) for text in texts) > 1_000_000
    assert not any("\r" in text or not text.strip() for text in texts)
    assert python_docs.has_topics()
    assert texts[0].startswith('The "assert" statement')
    decoder = next(text for text in texts if text.startswith("json.decoder\n\n"))
    assert "JSONDecoder.raw_decode(self, s, idx=0)\n\nDecode a JSON document" in decoder
    file = find_inputs((python_docs.NAME,), SourceOptions()).files[0]
    assert file.version == f"Python {sys.version.split()[0]}"
    names = [file.module for file in python_docs.documentation_files()]
    assert len(set(names)) == len(names) and not any("idlelib" in name for name in names)


def test_python_docs_without_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docs, "_topics_path", lambda: None)
    python_docs.documentation_files.cache_clear()
    try:
        found = find_inputs((python_docs.NAME,), SourceOptions())
        assert found.notes == [
            "this Python comes without pydoc_data.topics; using the standard library's docstrings"
        ]
        documents = list(read_span(found.spans[0], SourceOptions()))
        assert documents[0].startswith("__future__\n\nRecord of phased-in incompatible")
    finally:
        python_docs.documentation_files.cache_clear()


# Inputs in general


@pytest.mark.parametrize(
    ("given_input", "message"),
    [
        ("nowhere", r"input 'nowhere' does not exist; .*--format hf"),
        ("builtin:novels", r"'builtin:novels' is unknown; the only one is builtin:python-docs"),
    ],
)
def test_unknown_inputs(given_input: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(given_input)


def test_folders_without_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file"):
        read(tmp_path)
    write(tmp_path / "a.txt", "text")
    with pytest.raises(DataError, match="holds no parquet file"):
        read(tmp_path, format="parquet")
    write(tmp_path / "b.jsonl", GOOD)
    assert read(tmp_path, format="jsonl") == ["a"]
    assert read(tmp_path) == ["text", "a"]
    assert read(tmp_path / "b.jsonl", format="text") == [GOOD]


def test_unreadable_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "text")

    def refuse(self: Path, mode: str = "r") -> io.BytesIO:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.txt cannot be read: Permission denied; check"):
        read(path)


def test_input_that_vanishes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "text")
    span = find_inputs((str(path),), SourceOptions()).spans[0]
    path.unlink()
    with pytest.raises(DataError, match=r"a\.txt is gone; put it back"):
        list(read_span(span, SourceOptions()))


# Parts and splits


def test_parts_keep_order_and_size() -> None:
    spans = [Span("text", str(i), 0, 9, 300_000) for i in range(10)]
    parts = plan_parts(spans)
    assert [span for part in parts for span in part.spans] == spans
    assert [part.index for part in parts] == list(range(len(parts)))
    assert all(part.num_bytes >= MIN_PART_BYTES for part in parts[:-1])
    huge = [Span("text", str(i), 0, 9, 4 << 20) for i in range(100_000)]
    assert {part.num_bytes for part in plan_parts(huge)} == {MAX_PART_BYTES}


def test_split_shares_and_stability() -> None:
    texts = [f"document {i}".encode() for i in range(20_000)]
    split = (0.7, 0.2, 0.1)
    names = [split_of(text, split) for text in texts]
    for name, share in zip(("train", "valid", "test"), split, strict=True):
        assert abs(names.count(name) / len(names) - share) < 0.01
    assert names == [split_of(text, split) for text in texts]


@pytest.mark.parametrize("split", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.4, 0.0, 0.6)])
def test_split_of_share_0_gets_nothing(split: tuple[float, float, float]) -> None:
    # shares that sum to a little less than 1 must not fill it either
    for shares in (split, tuple(share * (1 - 1e-7) for share in split)):
        names = {split_of(str(i).encode(), shares) for i in range(2000)}  # type: ignore[arg-type]
        assert names == set(wanted_splits(split))
