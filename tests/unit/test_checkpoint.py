"""Checkpoints in one process, without DeepSpeed: format, integrity, messages."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from tiny_checkpoints import SHAPES, STATE_FILE, fragment, make_fragments, meta_at, names, save

from bitscale import checkpoint
from bitscale.checkpoint import Reader
from bitscale.checkpoint.write import write_safetensors
from bitscale.engine.fragments import Fragment
from bitscale.errors import CheckpointError
from bitscale.mesh import single_process_mesh
from bitscale.model.collectives import ParameterShard

pytestmark = pytest.mark.unit


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


# Format


def test_files_and_keys_are_as_documented(root: Path) -> None:
    """docs/checkpoints.md, to the byte."""
    path = save(root)
    assert sorted(names(list(path.iterdir()))) == ["SHA256SUMS", "meta.json", STATE_FILE]
    with safe_open(path / STATE_FILE, framework="pt") as file:
        keys = set(file.keys())
        assert file.get_tensor("w|exp_avg|4").dtype == torch.float32
        assert torch.equal(file.get_tensor("b|master|0"), make_fragments()[2].master)
    kinds = ("master", "exp_avg", "exp_avg_sq")
    pieces = {
        f"{name}|{kind}|{start}" for name, start in (("w", 0), ("w", 4), ("b", 0)) for kind in kinds
    }
    assert keys == pieces | {"rng_state"}

    tree = json.loads((path / "meta.json").read_text())
    data = (path / STATE_FILE).read_bytes()
    assert tree == {
        "format": "bitscale-checkpoint-2",
        "step": 1,
        "tokens": 1000,
        "lambda_weight": 0.5,
        "lambda_activation": 0.25,
        "config": {"optim": {"lr": 3e-4}},
        "config_hash": "abc",
        "identity": {"data.seed": "0"},
        "shapes": SHAPES,
        "world_size": 1,
        "versions": {"torch": "2"},
        "adam_steps": {"w": 11, "b": 12},
        "amendments": [],
        "files": {STATE_FILE: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}},
    }
    assert (root / "latest").read_text() == "step-00000001\n"
    meta_digest = hashlib.sha256((path / "meta.json").read_bytes()).hexdigest()
    sums = f"{tree['files'][STATE_FILE]['sha256']}  {STATE_FILE}\n{meta_digest}  meta.json\n"
    assert (path / "SHA256SUMS").read_text() == sums


def test_state_files_have_the_bytes_of_safetensors(tmp_path: Path) -> None:
    """Ours hashes on the way."""
    tensors = {
        "rng_state": torch.get_rng_state(),
        "w|master|4": torch.randn(11),
        "é|exp_avg|0": torch.randn(3, 5)[:, 0].contiguous(),
        "w|master|0": torch.randn(4),
        "none": torch.empty(0),
    }
    num_bytes, digest = write_safetensors(tmp_path / "state", tensors)
    content = (tmp_path / "state").read_bytes()
    assert content == safetensors.torch.save(tensors)
    assert (num_bytes, digest) == (len(content), hashlib.sha256(content).hexdigest())


def test_nothing_else_is_left_behind(root: Path) -> None:
    save(root)
    assert sorted(names(list(root.iterdir()))) == ["latest", "step-00000001"]


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_files_are_readable_as_the_umask_says(root: Path, umask: int, mode: int) -> None:
    """safetensors alone creates 0600 files: a team could not read each other's checkpoints."""
    before = os.umask(umask)
    try:
        path = save(root)
    finally:
        os.umask(before)
    for file in (path / STATE_FILE, path / "meta.json", root / "latest"):
        assert file.stat().st_mode & 0o777 == mode, file.name


# Reading


def test_restore_fills_any_cut_in_place(root: Path) -> None:
    """Cuts that straddle the saved pieces, starting and ending anywhere."""
    reader = Reader(save(root))
    w = [torch.cat(pair) for pair in zip(*(_tensors(f) for f in make_fragments()[:2]), strict=True)]
    for low in range(15):
        for high in range(low + 1, 16):
            target = fragment("w", low, torch.zeros(3, high - low))
            reader.restore([target], SHAPES)
            for ours, whole in zip(_tensors(target), w, strict=True):
                assert torch.equal(ours, whole[low:high])
            assert int(target.step) == 11


