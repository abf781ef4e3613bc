"""The command line: help, exit codes, one line on stderr, and `bitscale config`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitscale import __version__
from bitscale.cli import main as cli
from bitscale.cli.main import main
from bitscale.config import load_config

pytestmark = pytest.mark.unit

COMMANDS = ["prepare", "plan", "train", "eval", "export", "report", "config"]
Capture = pytest.CaptureFixture[str]


def run_cli(capsys: Capture, *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    capsys.readouterr()
    try:
        code = main(args)
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    streams = capsys.readouterr()
    return code, streams.out, streams.err


# --- Help ---


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, capsys: Capture) -> None:
    code, out, err = run_cli(capsys, command, "--help")
    assert (code, err) == (0, "")
    examples = out.split("examples:")[1].splitlines()
    assert len([line for line in examples if line.startswith(f"  bitscale {command} ")]) >= 2


def test_top_level_help_lists_the_commands(capsys: Capture) -> None:
    code, out, _ = run_cli(capsys, "--help")
    assert code == 0
    assert [name for name in COMMANDS if f"\n    {name} " not in out] == []


def test_version(capsys: Capture) -> None:
    assert run_cli(capsys, "--version") == (0, f"bitscale {__version__}\n", "")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from bitscale.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'datasets', 'pyarrow', 'matplotlib', 'pydantic'}\n"
        "sys.exit(' '.join(heavy & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- Bad input: exit code 2, one line ---


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        (["train", "CONFIG", "train.stesp=3"], ["'train.stesp'", "did you mean 'train.steps'?"]),
        (["train", "CONFIG", "train.steps=many"], ['train.steps="many"', "valid integer"]),
        (["train", "CONFIG", "model.num_heads=5"], ["model.num_heads=5", "change one"]),
        (["train", "CONFIG", "--resume", "auto", "optim.lr=x"], ["optim.lr"]),
        (["train", "CONFIG", "stray"], ["'stray'", "section.key=value"]),
        (["train", "absent.yaml"], ["absent.yaml: no such configuration file"]),
        (["train", "CONFIG"], ["corpus is not a prepared corpus", "bitscale prepare"]),
        (["config", "--show", "absent.yaml"], ["absent.yaml: no such configuration file"]),
        (["config", "--deepspeed", "CONFIG", "--world-size", "3"], ["world_size=3", "of 12"]),
        (["config", "--deepspeed", "CONFIG", "--world-size", "0"], ["world_size=0"]),
        (["eval", "absent"], ["absent"]),
        (["export", "absent", "out"], ["absent: no checkpoint here"]),
        (["report", "absent"], ["absent"]),
        (["prepare", "absent.txt", "--out", "out"], ["absent.txt"]),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_code_2(
    args: list[str],
    fragments: list[str],
    capsys: Capture,
    tiny_config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli(capsys, *(str(tiny_config_file) if a == "CONFIG" else a for a in args))
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert [text for text in fragments if text not in err] == [], err
    assert not (tmp_path / "runs").exists()  # nothing was started


@pytest.mark.parametrize(
    ("args", "fragment"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["retrain"], "invalid choice: 'retrain'"),
        (["train"], "the following arguments are required: CONFIG"),
        (["train", "x.yaml", "--resum=auto", "--bogus"], "--bogus"),
        (["train", "x.yaml", "--resume", "auto", "stray"], "unrecognized arguments: stray"),
        (["train", "x.yaml", "--resume", "auto", ""], "unrecognized arguments: "),
        (["eval", "x", "--batch-size", "2", "optim.lr=3"], "unrecognized arguments: optim.lr=3"),
        (["config", "x.yaml"], "one of the arguments --show --deepspeed is required"),
    ],
)
def test_bad_usage_is_code_2(args: list[str], fragment: str, capsys: Capture) -> None:
    code, out, err = run_cli(capsys, *args)
    assert (code, out) == (2, "")
    assert fragment in err


def test_world_size_comes_from_the_launcher(
    capsys: Capture, tiny_config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, _, err = run_cli(capsys, "train", str(tiny_config_file))
    assert code == 2
    assert "train.global_batch_size=8" in err
    assert "world_size=3" in err
    monkeypatch.setenv("WORLD_SIZE", "three")
    code, _, err = run_cli(capsys, "train", str(tiny_config_file))
    assert (code, err) == (
        2,
        "error: environment variable WORLD_SIZE='three' is not a whole number\n",
    )


def test_only_rank_0_tells_what_every_rank_knows(
    capsys: Capture, tiny_config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_SILENT_RANK_SECONDS", 0.0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_cli(capsys, "train", str(tiny_config_file), "a.b=1") == (2, "", "")
    code, _, err = run_cli(capsys, "train", str(tiny_config_file))  # a corpus missing on this host
    assert code == 2
    missing = "corpus is not a prepared corpus"
    assert err.startswith(f"error on rank 1 ({os.uname().nodename}): {missing}")
    monkeypatch.setenv("RANK", "0")
    code, _, err = run_cli(capsys, "train", str(tiny_config_file))
    assert err.startswith(f"error on rank 0 ({os.uname().nodename}): {missing}")


# --- bitscale config ---


def test_show_prints_what_reads_back(
    capsys: Capture, tiny_config_file: Path, tmp_path: Path
) -> None:
    code, out, err = run_cli(
        capsys, "config", "--show", str(tiny_config_file), "train.steps=200", "optim.lr=1e-4"
    )
    assert (code, err) == (0, "")
    assert out.startswith("# config hash ")
    (tmp_path / "shown.yaml").write_text(out, encoding="utf-8")
    shown = load_config(tmp_path / "shown.yaml")
    assert shown == load_config(tiny_config_file, ["train.steps=200", "optim.lr=1e-4"])
    assert shown.optim.clip == 1.0  # defaults are printed too
    assert "clip: 1.0" in out


def test_deepspeed_json(capsys: Capture, tiny_config_file: Path) -> None:
    code, out, err = run_cli(
        capsys,
        "config",
        "--deepspeed",
        str(tiny_config_file),
        "--world-size",
        "2",
        "train.global_batch_size=24",  # overrides may follow an option
        "optim.clip=0.5",
        "engine.deepspeed={zero_optimization: {overlap_comm: true}, wall_clock_breakdown: true}",
    )
    assert (code, err) == (0, "")
    derived = json.loads(out[out.index("{\n") :])
    assert derived["train_batch_size"] == 24
    assert derived["train_micro_batch_size_per_gpu"] == 4
    assert derived["gradient_accumulation_steps"] == 3
    assert derived["gradient_clipping"] == 0.5
    assert derived["bf16"] == {"enabled": False}
    assert derived["zero_optimization"] == {"stage": 1, "overlap_comm": True}
    assert derived["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    "command", ["inspect A", "verify A B", "plan A --nodes 1 --gpus-per-node 1"]
)
def test_json_that_cannot_be_written_is_told_first(
    command: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before A is looked for, which is not there; of `verify` 1 would mean another model."""
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for others than root
    for file, message in (
        (tmp_path, "is a directory; name a file"),
        (tmp_path / "absent" / "a.json", f"there is no folder {tmp_path / 'absent'}"),
        (tmp_path / "a.json", "must not be written by you"),
    ):
        code, _, err = run_cli(capsys, *command.split(), "--json", str(file))
        assert (code, err.startswith(f"error: --json {file}")) == (2, True), err
        assert message in err
