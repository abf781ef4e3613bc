"""Checkpoints in one process, without DeepSpeed: format, integrity, retention, messages."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from bitscale import checkpoint
from bitscale.checkpoint import Meta, Reader
from bitscale.checkpoint.write import write_safetensors
from bitscale.engine.fragments import Fragment
from bitscale.errors import CheckpointError
from bitscale.mesh import Mesh, single_process_mesh

pytestmark = pytest.mark.unit

SHAPES = {"w": [3, 5], "b": [7]}
STATE_FILE = "state-00000-of-00001.safetensors"


def meta_at(step: int) -> Meta:
    return Meta(
        step=step,
        tokens=step * 1000,
        lambda_weight=0.5,
        lambda_activation=0.25,
        config={"optim": {"lr": 3e-4}},
        config_hash="abc",
        identity={"data.seed": "0"},
        shapes=SHAPES,
        world_size=1,
        versions={"torch": "2"},
    )


def make_fragments(seed: int = 0) -> list[Fragment]:
    """`w` in two pieces as ZeRO would cut it, `b` whole, and a replica that others save."""
    torch.manual_seed(seed)
    return [
        fragment("w", 0, torch.randn(3, 4), 11),
        fragment("w", 4, torch.randn(3, 11), 11),
        fragment("b", 0, torch.randn(3, 7), 12),
        fragment("b", 0, torch.randn(3, 7), 12, saved_here=False),
    ]


def fragment(
    name: str, start: int, rows: torch.Tensor, step: int = 0, saved_here: bool = True
) -> Fragment:
    """`rows` [3, numel] are the master and the two moments."""
    master, exp_avg, exp_avg_sq = rows
    return Fragment(name, start, master, exp_avg, exp_avg_sq, torch.tensor(float(step)), saved_here)


def save(root: Path, step: int = 1, seed: int = 0) -> Path:
    rng_state = torch.Generator().manual_seed(step).get_state()
    mesh = single_process_mesh("cpu")
    return checkpoint.save(root, meta_at(step), make_fragments(seed), mesh, rng_state=rng_state)


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


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


# Which checkpoint is in force


def test_checkpoints_are_listed_oldest_first_and_the_last_is_in_force(root: Path) -> None:
    assert checkpoint.latest_checkpoint(root) is None
    for step in (9, 10, 100):
        save(root, step)
    assert names(checkpoint.list_checkpoints(root)) == [
        "step-00000009",
        "step-00000010",
        "step-00000100",
    ]
    assert checkpoint.latest_checkpoint(root) == root / "step-00000100"


def test_a_checkpoint_is_found_by_its_own_its_folders_or_its_runs_path(root: Path) -> None:
    path = save(root)
    for given in (path, root, root.parent):
        assert checkpoint.resolve(given) == path


@pytest.mark.parametrize("exists", [True, False])
def test_a_path_without_checkpoints_is_refused(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "elsewhere"
    if exists:
        (path / "checkpoints").mkdir(parents=True)
    message = "elsewhere: no checkpoint here; name a run directory, or a step-... directory with a"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.resolve(path)


def test_latest_that_names_a_missing_one_is_refused(root: Path) -> None:
    save(root, 1)
    shutil.rmtree(save(root, 2))
    message = (
        r"latest names 'step-00000002', which is missing or incomplete; write the name of one of "
        r"\['step-00000001'\] into it, or delete it"
    )
    with pytest.raises(CheckpointError, match=message):
        checkpoint.resolve(root)
    (root / "latest").unlink()  # the remedy
    assert checkpoint.resolve(root) == root / "step-00000001"


@pytest.mark.parametrize(
    ("content", "shown"),
    [(b"", "''"), (b"\n", "''"), (b"\xff\x00junk", r"'\ufffd\x00junk'"), (b"../x", "'../x'")],
)
def test_latest_that_holds_no_name_is_refused(root: Path, content: bytes, shown: str) -> None:
    save(root, 1)
    (root / "latest").write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        checkpoint.latest_checkpoint(root)
    assert str(error.value).startswith(f"{root}/latest holds {shown}, which is not a checkpoint's")
    assert "['step-00000001'] into it, or delete it" in str(error.value)


def test_a_kill_between_rename_and_pointer_leaves_the_older_one_in_force(root: Path) -> None:
    first = save(root, 1)
    save(root, 2, seed=1)
    (root / "latest").write_text("step-00000001\n")
    assert checkpoint.latest_checkpoint(root) == first
    again = save(root, 2, seed=2)  # the resumed run comes to the same step
    assert checkpoint.latest_checkpoint(root) == again
    assert torch.equal(Reader(again).read("b", "master", 0, 7), make_fragments(2)[2].master)
    kept = Reader(root / "superseded-step-00000002")
    assert torch.equal(kept.read("b", "master", 0, 7), make_fragments(1)[2].master)


def test_leftovers_of_killed_saves_are_ignored_and_cleaned(root: Path) -> None:
    first = save(root, 1)
    for leftover in (".step-00000002.partial", ".step-00000003.partial", ".step-00000000.deleted"):
        (root / leftover).mkdir()
        (root / leftover / STATE_FILE).write_bytes(b"half a file")
    (root / "step-00000004").mkdir()  # a copy by hand that was interrupted: no meta.json
    assert checkpoint.list_checkpoints(root) == [first]
    assert checkpoint.latest_checkpoint(root) == first

    second = save(root, 2)  # over its own leftover
    assert sorted(names(list(second.iterdir()))) == ["SHA256SUMS", "meta.json", STATE_FILE]
    checkpoint.prune(root, keep_last=2, keep_every=0)
    assert sorted(names(list(root.iterdir()))) == [
        "latest",
        "step-00000001",
        "step-00000002",
        "step-00000004",
    ]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "keep_at", "kept"),
    [
        (1, 0, (), [60]),
        (2, 0, (), [50, 60]),
        (1, 20, (), [20, 40, 60]),
        (2, 30, (), [30, 50, 60]),
        (9, 0, (), [10, 20, 30, 40, 50, 60]),
        (1, 30, (10, 20, 25), [10, 20, 30, 60]),
    ],
)
def test_prune(
    root: Path, keep_last: int, keep_every: int, keep_at: tuple[int, ...], kept: list[int]
) -> None:
    for step in range(10, 70, 10):
        save(root, step)
    checkpoint.prune(root, keep_last, keep_every, keep_at)
    assert names(checkpoint.list_checkpoints(root)) == [f"step-{step:08d}" for step in kept]
    assert checkpoint.latest_checkpoint(root) == root / "step-00000060"


def test_only_checkpoints_are_pruned(root: Path) -> None:
    """A copy by hand stays; one that was moved away, and linked to, loses the link only."""
    moved = root.parent / "moved"
    shutil.move(save(root, 1), moved)
    (root / "step-00000001").symlink_to(moved)
    shutil.copytree(save(root, 2), root / "step-best")
    assert names(checkpoint.list_checkpoints(root)) == ["step-00000001", "step-00000002"]
    dict(Reader(root / "step-00000001").parameters())
    checkpoint.prune(root, keep_last=1, keep_every=0)
    assert sorted(names(list(root.iterdir()))) == ["latest", "step-00000002", "step-best"]
    dict(Reader(moved).parameters())


def test_steps_beyond_eight_digits_come_last(root: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(root, step)
    assert names(checkpoint.list_checkpoints(root)) == ["step-99999999", "step-100000000"]
    assert checkpoint.rewind(root, root / "step-99999999") == [root / "step-100000000"]


def test_rewind_keeps_later_ones_aside(root: Path) -> None:
    paths = [save(root, step) for step in (1, 2, 3)]
    assert checkpoint.rewind(root, paths[0]) == paths[1:]
    assert checkpoint.latest_checkpoint(root) == paths[0]
    assert checkpoint.list_checkpoints(root) == [paths[0]]
    for path in paths[1:]:
        kept = root / f"superseded-{path.name}"
        assert torch.equal(Reader(kept).read("b", "master", 0, 7), make_fragments()[2].master)
    checkpoint.prune(root, keep_last=1, keep_every=0)
    assert (root / "superseded-step-00000003").is_dir()
    assert checkpoint.rewind(root, paths[0]) == []


# A save that cannot be finished


def in_the_way(root: Path) -> Iterator[Fragment]:
    (root / ".step-00000002.partial" / STATE_FILE).mkdir()
    yield from make_fragments()


def save_over(root: Path, fragments: Iterator[Fragment] | list[Fragment]) -> None:
    mesh: Mesh = single_process_mesh("cpu")
    checkpoint.save(root, meta_at(2), fragments, mesh, rng_state=torch.get_rng_state())


@pytest.mark.parametrize("what", ["the state file", "the pointer", "the directory"])
def test_a_failed_save_leaves_the_previous_one_in_force(root: Path, what: str) -> None:
    first = save(root, 1)
    message = "step-00000002: not saved, .*; the previous checkpoint remains in force: make room"
    with pytest.raises(CheckpointError, match=message):
        if what == "the state file":
            save_over(root, in_the_way(root))
        elif what == "the pointer":
            (root / ".latest.partial").mkdir()
            save_over(root, make_fragments())
        else:
            (root / "a-file").touch()
            save_over(root / "a-file" / "checkpoints", make_fragments())
    assert checkpoint.latest_checkpoint(root) == first
    dict(Reader(first).parameters())
