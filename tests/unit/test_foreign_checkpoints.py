"""Foreign checkpoints by names, shapes and pickles; those that the real libraries wrote are in
tests/dist/test_resume_from_*.py."""

import argparse
import io
import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from bitscale import run
from bitscale.checkpoint import Reader
from bitscale.config import Config
from bitscale.convert.model_source import parameter_shapes
from bitscale.convert.names import to_huggingface
from bitscale.errors import CheckpointError
from bitscale.sources import ForeignSource, Tensors, locate, open_state
from bitscale.sources.pickles import Inert, load_metadata, load_tensors, plain
from bitscale.sources.to_checkpoint import import_state

pytestmark = pytest.mark.unit

MakeConfig = Callable[..., Config]
WHERE = Path("elsewhere/global_step8")
VOCAB = "model.vocab_size=64"


class Payload:
    """Pickled, a call of os.system; the plainest of attacks."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


# --- Pickles ---


def test_tensors_and_plain_values_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    torch.save({"a": torch.arange(3), "b": [1, "x", None, torch.float32]}, file)
    found = load_tensors(file, file)
    assert torch.equal(found["a"], torch.arange(3)) and found["b"] == [1, "x", None, torch.float32]
    assert torch.equal(load_tensors(io.BytesIO(file.read_bytes()), file)["a"], torch.arange(3))


def test_a_file_of_torch_save_with_code_is_refused(tmp_path: Path) -> None:
    file, marker = tmp_path / "evil.pt", tmp_path / "marker"
    torch.save({"a": torch.zeros(2), "b": Payload(marker)}, file)
    with pytest.raises(CheckpointError) as error:
        load_tensors(file, file, ("argparse.Namespace",))
    assert str(error.value) == (
        f"{file}: refused, its pickle names posix.system, which is code, not a tensor; nothing of "
        "it was run: save plain tensors, numbers and text only"
    )
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()  # it was live


def test_an_index_with_code_is_refused(tmp_path: Path) -> None:
    file, marker = tmp_path / ".metadata", tmp_path / "marker"
    file.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(CheckpointError, match=r"names posix\.system, which is code, not a tensor"):
        load_metadata(file)
    assert not marker.exists()
    pickle.loads(file.read_bytes())
    assert marker.exists()


class Harmless:
    """Pickled, a call of `touch` below."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return touch, (str(self.marker),)


def touch(marker: str) -> None:
    Path(marker).touch()


def test_harmless_classes_are_recorded_and_never_called(tmp_path: Path) -> None:
    file, marker = tmp_path / "a.pt", tmp_path / "marker"
    torch.save({"args": argparse.Namespace(n=3), "call": Harmless(marker)}, file)
    found = load_tensors(file, file, ("argparse.Namespace", f"{__name__}.touch"))
    assert isinstance(found["args"], Inert) and found["args"].get("n") == 3
    assert found["args"].get("m", "none") == "none"
    assert plain(found["call"]) == str(marker)
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()


def test_torch_refuses_system_calls_even_if_they_are_declared_harmless(tmp_path: Path) -> None:
    file, marker = tmp_path / "a.pt", tmp_path / "marker"
    torch.save(Payload(marker), file)
    with pytest.raises(CheckpointError, match=r"holds more than tensors \(.*posix.*blocked"):
        load_tensors(file, file, ("posix.system",))
    assert not marker.exists()


def test_what_other_libraries_declare_safe_is_not_taken_for_safe(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    torch.save(argparse.Namespace(n=3), file)
    with torch.serialization.safe_globals([argparse.Namespace]):
        with pytest.raises(CheckpointError, match=r"names argparse\.Namespace"):
            load_tensors(file, file)
        # and theirs is as it was
        assert torch.load(file, weights_only=True).n == 3


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"a": 1})])
def test_files_that_are_none_are_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.pt"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt: not a readable torch\.save file"):
        load_tensors(file, file)
    with pytest.raises(
        CheckpointError, match=r"a\.pt: (not the index of|holds dict, not an index)"
    ):
        load_metadata(file)


# --- Names and shapes ---


