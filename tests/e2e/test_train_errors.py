"""Every mistake around a run: what the user reads, and the exit code.

All but the last test end before torch.distributed starts, and so run in this process.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from bitscale.checkpoint import Reader, latest_checkpoint
from bitscale.cli.main import main
from runs import (
    KEEP_ALL,
    NUM_STEPS,
    checkpoint_dirs,
    execute,
    metrics,
    prepare_corpus,
    python_text,
    train_command,
)

pytestmark = pytest.mark.e2e

Capture = pytest.CaptureFixture[str]
SHARD = "state-00000-of-00001.safetensors"


@pytest.fixture
def copied_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def refused(capsys: Capture, *arguments: object) -> str:
    """What the command says on stderr, after checking exit code 2 and a single error line."""
    capsys.readouterr()
    code = main(list(map(str, arguments)))
    error = capsys.readouterr().err
    assert code == 2, error
    assert re.fullmatch(r"error: [^\n]+\n", error), error
    return error


def test_run_directory_in_use(config_file: Path, finished_run: Path, capsys: Capture) -> None:
    error = refused(capsys, "train", config_file, f"run.dir={finished_run}")
    assert f"run.dir='{finished_run}' already holds a run; continue it with --resume auto" in error


def test_resume_from_nothing(config_file: Path, tmp_path: Path, capsys: Capture) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        error = refused(capsys, "train", config_file, f"run.dir={tmp_path}", "--resume", path)
        assert f"{path}: no checkpoint here; name a run directory, or a step-..." in error


@pytest.mark.parametrize(
    ("override", "key", "ours", "theirs"),
    [
        ("model.d_ff=96", "model.d_ff", "96", "64"),
        ("model.qk_norm=true", "model.qk_norm", "true", "false"),
        ("quant.weight_scale=absmedian", "quant.weight_scale", '"absmedian"', "unset"),
        ("data.seed=1", "data.seed", "1", "0"),
        ("data.seq_len=16", "data.seq_len", "16", "32"),
        ("data.reset_attention=true", "data.reset_attention", "true", "false"),
        ("train.global_batch_size=8", "train.global_batch_size", "8", "4"),
    ],
)
def test_resume_with_another_model_or_data(
    override: str,
    key: str,
    ours: str,
    theirs: str,
    config_file: Path,
    finished_run: Path,
    capsys: Capture,
) -> None:
    """test_finished_run.py shows that --allow-change lets it through."""
    resume = (f"run.dir={finished_run}", "--resume", "auto", "--allow-change", "train.steps")
    error = refused(capsys, "train", config_file, override, *resume)
    checkpoint = checkpoint_dirs(finished_run)[-1]
    assert error == (
        f"error: {key} is {ours} here and {theirs} in {checkpoint}; use the checkpoint's, or pass "
        f"--allow-change {key} to go on\n"
    )


def test_resume_on_another_corpus(
    config_file: Path, python_corpus: Path, finished_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Other text under the same tokenizer; then another tokenizer too."""
    resume = (f"run.dir={finished_run}", "--resume", "auto")
    other = tmp_path / "other"
    text = tmp_path / "other.txt"
    text.write_text(python_text()[:40_000], encoding="utf-8")
    tokenizer = next(python_corpus.glob("tokenizer.*"))
    options = f"--out {other} --tokenizer {tokenizer} --section-bytes 1024 --workers 1"
    assert main(["prepare", str(text), *options.split(), "--split", "0.8,0.2,0"]) == 0
    error = refused(capsys, "train", config_file, f"data.corpora=[{{path: {other}}}]", *resume)
    assert "data.corpora is " in error and "--allow-change data.corpora to go on" in error

    foreign = prepare_corpus(python_text()[:100_000], tmp_path / "foreign", vocab_size=400)
    corpora = f"data.corpora=[{{path: {foreign}}}]"
    error = refused(capsys, "train", config_file, corpora, *resume)
    assert "data.corpora is " in error
    allowed = ("--allow-change", "data", "--allow-change", "model")
    error = refused(capsys, "train", config_file, corpora, *resume, *allowed)
    assert error.startswith("error: tokenizer is ") and "--allow-change tokenizer" in error
    both = f"data.corpora=[{{path: {python_corpus}}}, {{path: {foreign}}}]"
    error = refused(capsys, "train", config_file, both, f"run.dir={tmp_path / 'new'}")
    assert f"{foreign} and {python_corpus} were prepared with different tokenizers" in error

    for model in (finished_run, checkpoint_dirs(finished_run)[-1]):
        error = refused(capsys, "eval", model, "--corpus", foreign)
        assert f"{foreign} was prepared with another tokenizer than the model's" in error
        assert "(--tokenizer PATH)" in error


