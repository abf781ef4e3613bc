"""Megatron-core's and DeepSpeed's checkpoints as models: exported, imported, verified, inspected.

Real checkpoints of both libraries are read in tests/dist/; here a `torch_dist` directory is ours,
and a universal one is written file by file.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bitscale.cli.main import main
from bitscale.config import Config
from bitscale.convert import open_source
from bitscale.convert.formats import ExportOptions, export
from bitscale.convert.model_source import ModelSource
from bitscale.convert.verify import verify
from bitscale.errors import CheckpointError
from bitscale.quant.schedule import SIXTEEN_BIT, TERNARY
from bitscale.sources.as_model import open_model
from bitscale.sources.inspection import inspect
from tiny_models import MODELS, VOCAB_SIZE, make_checkpoint

pytestmark = pytest.mark.unit
MakeConfig = Callable[..., Config]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(make_config, tmp_path_factory.mktemp("models") / "checkpoint")


@pytest.fixture(scope="module")
def megatron(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("megatron") / "out"
    export(open_source(checkpoint), out, "megatron", ExportOptions(dtype="fp32"))
    return out


def assert_same(found: ModelSource, source: ModelSource) -> None:
    assert found.shapes == source.shapes
    for name in source.shapes:
        assert torch.equal(found.latent(name), source.latent(name)), name


@pytest.mark.parametrize("name", ["untied", "qk_norm", "bias", "qkv_bias"])
def test_round_trip_of_masters(name: str, make_config: MakeConfig, tmp_path: Path) -> None:
    override = MODELS[name].replace(", rope_scaling: {type: linear, factor: 2.0}", "")
    checkpoint = make_checkpoint(make_config, tmp_path / "c", override, num_steps=3)
    source = open_source(checkpoint)
    export(source, tmp_path / "m", "megatron", ExportOptions(dtype="fp32"))
    found = open_model(tmp_path / "m")
    assert (found.model, found.quant, found.strength) == (source.model, source.quant, TERNARY)
    assert_same(found, source)
    # Without the certificate Megatron-LM's arguments describe the model.
    (tmp_path / "m" / "release" / "bitscale.json").unlink()
    described = open_model(tmp_path / "m")
    assert described.strength == SIXTEEN_BIT and described.seq_len == source.seq_len
    kv_heads = source.model.num_kv_heads or source.model.num_heads
    shape = {"num_kv_heads": None if kv_heads == source.model.num_heads else kv_heads}
    assert described.model == source.model.model_copy(update=shape)
    assert_same(described, source)


def test_commands(checkpoint: Path, megatron: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["import", str(megatron), str(tmp_path / "back")]) == 0
    assert "weights without an optimizer, 2 layers of 32" in capsys.readouterr().out
    assert_same(open_source(tmp_path / "back"), open_source(checkpoint))
    digests = []
    for number, model in enumerate((checkpoint, megatron, tmp_path / "back")):
        assert main(["export", str(model), str(tmp_path / f"packed{number}")]) == 0
        digests.append((tmp_path / f"packed{number}" / "model.safetensors").read_bytes())
    assert digests[0] == digests[1] == digests[2]
    capsys.readouterr()
    assert main(["verify", str(checkpoint), str(megatron), "--tokens", "64"]) == 0
    out = capsys.readouterr().out
    assert "codes: 0 of 18,432 differ" in out and "largest difference 0.00e+00" in out
    assert main(["inspect", str(megatron)]) == 0
    out = capsys.readouterr().out
    assert "release: Megatron-core torch_dist checkpoint" in out
    assert "certificate: megatron of step 0, b158 (trained)" in out
    linear = "decoder.layers.*.mlp.linear_fc1.weight"
    row = next(line for line in out.splitlines() if linear in line)
    assert row.split()[:4] == ["2", linear, "F32", "128x32"]


def test_a_changed_weight_is_found(checkpoint: Path, megatron: Path, tmp_path: Path) -> None:
    """A row of a chunk set to 0: `verify` counts its codes."""
    changed = tmp_path / "m"
    shutil.copytree(megatron, changed)
    source = open_source(checkpoint)
    file = changed / "release" / "__0_0.distcp"
    needle = source.latent("layers.1.mlp.down.weight")[5].numpy().tobytes()
    content = file.read_bytes()
    assert content.count(needle) == 1
    file.write_bytes(content.replace(needle, bytes(len(needle))))
    checks = {c.name: c.passed for c in verify(source, open_model(changed), num_tokens=64)}
    assert not checks["codes"] and checks["architecture"]


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        open_model(path, **options)
    return str(error.value)


def test_arguments_that_say_too_little_or_something_else(megatron: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(megatron, path)
    (path / "release" / "bitscale.json").unlink()
    file = path / "release" / "common.pt"
    common = torch.load(file, weights_only=False)
    given = vars(common["args"])

    def with_arguments(**changes: object) -> str:
        arguments = argparse.Namespace(**{**given, **changes})
        torch.save({**common, "args": arguments}, file)
        return refusal(path)

    assert with_arguments(hidden_size=None) == (
        f"{path}/release (Megatron-core torch_dist) does not describe its model; name the "
        "configuration of a run with its model section: --config FILE"
    )
    assert "trained with GELU (neither swiglu nor squared_relu)" in with_arguments(swiglu=False)
    assert with_arguments(seq_length=None) == (
        f"{path}/release names no length of a sequence; pass --seq-len N"
    )
    message = with_arguments(num_attention_heads=8, group_query_attention=False)
    assert "self_attention.linear_qkv.weight has shape [64, 32] there and [96, 32] here" in message


# --- DeepSpeed universal ---


def write_universal(folder: Path, source: ModelSource, client_state: dict[str, Any]) -> Path:
    """As ds_to_universal.py writes it, with the masters of `source`."""
    for name in source.shapes:
        (folder / "zero" / name).mkdir(parents=True)
        tensors = {"fp32": source.latent(name)}
        tensors |= dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros_like(tensors["fp32"]))
        for kind, tensor in tensors.items():
            torch.save({"param": tensor}, folder / "zero" / name / f"{kind}.pt")
        torch.save(torch.tensor(5.0), folder / "zero" / name / "step.pt")
    model = {
        "param_shapes": [{name: torch.Size(shape) for name, shape in source.shapes.items()}],
        "global_steps": 5,
        "ds_version": "0.19.8",
        "ds_config": {"bf16": {"enabled": source.dtype == "bf16"}},
        **client_state,
    }
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    return folder


def test_universal(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    source = open_source(checkpoint)
    path = write_universal(tmp_path / "u", source, {})
    assert main(["export", str(path), str(tmp_path / "hf"), "--format", "hf"]) == 2
    assert capsys.readouterr().err == (
        f"error: {path} (DeepSpeed universal) does not describe its model; name the configuration "
        "of a run with its model section: --config FILE\n"
    )
    assert not (tmp_path / "hf").exists()
    model = {key: json.dumps(value) for key, value in source.model.model_dump().items()}
    identity = {f"model.{key}": value for key, value in model.items()}
    path = write_universal(tmp_path / "described", source, {"identity": identity, "seq_length": 64})
    found = open_model(path)
    assert (found.model, found.step, found.kind) == (source.model, 5, "deepspeed")
    assert_same(found, source)
    assert main(["export", str(path), str(tmp_path / "hf"), "--format", "hf"]) == 0
    assert_same(open_source(tmp_path / "hf"), source)
    description = inspect(path)
    assert description.kind == "DeepSpeed universal checkpoint"
    assert description.facts["optimizer_state"].startswith("AdamW, two moments")
    stored = {tensor.name: tensor.stored for tensor in description.tensors}
    assert stored == dict.fromkeys(source.shapes, "F32 master")
    assert source.model.vocab_size == VOCAB_SIZE


def test_a_vocabulary_that_nothing_tells(
    checkpoint: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    source = open_source(checkpoint)
    others = {name: shape for name, shape in source.shapes.items() if name != "embed.weight"}
    path = write_universal(tmp_path / "u", replace(source, shapes=others), {})
    with pytest.raises(CheckpointError, match=r"has no embedding by any known name \(embed"):
        open_model(path, make_config())