def tensors_of(
    cfg: Config, rename: Callable[[str], str] = str, **changes: Any
) -> tuple[Tensors, dict[str, Tensor]]:
    """A source of random masters and moments, and its masters."""
    generator = torch.Generator().manual_seed(0)
    masters = {
        rename(name): torch.randn(shape, generator=generator)
        for name, shape in parameter_shapes(cfg.model, cfg.quant).items()
    }
    for name, tensor in changes.pop("extra", {}).items():
        masters[name] = tensor

    def read(name: str, kind: str) -> Tensor:
        return masters[name] * {"master": 1, "exp_avg": 2, "exp_avg_sq": 3}[kind]

    fields = {
        "path": WHERE,
        "format": "test",
        "shapes": {name: tuple(tensor.shape) for name, tensor in masters.items()},
        "read": read,
        "step": 8,
        "adam_steps": dict.fromkeys(masters, 7),
        "stated": {},
    }
    return Tensors(**(fields | changes)), masters


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_hugging_face_names_behind_any_wrapper(make_config: MakeConfig, prefix: str) -> None:
    cfg = make_config(VOCAB, "model.qk_norm=true", "model.tie_embeddings=false")
    tensors, masters = tensors_of(cfg, lambda name: prefix + to_huggingface(name))
    source = ForeignSource(tensors, cfg)
    name = "layers.1.attn.q_norm.weight"
    want = masters[prefix + to_huggingface(name)]
    assert torch.equal(source.read(name, "master", 0, want.numel()), want.flatten())
    assert torch.equal(source.read(name, "exp_avg_sq", 3, 2), 3 * want.flatten()[3:5])
    assert source.meta.adam_steps[name] == 7 and source.has_optimizer_state
    assert source.meta.shapes.keys() == parameter_shapes(cfg.model, cfg.quant).keys()


def test_a_tied_head_that_is_stored_twice_must_be_the_same(make_config: MakeConfig) -> None:
    cfg = make_config(VOCAB)
    _, masters = tensors_of(cfg, to_huggingface)
    same = masters["model.embed_tokens.weight"].clone()
    ForeignSource(tensors_of(cfg, to_huggingface, extra={"lm_head.weight": same})[0], cfg)
    other = {"lm_head.weight": same + 1}
    with pytest.raises(CheckpointError) as error:
        ForeignSource(tensors_of(cfg, to_huggingface, extra=other)[0], cfg)
    assert str(error.value) == (
        f"{WHERE}: lm_head.weight differs from model.embed_tokens.weight, but "
        "model.tie_embeddings=true makes them one; set model.tie_embeddings=false"
    )


def test_learned_scales_may_be_missing(make_config: MakeConfig) -> None:
    cfg = make_config(VOCAB)
    learned = make_config(VOCAB, "quant.preset=paretoq")
    assert any(name.endswith(".alpha") for name in parameter_shapes(learned.model, learned.quant))
    source = ForeignSource(tensors_of(cfg)[0], learned)
    assert not any(name.endswith(".alpha") for name in source.meta.shapes)


def test_weights_alone_begin_with_new_moments(make_config: MakeConfig) -> None:
    cfg = make_config(VOCAB)
    source = ForeignSource(tensors_of(cfg, adam_steps={}, step=0)[0], cfg)
    assert not source.has_optimizer_state
    assert not source.read("norm.weight", "exp_avg", 0, 32).any()
    assert set(source.meta.adam_steps.values()) == {0}


def test_a_moment_of_another_shape_is_damage(make_config: MakeConfig) -> None:
    cfg = make_config(VOCAB)
    tensors, masters = tensors_of(cfg)
    broken = Tensors(**(vars(tensors) | {"read": lambda name, kind: masters[name][:-1]}))
    with pytest.raises(CheckpointError, match=r"norm\.weight \(exp_avg\) has shape \[31\] instead"):
        ForeignSource(broken, cfg).read("norm.weight", "exp_avg", 0, 32)


# --- What is compared ---

OURS = {"model.norm_eps": "1e-05", "data.seq_len": "16", "data.seed": "0", "tokenizer": "abc"}


def compared(cfg: Config, stated: dict[str, str], *allowed: str, **changes: Any) -> run.Comparison:
    source = ForeignSource(tensors_of(cfg, stated=stated, **changes)[0], cfg)
    return run.compare(cfg, OURS, source, allowed)


def test_what_is_not_stated_is_listed_and_needs_no_leave(make_config: MakeConfig) -> None:
    found = compared(make_config(VOCAB), {"data.seq_len": "16", "data.position": "64 sequences"})
    assert found.differences == []
    assert found.notes == [
        "it is a test checkpoint",
        f"not stated by {WHERE}: model.norm_eps, data.seed, tokenizer",
    ]
    nothing = compared(make_config(VOCAB), {}, adam_steps={})
    assert nothing.notes[1:] == [
        "it holds weights only: Adam's moments and step counts start at 0",
        f"not stated by {WHERE}: model.norm_eps, data.*, tokenizer",
    ]