def test_corpus_missing_or_damaged(
    config_file: Path, python_corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    new = f"run.dir={tmp_path / 'new'}"
    missing = tmp_path / "missing"
    error = refused(capsys, "train", config_file, new, f"data.corpora=[{{path: {missing}}}]")
    assert str(missing) in error and "bitscale prepare" in error
    damaged = tmp_path / "damaged"
    shutil.copytree(python_corpus, damaged)
    with (damaged / "train.bin").open("ab") as file:
        file.write(b"\0\0")
    error = refused(capsys, "train", config_file, new, f"data.corpora=[{{path: {damaged}}}]")
    size = (damaged / "train.bin").stat().st_size
    assert f"{damaged}/train.bin has {size} bytes, the manifest says {size - 2}" in error
    assert not (tmp_path / "new").exists()


def test_vocabulary_too_small(config_file: Path, tmp_path: Path, capsys: Capture) -> None:
    new = f"run.dir={tmp_path / 'new'}"
    error = refused(capsys, "train", config_file, new, "model.vocab_size=511")
    assert "model.vocab_size=511 is smaller than the tokenizer's 512; set it to null" in error


def test_damaged_checkpoint(config_file: Path, copied_run: Path, capsys: Capture) -> None:
    """In this order, each before the mend of the last: latest, meta.json, shard."""
    resume = ("train", config_file, f"run.dir={copied_run}", "--resume", "auto")
    checkpoint = checkpoint_dirs(copied_run)[-1]
    shard, meta = checkpoint / SHARD, checkpoint / "meta.json"

    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    error = refused(capsys, *resume)
    assert f"{shard}: checksum differs from meta.json; damaged or foreign" in error
    assert refused(capsys, "eval", copied_run) == error
    assert refused(capsys, "export", copied_run, copied_run / "packed") == error
    shard.write_bytes(content[:-1])
    error = refused(capsys, *resume)
    assert f"{shard}: {len(content) - 1} bytes instead of {len(content)}; truncated" in error
    shard.unlink()
    assert f"{shard}: missing, though meta.json lists it" in refused(capsys, *resume)

    meta.write_text(meta.read_text()[:100])
    assert f"{meta}: damaged (" in refused(capsys, *resume)
    meta.write_text(json.dumps({"format": "bitscale-checkpoint-9"}))
    assert "format 'bitscale-checkpoint-9', this version reads" in refused(capsys, *resume)
    meta.unlink()
    error = refused(capsys, *resume)
    assert (
        "latest names 'step-00000040', which is missing or incomplete; write the name of" in error
    )
    assert "'step-00000035'" in error


def test_export_refusals(finished_run: Path, tmp_path: Path, capsys: Capture) -> None:
    checkpoints, out = finished_run / "checkpoints", tmp_path / "packed"
    sixteen_bit, ramp = checkpoints / "step-00000010", checkpoints / "step-00000020"
    error = refused(capsys, "export", sixteen_bit, out)
    assert f"{sixteen_bit} is at λ = 0, not 1: its weights are not ternary; train past" in error
    assert f"{ramp} is at λ = 0.25, not 1" in refused(capsys, "export", ramp, out)
    assert not out.exists()
    out.mkdir()
    error = refused(capsys, "export", finished_run, out)
    assert f"{out} already exists; choose another name or remove it" in error
    assert list(tmp_path.iterdir()) == [out]


def test_models_that_are_none(tmp_path: Path, capsys: Capture) -> None:
    for command in (("eval", tmp_path), ("export", tmp_path, tmp_path / "packed")):
        assert f"{tmp_path}: no checkpoint here" in refused(capsys, *command)
    error = refused(capsys, "report", tmp_path)
    assert f"{tmp_path} has no metrics.jsonl" in error


def test_loss_that_is_not_finite(config_file: Path, tmp_path: Path) -> None:
    """Exit code 1: the configuration is sound, the run is not. What was saved stays usable."""
    run_dir = tmp_path / "run"
    overrides = (f"run.dir={run_dir}", KEEP_ALL, "optim.lr=1e30", "checkpoint.every=1")
    done = execute(train_command("plain", config_file, *overrides))
    assert done.returncode == 1, done.stderr
    error = done.stderr.splitlines()[-1]
    last = metrics(run_dir, "train")[-1]
    assert re.match(
        rf"error: loss is \S+ and the gradient norm \S+ at step {last['step']}; nothing was saved "
        "since the last checkpoint: resume from it with a lower optim.lr",
        error,
    ), error
    assert "Traceback" not in done.stderr
    assert 1 < last["step"] < NUM_STEPS
    path = latest_checkpoint(run_dir / "checkpoints")
    assert path is not None
    reader = Reader(path)
    assert reader.meta.step == last["step"] - 1
    assert all(torch.isfinite(master).all() for _, master in reader.parameters())