def _tensors(f: Fragment) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return f.master, f.exp_avg, f.exp_avg_sq


def test_a_tensor_parallel_rank_reads_its_own_part_only(root: Path) -> None:
    """Of the same number of ranks; another number puts the whole together first."""
    whole = torch.arange(12.0).view(4, 3)
    shards = [ParameterShard(0, 2 * rank, 2 * rank + 2, (4, 3)) for rank in range(2)]
    parts = [
        replace(fragment("w", 0, shard.of(whole).reshape(1, 6).repeat(3, 1)), shard=shard)
        for shard in shards
    ]
    meta = replace(meta_at(1), shapes={"w": [4, 3]})
    mesh = single_process_mesh("cpu")
    reader = Reader(checkpoint.save(root, meta, parts, mesh, rng_state=torch.get_rng_state()))
    for shard in shards:
        values = reader.read("w", "master", 1, 5, shard)
        assert torch.equal(values, shard.of(whole).flatten()[1:])
    assert reader._whole is None
    other = ParameterShard(1, 1, 3, (4, 3))
    assert torch.equal(reader.read("w", "master", 0, 8, other), whole[:, 1:].flatten())
    assert reader._whole is not None


def test_parameters_come_in_their_shapes(root: Path) -> None:
    parameters = dict(Reader(save(root)).parameters())
    assert {name: list(value.shape) for name, value in parameters.items()} == SHAPES
    assert torch.equal(parameters["b"], make_fragments()[2].master)


def test_rng_state_is_per_rank(root: Path) -> None:
    reader = Reader(save(root, step=5))
    state = reader.rng_state(0)
    assert state is not None
    assert torch.equal(state, torch.Generator().manual_seed(5).get_state())
    assert reader.rng_state(1) is None


def test_a_name_with_dots_and_digits_survives(root: Path) -> None:
    name = "layers.10.attn.q.weight"
    saved = fragment(name, 0, torch.randn(3, 2))
    meta = replace(meta_at(1), shapes={name: [2]})
    path = checkpoint.save(
        root, meta, [saved], single_process_mesh("cpu"), rng_state=torch.get_rng_state()
    )
    assert torch.equal(Reader(path).read(name, "exp_avg", 0, 2), saved.exp_avg)


# What is wrong with a checkpoint, in words


def truncate(path: Path) -> None:
    data = (path / STATE_FILE).read_bytes()
    (path / STATE_FILE).write_bytes(data[:-10])


def flip_bit(path: Path) -> None:
    data = bytearray((path / STATE_FILE).read_bytes())
    data[-20] ^= 0b100
    (path / STATE_FILE).write_bytes(data)


def remove_file(path: Path) -> None:
    (path / STATE_FILE).unlink()


def remove_meta(path: Path) -> None:
    (path / "meta.json").unlink()