@pytest.mark.parametrize(
    ("stated", "key", "text"),
    [
        ({"data.seq_len": "32"}, "data.seq_len", "data.seq_len is 16 here and 32 in"),
        (
            {"model.rope_scaling": '{"x": 1}'},
            "model",
            'model.rope_scaling is null here and {"x": 1} in',
        ),
        (
            {"data.position": "60 sequences"},
            "data.position",
            "data.position is 64 sequences here and 60 sequences in",
        ),
    ],
)
def test_what_is_stated_must_agree_or_be_allowed(
    make_config: MakeConfig, stated: dict[str, str], key: str, text: str
) -> None:
    with pytest.raises(CheckpointError) as error:
        compared(make_config(VOCAB), stated)
    assert str(error.value).startswith(f"{text} ") and "--allow-change" in str(error.value)
    assert [d.startswith(text) for d in compared(make_config(VOCAB), stated, key).differences] == [
        True
    ]


def test_a_transition_before_the_checkpoint_is_refused(make_config: MakeConfig) -> None:
    early = make_config(VOCAB, "transition.at={step: 5}")
    with pytest.raises(CheckpointError) as error:
        compared(early, {})
    assert str(error.value) == (
        f"transition.at is step 5 here and step 8 or later in {WHERE}; use the checkpoint's, or "
        "pass --allow-change transition.at to go on"
    )
    assert len(compared(early, {}, "transition.at").differences) == 1
    assert compared(make_config(VOCAB, "transition.at={step: 8}"), {}).differences == []


def test_another_optimizer_is_named_unless_there_is_no_state(make_config: MakeConfig) -> None:
    lion = make_config(VOCAB, "optim.name=lion")
    with pytest.raises(CheckpointError, match=r'^optim\.name is "lion" here and "adamw" in'):
        compared(lion, {})
    assert compared(lion, {}, adam_steps={}).differences == []


# --- torch's distributed checkpoints ---


def megatron_directory(folder: Path, common: dict[str, Any], **tensors: Tensor) -> Path:
    """A torch_dist directory, by torch's own writer."""
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    torch.save(common, folder / "common.pt")
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backend))
    return folder


def megatron_refusal(folder: Path, cfg: Config) -> str:
    with pytest.raises(CheckpointError) as error:
        open_state(locate(folder), cfg)
    return str(error.value)


NORM = "decoder.final_layernorm.weight"


