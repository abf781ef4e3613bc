"""`bitscale train --resume` from what another program wrote, as a command.

DeepSpeed's and megatron-core's checkpoints: tests/dist/test_resume_from_*.py.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from bitscale.cli.main import main
from bitscale.data.batches import Batches
from bitscale.data.corpus import load_corpus
from runs import events, execute, metrics, train_command

pytestmark = pytest.mark.e2e

STOP = 2


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with random weights and the shapes of `runs.CONFIG`."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=512,
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    path = tmp_path_factory.mktemp("llama") / "llama"
    LlamaForCausalLM(shape).float().save_pretrained(path, max_shard_size="50KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def test_a_hugging_face_directory_begins_a_run(
    llama: Path, config_file: Path, python_corpus: Path, tmp_path: Path
) -> None:
    options = [f"run.dir={tmp_path / 'run'}", f"train.stop_step={STOP}", "train.dtype=fp32"]
    done = execute(train_command("plain", config_file, *options, "--resume", llama))
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        f"resumed from {llama} at step 0",
        "it is a Hugging Face (llama, 16- or 32-bit weights) checkpoint",
        "it holds weights only: Adam's moments and step counts start at 0",
        f"not stated by {llama}: ",
    ):
        assert line in done.stdout, done.stdout
    (event,) = events(tmp_path / "run", "resume")
    assert event["checkpoint"] == str(llama) and len(event["notes"]) == 3
    assert "data.*" in event["notes"][2] and "model.rope_theta" not in event["notes"][2]

    first, _ = metrics(tmp_path / "run", "train")
    assert abs(first["loss"] - transformers_loss(llama, python_corpus)) < 2e-6
    assert (tmp_path / "run/checkpoints/step-00000002/meta.json").is_file()


@torch.no_grad()
def transformers_loss(llama: Path, corpus: Path) -> float:
    """Of the first step's batch, by transformers' own model."""
    batches = Batches(
        [(load_corpus(corpus).shard("train"), 1.0)],
        seq_len=32,
        global_batch_size=4,
        micro_batch_size=4,
        dp_rank=0,
        dp_size=1,
        seed=0,
        reset_attention=False,
    )
    (batch,) = batches.micro_batches(0)
    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    logits = model(batch.input_ids_BS).logits
    return float(F.cross_entropy(logits.flatten(0, 1), batch.target_ids_BS.flatten()))


def test_what_it_says_must_agree(
    llama: Path, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(config_file), f"run.dir={tmp_path}/run", "--resume", str(llama)]
    for override, message in (
        (
            "model.rope_theta=5e5",
            f"model.rope_theta is 500000.0 here and 10000.0 in {llama}; use the checkpoint's",
        ),
        (
            "model.d_ff=128",
            f"{llama}: layers.0.mlp.gate.weight has shape [64, 32] there and [128, 32] here",
        ),
    ):
        assert main([*command, override]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run/metrics.jsonl").exists()