def damage_meta(path: Path) -> None:
    text = (path / "meta.json").read_text()
    (path / "meta.json").write_text(text[: len(text) // 2])


def damage_meta_encoding(path: Path) -> None:
    (path / "meta.json").write_bytes(b"\xff\xfe" + (path / "meta.json").read_bytes())


def change_meta(path: Path, **changes: object) -> None:
    """As if it had been written so: with the right checksum."""
    tree = json.loads((path / "meta.json").read_text()) | changes
    content = json.dumps(tree)
    (path / "meta.json").write_text(content)
    digest = hashlib.sha256(content.encode()).hexdigest()
    (path / "SHA256SUMS").write_text(f"{digest}  meta.json\n")


def flip_bit_of_meta(path: Path) -> None:
    """`tokens` becomes another number: still JSON, still a Meta."""
    content = (path / "meta.json").read_bytes()
    (path / "meta.json").write_bytes(content.replace(b'"tokens": 1000', b'"tokens": 1001'))


def remove_sums(path: Path) -> None:
    (path / "SHA256SUMS").unlink()


def empty_sums(path: Path) -> None:
    (path / "SHA256SUMS").write_text("")


def other_format(path: Path) -> None:
    change_meta(path, format="bitscale-checkpoint-9")


def unknown_field(path: Path) -> None:
    change_meta(path, colour="blue")


def meta_is_a_list(path: Path) -> None:
    (path / "meta.json").write_text("[1, 2]")


def not_safetensors(path: Path) -> None:
    data = b"not a safetensors file, though its checksum is right"
    (path / STATE_FILE).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    change_meta(path, files={STATE_FILE: {"bytes": len(data), "sha256": digest}})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, f"{STATE_FILE}: [0-9]+ bytes instead of [0-9]+; truncated or foreign: use ano"),
        (flip_bit, f"{STATE_FILE}: checksum differs from meta.json; damaged or foreign: use ano"),
        (remove_file, f"{STATE_FILE}: missing, though meta.json lists it; use another checkpoint"),
        (remove_meta, "meta.json: missing; the checkpoint is incomplete: use another checkpoint"),
        (damage_meta, r"meta.json: damaged \(.*\); use another checkpoint"),
        (damage_meta_encoding, r"meta.json: damaged \(.*codec.*\); use another checkpoint"),
        (other_format, "meta.json: format 'bitscale-checkpoint-9', this version reads 'bitscale-c"),
        (flip_bit_of_meta, "meta.json: checksum differs from SHA256SUMS; damaged, or edited by ha"),
        (remove_sums, "SHA256SUMS: missing; the checkpoint is incomplete: use another checkpoint"),
        (empty_sums, "meta.json: checksum differs from SHA256SUMS; damaged, or edited by hand"),
        (unknown_field, r"meta.json: damaged \(.*'colour'\); use another checkpoint"),
        (meta_is_a_list, r"meta.json: damaged \(.*\); use another checkpoint"),
        (not_safetensors, rf"{STATE_FILE}: not a safetensors file \(.*\); use another checkpoint"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_named(root: Path, damage: object, message: str) -> None:
    path = save(root)
    assert callable(damage)
    damage(path)
    with pytest.raises(CheckpointError, match=message) as error:
        Reader(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_every_flipped_byte_of_the_state_is_noticed(root: Path) -> None:
    path = save(root)
    data = (path / STATE_FILE).read_bytes()
    for position in range(0, len(data), 97):
        (path / STATE_FILE).write_bytes(
            data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        )
        with pytest.raises(CheckpointError, match="checksum differs"):
            Reader(path)
    (path / STATE_FILE).write_bytes(data)
    Reader(path)


def test_a_checkpoint_of_the_first_format_is_read(root: Path) -> None:
    """Written before meta.json had a checksum."""
    path = save(root)
    change_meta(path, format="bitscale-checkpoint-1")
    (path / "SHA256SUMS").unlink()
    assert Reader(path).meta.format == "bitscale-checkpoint-1"
    flip_bit(path)
    with pytest.raises(CheckpointError, match=r"checksum differs from meta\.json"):
        Reader(path)


def test_a_flip_to_the_first_format_does_not_escape_the_checksum(root: Path) -> None:
    path = save(root)
    text = (path / "meta.json").read_text()
    (path / "meta.json").write_text(text.replace("checkpoint-2", "checkpoint-1"))
    with pytest.raises(CheckpointError, match=r"meta\.json: checksum differs from SHA256SUMS"):
        Reader(path)


def test_ranks_that_open_together_share_the_verification(root: Path) -> None:
    path = save(root)
    second = "state-00001-of-00002.safetensors"
    shutil.copy(path / STATE_FILE, path / second)
    files = json.loads((path / "meta.json").read_text())["files"]
    change_meta(path, files=files | {second: files[STATE_FILE]})
    data = bytearray((path / second).read_bytes())
    data[-20] ^= 1
    (path / second).write_bytes(data)
    Reader(path, verify=(0, 2))
    for verify in ((1, 2), (0, 1)):
        with pytest.raises(CheckpointError, match=f"{second}: checksum differs"):
            Reader(path, verify=verify)
    (path / second).write_bytes(data[:-1])  # what costs nothing is looked at by every rank
    with pytest.raises(CheckpointError, match=f"{second}: .* bytes instead of"):
        Reader(path, verify=(0, 2))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"w": [4, 5], "b": [7]}, r"w has shape \[3, 5\] there and \[4, 5\] here"),
        ({"w": [3, 4], "b": [7]}, r"w has shape \[3, 5\] there and \[3, 4\] here"),
        ({"w": [5, 3], "b": [7]}, r"w has shape \[3, 5\] there and \[5, 3\] here"),
        ({"w": [3, 5]}, r"b has shape \[7\] there and none here"),
        (SHAPES | {"a": [1]}, r"a has shape none there and \[1\] here"),
    ],
)
def test_a_parameter_of_another_size_is_refused(
    root: Path, shapes: dict[str, list[int]], message: str
) -> None:
    """Also a smaller one, whose elements the checkpoint does have; nothing is written before."""
    target = fragment("w", 0, torch.zeros(3, 4))
    with pytest.raises(CheckpointError, match=message) as error:
        Reader(save(root)).restore([target], shapes)
    assert "the checkpoint is of another model" in str(error.value)
    assert not target.master.any()


