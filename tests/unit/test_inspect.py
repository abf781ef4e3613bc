"""`bitscale inspect`: what each kind of file is said to be; what is refused, and why."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitscale.cli.main import main
from bitscale.config import Config
from bitscale.convert import load_model, open_source
from bitscale.convert.formats import ExportOptions, export
from bitscale.convert.gguf_export import export_gguf
from bitscale.convert.inspection import inspect
from bitscale.errors import CheckpointError
from tiny_models import make_checkpoint, make_source

pytestmark = pytest.mark.unit
MakeConfig = Callable[..., Config]
Q = "layers.0.attn.q.weight"


@pytest.fixture(scope="module")
def checkpoint(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(make_config, tmp_path_factory.mktemp("inspect") / "checkpoint")


def test_checkpoint_and_exports_agree(checkpoint: Path, tmp_path: Path) -> None:
    """The same zeros and scales, whatever holds them, and each form's own bits."""
    source = open_source(checkpoint)
    options = ExportOptions(linear="autobitlinear", dtype="fp32")
    found = {"checkpoint": inspect(checkpoint)}
    for form in ("packed", "compact"):
        export(source, tmp_path / form, form)
        found[form] = inspect(tmp_path / form)
    export(source, tmp_path / "hf", "hf-bitnet", options)
    found["hf"] = inspect(tmp_path / "hf")
    export(source, tmp_path / "plain", "hf-dequantized")
    found["plain"] = inspect(tmp_path / "plain")
    codes, scale = source.ternary(Q)
    bits = {"checkpoint": 32, "packed": 2, "compact": 1.6, "hf": 2, "plain": 32}
    for form, description in found.items():
        names = (Q, "model.layers.0.self_attn.q_proj.weight")
        tensor = next(t for t in description.tensors if t.name in names)
        assert tensor.values == "ternary", form
        assert tensor.zeros == pytest.approx(float((codes == 0).float().mean()))
        assert tensor.scale == pytest.approx(float(scale), rel=4e-3)
        assert tensor.shape == tuple(codes.shape)
        assert 8 * tensor.num_bytes / tensor.num_weights == pytest.approx(bits[form], rel=0.1)
    assert found["checkpoint"].kind == "bitscale checkpoint"
    assert found["compact"].kind == "bitscale compact export"
    assert found["hf"].facts["architecture"] == "LlamaForCausalLM"
    assert found["packed"].certificate is not None
    digest = found["packed"].certificate["codes_sha256"]
    assert found["compact"].certificate is not None
    assert found["compact"].certificate["codes_sha256"] == digest


def test_compact_loads_back(checkpoint: Path, tmp_path: Path) -> None:
    """The forward pass of the packed form, at 1.6 bits a weight in memory too."""
    source = open_source(checkpoint)
    for form in ("packed", "compact"):
        export(source, tmp_path / form, form)
    ids = torch.arange(40)[None] % 96
    packed, compact = (load_model(tmp_path / form).model for form in ("packed", "compact"))
    assert torch.equal(packed.logits(ids), compact.logits(ids))
    assert main(["verify", str(checkpoint), str(tmp_path / "compact"), "--tokens", "64"]) == 0


def test_gguf(make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = make_config("data.seq_len=64", "model={d_model: 256, d_ff: 256, num_layers: 2}")
    source, out = make_source(cfg, num_steps=0), tmp_path / "a.gguf"
    export_gguf(source, out, "tq1_0", with_tokenizer=False)
    assert main(["inspect", str(out), "--json", str(tmp_path / "a.json")]) == 0
    shown = capsys.readouterr().out
    assert "a.gguf: GGUF file\n" in shown
    assert "certificate: gguf-tq1_0 of step 0, b158 (trained), codes sha256 " in shown
    row = next(line.split() for line in shown.splitlines() if "blk.*.ffn_up.weight" in line)
    assert row[:6] == ["2", "blk.*.ffn_up.weight", "TQ1_0", "256x256", "1.69", "ternary"]
    tree = json.loads((tmp_path / "a.json").read_text())
    assert tree["metadata"]["llama.embedding_length"] == 256
    assert len([t for t in tree["tensors"] if t["stored"] == "TQ1_0"]) == 14
    assert main(["inspect", str(out), "--headers", "--tensors"]) == 0
    shown = capsys.readouterr().out
    assert "blk.1.ffn_up.weight" in shown
    assert "ternary" not in shown


def test_tensors_in_other_files(tmp_path: Path, corpus: Path) -> None:
    weights = {"w": torch.tensor([[0.5, 0.0], [-0.5, 0.5]]), "n": torch.tensor([1.0, torch.nan])}
    save_file(weights, tmp_path / "a.safetensors")
    torch.save({"model": weights, "step": 3}, tmp_path / "a.pt")
    for name, prefix in (("a.safetensors", ""), ("a.pt", "model.")):
        found = {t.name: t for t in inspect(tmp_path / name).tensors}
        w = found[f"{prefix}w"]
        assert (w.stored, w.values, w.zeros, w.scale) == ("F32", "ternary", 0.25, 0.5)
        assert found[f"{prefix}n"].values == "NaN or infinity"
    shard = inspect(corpus / "valid.bin")
    assert shard.kind == "Megatron token shard"
    assert 0 < shard.facts["largest_id"] < 300


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this ran",)


def pickle_with_code(folder: Path) -> Path:
    (folder / "a.pt").write_bytes(pickle.dumps({"w": Evil()}))
    return folder / "a.pt"


def torch_file_with_code(folder: Path) -> Path:
    torch.save({"w": torch.zeros(2), "x": Evil()}, folder / "a.bin")
    return folder / "a.bin"


def text(folder: Path) -> Path:
    (folder / "notes.txt").write_text("not a model")
    return folder / "notes.txt"


def truncated(folder: Path) -> Path:
    save_file({"w": torch.zeros(100)}, folder / "whole.safetensors")
    content = (folder / "whole.safetensors").read_bytes()
    (folder / "a.safetensors").write_bytes(content[:-40])
    return folder / "a.safetensors"


def long_header(folder: Path) -> Path:
    (folder / "a.safetensors").write_bytes(b"\xff" * 7 + b"\x00" + b"{}")
    return folder / "a.safetensors"


def empty_directory(folder: Path) -> Path:
    return folder


def config_alone(folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    return folder


def no_tensor(folder: Path) -> Path:
    torch.save({"step": 3}, folder / "a.pt")
    return folder / "a.pt"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pickle_with_code, "not a file of plain tensors (Unsupported "),
        (
            torch_file_with_code,
            "a pickle may run code, so nothing else in one is read: name a",
        ),
        (text, "not a file of plain tensors ("),
        (truncated, "a.safetensors: truncated or not a safetensors file ("),
        (long_header, "bytes and the file ends before); copy it again"),
        (empty_directory, "cannot be inspected; name a bitscale run, checkpoint or export"),
        (config_alone, "config.json, but no *.safetensors or *.bin with weights"),
        (no_tensor, "a PyTorch file without any tensor"),
        (lambda folder: folder / "nowhere", "nowhere does not exist; name a bitscale run"),
    ],
)
def test_refused(
    make: Callable[[Path], Path], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path)
    with pytest.raises(CheckpointError) as refused:
        inspect(path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "this ran" not in capsys.readouterr().out
    assert main(["inspect", str(path)]) == 2