def test_megatron_checkpoints_that_tell_too_little(make_config: MakeConfig, tmp_path: Path) -> None:
    cfg, norm = make_config(VOCAB), {NORM: torch.ones(32)}
    done = {"iteration": 3}
    bucket = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_x.bucket_idx_0.exp_avg"
    path = megatron_directory(tmp_path / "a", done, **norm, **{bucket: torch.ones(3)})
    assert megatron_refusal(path, cfg) == (
        f"{path}: its optimizer state is saved by buckets ({bucket}), which do not tell "
        "parameters apart; save it once with --dist-ckpt-optim-fully-reshardable"
    )
    moment = {f"optimizer.state.exp_avg.{NORM}": torch.ones(32)}
    path = megatron_directory(tmp_path / "b", done, **norm, **moment)
    assert "does not say how many steps Adam has done" in megatron_refusal(path, cfg)
    path = megatron_directory(tmp_path / "c", {}, **norm)
    assert "does not say its iteration" in megatron_refusal(path, cfg)
    path = megatron_directory(tmp_path / "d", done, **norm)
    assert "missing embedding.word_embeddings.weight" not in megatron_refusal(path, cfg)
    (path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "saved as 'zarr'; save with --ckpt-format torch_dist" in megatron_refusal(path, cfg)
    (path / "metadata.json").unlink()
    assert "only distributed checkpoints that Megatron-core wrote" in megatron_refusal(path, cfg)


def test_a_model_that_the_decoder_does_not_compute(make_config: MakeConfig, tmp_path: Path) -> None:
    arguments = argparse.Namespace(position_embedding_type="rope", rotary_percent=0.5)
    common = {"iteration": 3, "args": arguments}
    path = megatron_directory(tmp_path / "a", common, **{NORM: torch.ones(32)})
    assert megatron_refusal(path, make_config(VOCAB)) == (
        f"{path}: trained with rotary_percent=0.5, which this decoder does not compute (it has "
        "1.0); no setting of model changes that"
    )


@pytest.mark.parametrize(
    "argument", [{"rotary_seq_len_interpolation_factor": 4}, {"no_rope_freq": 4}]
)
def test_other_rotations_are_refused(
    argument: dict[str, int], make_config: MakeConfig, tmp_path: Path
) -> None:
    norm = {NORM: torch.ones(32)}
    common = {"iteration": 3, "args": argparse.Namespace(**argument)}
    path = megatron_directory(tmp_path / "a", common, **norm)
    assert f"trained with {next(iter(argument))}=4, which" in megatron_refusal(path, make_config())


def test_a_megatron_checkpoint_states_its_activation(tmp_path: Path) -> None:
    """The weights of SwiGLU and of a gated squared ReLU have the same shapes."""
    from bitscale.sources.megatron import open_megatron

    embedding = {"embedding.word_embeddings.weight": torch.ones(8, 4)}
    for arguments, mlp in (
        ({"swiglu": True}, '"swiglu"'),
        ({"squared_relu": True, "swiglu": False, "gated_linear_unit": True}, '"relu2_glu"'),
        ({"squared_relu": True, "swiglu": False}, None),
    ):
        common = {"iteration": 3, "args": argparse.Namespace(**arguments)}
        path = megatron_directory(tmp_path / str(mlp).strip('"'), common, **embedding)
        assert open_megatron(path).stated.get("model.mlp") == mlp


def test_files_of_zero_without_what_deepspeed_puts_there(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    torch.save({"other": 1}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save({"other": 1}, tmp_path / "mp_rank_00_model_states.pt")
    message = megatron_refusal(tmp_path, make_config())
    assert "not laid out as DeepSpeed 0.19 saves ZeRO checkpoints (KeyError(" in message


def test_damaged_chunks_are_named(tmp_path: Path) -> None:
    from bitscale.sources.torch_dist import TorchDist

    path = megatron_directory(tmp_path / "a", {}, **{NORM: torch.arange(32.0)})
    assert torch.equal(TorchDist(path).read(NORM), torch.arange(32.0))
    (file,) = path.glob("*.distcp")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"too few for what \.metadata says is in it"):
        TorchDist(path).read(NORM)
    file.write_bytes(b"\0" * len(whole))
    with pytest.raises(CheckpointError, match=r"not a readable torch\.save file"):
        TorchDist(path).read(NORM)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"distcp: missing; use a complete checkpoint"):
        TorchDist(path).read(NORM)


# --- Where a path leads ---


def test_pointers_of_other_programs_are_followed(tmp_path: Path) -> None:
    for pointer, content, name in (
        ("latest", "global_step3", "global_step3"),
        ("latest_checkpointed_iteration.txt", "12\n", "iter_0000012"),
    ):
        root = tmp_path / pointer
        found = megatron_directory(root / name, {})
        (root / pointer).write_text(content)
        assert locate(root) == found
        (root / "config.json").write_text('{"model_type": "llama"}')  # weights beside it
        assert locate(root) == found
    with pytest.raises(CheckpointError, match=r"no checkpoint here; name a run directory"):
        locate(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert locate(tmp_path) == tmp_path


def test_a_killed_run_finds_what_it_began_from(make_config: MakeConfig, tmp_path: Path) -> None:
    """Before it has saved: the first line of its metrics says it."""
    trunk = megatron_directory(tmp_path / "iter_0000003", {})
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    cfg = make_config(f"run.dir={run_dir}")
    line = {"kind": "event", "event": "resume", "step": 3, "checkpoint": str(trunk)}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert run.find_resume(cfg, "auto") == trunk
    assert run.find_resume(cfg, str(trunk)) == trunk


# --- As a checkpoint of ours ---


def test_an_imported_state_is_the_source_to_the_bit(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    cfg = make_config(VOCAB)
    source = ForeignSource(tensors_of(cfg, to_huggingface)[0], cfg)
    import_state(source, cfg, tmp_path / "out", OURS, {"torch": "x"})
    reader = Reader(locate(tmp_path / "out"))
    assert reader.meta.step == 8 and reader.meta.tokens == 8 * 8 * 16
    assert reader.meta.identity == OURS
    assert reader.meta.adam_steps == source.meta.adam_steps
    for name, shape in parameter_shapes(cfg.model, cfg.quant).items():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            want = source.read(name, kind, 0, math.prod(shape))
            assert want.any() and torch.equal(reader.read(name, kind, 0, want.numel()), want)
    with pytest.raises(CheckpointError, match=r"out already exists"):
        import_state(source, cfg, tmp_path / "out", OURS, {})