def test_optional_parameters_may_be_missing_on_either_side(root: Path) -> None:
    """As the scales that a quantizer will learn, in a trunk of another quantizer."""
    reader = Reader(save(root))
    new = fragment("new.alpha", 0, torch.full((3, 2), 0.5))
    w = fragment("w", 0, torch.zeros(3, 15))
    shapes = {"w": [3, 5], "new.alpha": [2]}
    reader.restore([w, new], shapes, optional=["b", "new.alpha", "neither"])
    assert torch.equal(w.master[:4], make_fragments()[0].master)
    assert torch.equal(new.master, torch.full((2,), 0.5))
    assert int(new.step) == 12  # the largest count in the checkpoint
    assert not new.exp_avg.any() and not _tensors(new)[2].any()  # whatever was there before
    assert w.exp_avg.any()
    reader.restore([w], shapes, optional=["b", "new.alpha"], moments=False)
    assert not w.exp_avg.any() and not _tensors(w)[2].any() and int(w.step) == 0
    with pytest.raises(CheckpointError, match=r"b has shape \[7\] there and none here"):
        reader.restore([w, new], shapes, optional=["new.alpha"])


@pytest.mark.parametrize(("kind", "value"), [(0, float("nan")), (2, float("inf"))])
def test_state_that_is_not_finite_is_refused(root: Path, kind: int, value: float) -> None:
    saved = torch.ones(3, 2)
    saved[kind, 1] = value
    meta = replace(meta_at(1), shapes={"w": [2]})
    path = checkpoint.save(
        root,
        meta,
        [fragment("w", 0, saved)],
        single_process_mesh("cpu"),
        rng_state=torch.get_rng_state(),
    )
    target = fragment("w", 0, torch.zeros(3, 2))
    name = ("master", "exp_avg", "exp_avg_sq")[kind]
    with pytest.raises(CheckpointError, match=rf"w \({name}\) holds NaN or infinity; resume fr"):
        Reader(path).restore([target], {"w": [2]})


def test_elements_that_no_rank_saved_are_missed(root: Path) -> None:
    path = checkpoint.save(
        root,
        meta_at(1),
        make_fragments()[1:],  # without the first four elements of w
        single_process_mesh("cpu"),
        rng_state=torch.get_rng_state(),
    )
    message = r"w \(master\) has 11 of the 15 elements wanted; the checkpoint is of another model"
    with pytest.raises(CheckpointError, match=message):
        dict(Reader(path).parameters())
    assert Reader(path).read("w", "master", 4, 11).numel() == 11
