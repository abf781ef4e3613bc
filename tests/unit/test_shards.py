"""Token shards: byte identity with megatron-core, multi-sequence documents, damage."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDataset,
    IndexedDatasetBuilder,
)

from bitscale.data.shards import HEADER, ShardWriter, TokenShard, token_dtype
from bitscale.errors import DataError

pytestmark = pytest.mark.unit

DOCUMENTS = [[5, 6, 7], [0], [499, 1, 2, 3], [8, 8]]


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 500) -> Path:
    with ShardWriter(prefix, vocab_size) as writer:
        writer.add_documents(documents)
    return prefix


def write_with_megatron(prefix: Path, documents: list[list[int]], vocab_size: int) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("vocab_size", [2, 500, 65499, 65500, 2**31 - 1])
def test_dtype_rule_is_megatrons(vocab_size: int) -> None:
    assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


@settings(max_examples=30, deadline=None)
@given(
    vocab_size=st.sampled_from([300, 65499, 65500, 200_000]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
def test_bytes_equal_megatrons(
    vocab_size: int, lengths: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    random = np.random.default_rng(seed)
    documents = [random.integers(0, vocab_size, length).tolist() for length in lengths]
    folder = tmp_path_factory.mktemp("shards")
    ours, theirs = folder / "ours", folder / "theirs"
    with ShardWriter(ours, vocab_size) as writer:
        for ids in documents:
            writer.add_document(ids)
    write_with_megatron(theirs, documents, vocab_size)
    for suffix in ("bin", "idx"):
        assert Path(f"{ours}.{suffix}").read_bytes() == Path(f"{theirs}.{suffix}").read_bytes()


def test_megatron_reads_ours(tmp_path: Path) -> None:
    write(tmp_path / "a.b", DOCUMENTS)
    dataset = IndexedDataset(str(tmp_path / "a.b"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_reads_megatrons_documents_of_several_sequences(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.add_item(torch.tensor([6]))
    builder.end_document()
    builder.add_document(torch.tensor([7, 70000, 9]), [1, 1, 1])
    builder.finalize(str(tmp_path / "m.idx"))
    shard = TokenShard(tmp_path / "m")
    assert (shard.num_tokens, shard.num_documents, shard.dtype) == (9, 3, np.int32)
    assert shard.document_starts.tolist() == [0, 5, 6, 9]
    assert shard.document_starts.dtype == np.int64
    assert shard.tokens(5, 9).tolist() == [6, 7, 70000, 9]


def test_tokens_are_a_view_on_the_file(tmp_path: Path) -> None:
    shard = TokenShard(str(write(tmp_path / "s", DOCUMENTS)))
    view = shard.tokens(2, 6)
    assert view.tolist() == [7, 0, 499, 1]
    assert type(view) is np.ndarray and view.dtype == np.uint16
    assert np.shares_memory(view, shard.tokens(0, shard.num_tokens))
    assert not view.flags.writeable


def test_pickle_opens_the_file_again(tmp_path: Path) -> None:
    data = pickle.dumps(TokenShard(write(tmp_path / "s", [[1] * 10_000])))
    assert len(data) < 1000
    assert pickle.loads(data).num_tokens == 10_000


def test_add_shard_equals_adding_its_documents(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS[:2])
    write(tmp_path / "none", [])
    write(tmp_path / "b", DOCUMENTS[2:])
    with ShardWriter(tmp_path / "joined", 500) as writer:
        for name in ("a", "none", "b"):
            writer.add_shard(tmp_path / name)
    assert (writer.num_documents, writer.num_tokens) == (4, 10)
    write(tmp_path / "direct", DOCUMENTS)
    for suffix in ("bin", "idx"):
        joined = (tmp_path / f"joined.{suffix}").read_bytes()
        assert joined == (tmp_path / f"direct.{suffix}").read_bytes()


def test_empty_shard(tmp_path: Path) -> None:
    shard = TokenShard(write(tmp_path / "empty", []))
    assert (shard.num_tokens, shard.num_documents) == (0, 0)
    assert shard.document_starts.tolist() == [0]
    assert shard.tokens(0, 0).size == 0


@pytest.mark.parametrize("ids", [[1, 500], [-1, 3]])
def test_id_outside_the_vocabulary(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(DataError, match=r"token id (500|-1) lies outside the vocabulary of 500"):
        write(tmp_path / "s", [ids])


def test_failed_writer_publishes_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "s", 500) as writer:
        writer.add_document([1, 2])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_unfinished_writer_does_not_touch_an_older_shard(tmp_path: Path) -> None:
    write(tmp_path / "s", DOCUMENTS)
    writer = ShardWriter(tmp_path / "s", 500)
    writer.add_document([9] * 100)
    assert TokenShard(tmp_path / "s").num_tokens == 10
    with writer:
        pass
    assert TokenShard(tmp_path / "s").num_tokens == 100


def test_new_tokens_are_never_described_by_the_old_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "s", DOCUMENTS)
    replace = Path.replace

    def fail_on_index(self: Path, target: Path) -> Path:
        if self.name == "s.idx.partial":
            raise OSError("killed here")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_on_index)
    with pytest.raises(OSError, match="killed here"):
        write(tmp_path / "s", DOCUMENTS)
    with pytest.raises(DataError, match=r"s\.idx does not exist"):
        TokenShard(tmp_path / "s")


def patch(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def lengths_at(sequence: int) -> int:
    return HEADER.size + 4 * sequence


DAMAGE: dict[str, tuple[Any, str]] = {
    "missing index": (lambda p: Path(f"{p}.idx").unlink(), r"s\.idx does not exist; give"),
    "missing data": (lambda p: Path(f"{p}.bin").unlink(), r"s\.bin does not exist beside"),
    "magic": (lambda p: patch(Path(f"{p}.idx"), 0, b"X"), r"begins with b'XMIDIDX.*MMIDIDX"),
    "empty index": (lambda p: Path(f"{p}.idx").write_bytes(b""), r"begins with b''"),
    "inside header": (
        lambda p: Path(f"{p}.idx").write_bytes(Path(f"{p}.idx").read_bytes()[:20]),
        r"ends after 20 bytes, inside its header",
    ),
    "truncated index": (
        lambda p: Path(f"{p}.idx").write_bytes(Path(f"{p}.idx").read_bytes()[:-3]),
        r"has 119 bytes, but 4 sequences and 5 document boundaries need 122",
    ),
    "version": (
        lambda p: patch(Path(f"{p}.idx"), 9, struct.pack("<Q", 2)),
        r"index version 2; only 1",
    ),
    "float tokens": (lambda p: patch(Path(f"{p}.idx"), 17, b"\x07"), r"dtype code 7"),
    "unknown code": (lambda p: patch(Path(f"{p}.idx"), 17, b"\x63"), r"dtype code 99"),
    "truncated data": (
        lambda p: Path(f"{p}.bin").write_bytes(Path(f"{p}.bin").read_bytes()[:-1]),
        r"s\.bin has 19 bytes, its index describes 20",
    ),
    "negative length": (
        lambda p: patch(Path(f"{p}.idx"), lengths_at(1), struct.pack("<i", -1)),
        r"a sequence of -1 tokens",
    ),
    "gap": (
        lambda p: patch(Path(f"{p}.idx"), lengths_at(1), struct.pack("<i", 2)),
        r"do not follow each other without gaps",
    ),
    "boundaries": (
        lambda p: patch(Path(f"{p}.idx"), lengths_at(4) + 8 * 4, struct.pack("<q", 1)),
        r"do not run from 0 to 4 sequences",
    ),
    "falling boundaries": (
        lambda p: patch(Path(f"{p}.idx"), lengths_at(4) + 8 * 4 + 8, struct.pack("<q", 4)),
        r"do not run from 0 to 4 sequences",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_with_a_remedy(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(write(tmp_path / "s", DOCUMENTS))
    with pytest.raises(DataError, match=message) as caught:
        TokenShard(tmp_path / "s")
    assert str(tmp_path / "s") in str(caught.value)
    assert ";" in str(caught.value) and "\n" not in str(caught.value)


def test_megatron_document_without_end_is_refused(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "s.bin"), dtype=np.uint16)
    builder.add_item(torch.tensor([1, 2]))
    builder.finalize(str(tmp_path / "s.idx"))
    with pytest.raises(DataError, match="do not run from 0 to 1 sequences"):
        TokenShard(tmp_path / "s")


def test_index_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "s.idx").mkdir()
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        TokenShard(tmp_path / "s")
