"""Tiny runs as whole processes: corpus, configuration, command lines, and bitwise comparison.

Used by the tests of this folder and by tools/kill_resume.py.
"""

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tarfile
import typing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bitscale.cli.main import main

NUM_STEPS = 40
GLOBAL_BATCH = 4
TRANSITION_STEP = 16  # λ ramps over steps 16 to 27 and is 1 from step 28 on
EVAL_EVERY = 8
# Two sequences a micro-batch: one rank accumulates over two, two ranks take one each.
CONFIG = f"""\
run: {{dir: run}}
model: {{num_layers: 2, d_model: 32, num_heads: 2, num_kv_heads: 1, d_ff: 64}}
data:
  corpora: [{{path: CORPUS}}]
  seq_len: 32
train:
  steps: {NUM_STEPS}
  global_batch_size: {GLOBAL_BATCH}
  micro_batch_size: 2
  eval_every: {EVAL_EVERY}
  eval_batches: 2
optim: {{lr: 3e-3, schedule: wsd, warmup: {{steps: 4}}, decay: {{steps: 8}}}}
transition:
  at: {{step: {TRANSITION_STEP}}}
  ramp: {{shape: linear, over: {{steps: 12}}}}
  optimizer_state: keep_second_moment
engine: {{num_threads: 1}}
checkpoint: {{every: 5}}
log: {{every: 1, telemetry_every: 5, tensorboard: false}}
"""
KEEP_ALL = "checkpoint.keep_every=5"  # every checkpoint of CONFIG's run
_SOURCES = (argparse, dataclasses, subprocess, tarfile, typing)
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def python_text() -> str:
    """A few hundred KB of text that every Python carries: source of its standard library."""
    return "".join(Path(str(module.__file__)).read_text("utf-8") for module in _SOURCES)


def prepare_corpus(text: str, out: Path, *, vocab_size: int = 512) -> Path:
    """`bitscale prepare` on `text`, in this process."""
    source = out.with_suffix(".txt")
    source.write_text(text, encoding="utf-8")
    options = f"--vocab-size {vocab_size} --section-bytes 2048 --split 0.9,0.05,0.05 --workers 1"
    assert main(["prepare", str(source), "--out", str(out), *options.split()]) == 0
    return out


def write_config(path: Path, corpus: Path) -> Path:
    path.write_text(CONFIG.replace("CORPUS", str(corpus)), encoding="utf-8")
    return path


def train_command(launcher: str, *arguments: object) -> list[str]:
    """`bitscale train ARGUMENTS` started by itself (plain), or on 2 ranks by a launcher."""
    module, rest = "bitscale.cli.main", ["train", *map(str, arguments)]
    match launcher:
        case "plain":
            return [sys.executable, "-m", module, *rest]
        case "torchrun":  # --standalone: on a free port
            return ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", module, *rest]
        case "deepspeed":
            options = ["--num_gpus", "2", "--no_local_rank", "--master_port", str(free_port())]
            return ["deepspeed", *options, "--module", module, *rest]
    raise AssertionError(launcher)


def environment() -> dict[str, str]:
    """This interpreter's commands first on PATH, DeepSpeed on CPU, no launcher around us."""
    outer = {key: value for key, value in os.environ.items() if key not in _LAUNCHER_VARIABLES}
    bin_dir = Path(sys.executable).parent
    extra = {"PATH": f"{bin_dir}:{outer['PATH']}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return outer | extra


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own, all output to the end of `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command, env=environment(), stdout=output, stderr=output, start_new_session=True
        )


def execute(command: list[str], *, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `command` to its end with its output captured."""
    return subprocess.run(
        command, env=environment(), cwd=cwd, capture_output=True, text=True, timeout=300
    )


def train(launcher: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`execute` a training that has to succeed."""
    done = execute(train_command(launcher, *arguments))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def evaluate(model: Path, out: Path) -> dict[str, Any]:
    """What `bitscale eval` finds on the validation split; it is written to the file `out`."""
    assert main(["eval", str(model), "--out", str(out)]) == 0
    (figures,) = json.loads(out.read_text())["models"]
    held_out: dict[str, Any] = figures["held_out"]
    return held_out | {"step": figures["step"]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def metrics(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in a run's metrics.jsonl, in order."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def events(run_dir: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in metrics(run_dir, "event") if line["event"] == event]


def checkpoint_dirs(run_dir: Path) -> list[Path]:
    """Checkpoints that a run can continue from, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def differences(reference: Path, run: Path) -> list[str]:
    """What is not bitwise the same in two finished runs; empty if nothing is.

    Compares every field of every train and valid line, zeros and scale of every telemetry line
    (flips count from the last reading, and a resumed run begins with one), and every retained
    checkpoint: all tensors (masters, moments, RNG) and what it says of itself.
    """
    found = []
    for kind in ("train", "valid"):
        found += _line_differences(kind, metrics(reference, kind), metrics(run, kind))
    found += _line_differences("telemetry", _without_flips(reference), _without_flips(run))
    ours, theirs = checkpoint_dirs(run), checkpoint_dirs(reference)
    if [path.name for path in ours] != [path.name for path in theirs]:
        return [*found, f"checkpoints {[p.name for p in ours]} not {[p.name for p in theirs]}"]
    for mine, its in zip(ours, theirs, strict=True):
        found += _checkpoint_differences(its, mine)
    if (reference / "checkpoints/latest").read_text() != (run / "checkpoints/latest").read_text():
        found.append("latest differs")
    return found


def _line_differences(
    kind: str, expected: list[dict[str, Any]], found: list[dict[str, Any]]
) -> list[str]:
    if [line["step"] for line in found] != [line["step"] for line in expected]:
        return [f"{kind} lines of steps {[line['step'] for line in found]}"]
    return [
        f"{kind} step {its['step']}: {key} is {mine.get(key)!r}, not {its[key]!r}"
        for its, mine in zip(expected, found, strict=True)
        for key in its
        if mine.get(key) != its[key] or mine.keys() != its.keys()
    ]


def _without_flips(run: Path) -> list[dict[str, Any]]:
    return [
        {
            "step": line["step"],
            **{name: (layer["zeros"], layer["scale"]) for name, layer in line["layers"].items()},
        }
        for line in metrics(run, "telemetry")
    ]


def _checkpoint_differences(reference: Path, checkpoint: Path) -> list[str]:
    expected, found = _meta(reference), _meta(checkpoint)
    result = [
        f"{checkpoint.name}/meta.json: {key}" for key in expected if found[key] != expected[key]
    ]
    for name in expected["files"]:
        its, mine = load_file(reference / name), load_file(checkpoint / name)
        if its.keys() != mine.keys():
            result.append(f"{checkpoint.name}/{name}: other tensors")
            continue
        # As bytes: NaN would not equal itself, and -0.0 would equal 0.0.
        result += [
            f"{checkpoint.name}/{name}: {key}"
            for key in its
            if not torch.equal(its[key].view(torch.uint8), mine[key].view(torch.uint8))
        ]
    return result


def _meta(checkpoint: Path) -> dict[str, Any]:
    """meta.json without the keys in which copies of a run may differ."""
    meta: dict[str, Any] = json.loads((checkpoint / "meta.json").read_text())
    del meta["config"]["run"], meta["config"]["log"]
    meta["config"].pop("watch", None)
    meta["config"]["train"].pop("stop_step", None)
    return meta
