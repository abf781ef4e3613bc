"""A small plan of sweeps whose runs are pretended: what a run would leave, without training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bitscale.config import num_steps, parse_config, transition_step
from bitscale.sweep import campaign as campaigns
from bitscale.sweep.campaign import Campaign
from bitscale.sweep.schedule import Schedule
from bitscale.sweep.store import write_json
from bitscale.sweep.worker import OK, STOPPED, Task

STEPS = 40
BASE = f"""\
run: {{dir: cell}}
model: {{num_layers: 2, d_model: 32, num_heads: 4, d_ff: 64, vocab_size: 64}}
data: {{corpora: [{{path: corpus}}], seq_len: 16}}
train: {{steps: {STEPS}, global_batch_size: 8, micro_batch_size: 4, dtype: fp32}}
optim: {{lr: 1e-3, schedule: wsd, warmup: {{steps: 4}}}}
transition: {{ramp: {{shape: linear, over: {{steps: 2}}}}}}
"""
ARMS = {
    "sixteen": {"transition.at": None},
    "scratch": {"transition.at.step": 0},
    "early": {"transition.at.step": 10},
    "late": {"transition.at.step": 20},
}
CLAIMS = [
    {"id": "better", "text": "Early beats scratch", "source": "a paper",
     "contrast": {"early": 1.0, "scratch": -1.0}, "predicted": "negative", "margin": 0.01},
    {"id": "same", "text": "Late is early", "source": "us",
     "contrast": {"late": 1.0, "early": -1.0}, "predicted": "zero", "margin": 0.05},
    {"id": "spike", "text": "Early spikes", "source": "us", "measure": "peak_excess",
     "contrast": {"early": 1.0, "late": -1.0}, "predicted": "positive"},
    {"id": "when", "text": "Early is best", "source": "us", "best": ["scratch", "early", "late"],
     "of": "transition_fraction", "predicted": [0.1, 0.4]},
]  # fmt: skip
Make = Callable[..., Campaign]


def maker(tmp_path: Path) -> Make:
    (tmp_path / "base.yaml").write_text(BASE, encoding="utf-8")

    def plan(**content: object) -> Campaign:
        whole = {"base": "base.yaml", "arms": ARMS, "seeds": {"values": [0, 1, 2, 3]}} | content
        (tmp_path / "try.yaml").write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
        return campaigns.plan([tmp_path / "try.yaml"], [], tmp_path / "out")

    return plan


def valid_loss(start: int | None, seed: int) -> float:
    """16 bit 3, late 3.11, early 3.10, scratch 3.3; seeds shift all by .5 and each by .01."""
    gap = {None: 0.0, 0: 0.3, 10: 0.1, 20: 0.11}[start]
    return (
        3.0 + 0.5 * seed + gap + 0.01 * float(np.random.default_rng([seed, start or 99]).random())
    )


def pretend(task: Task, *, until: int | None = None) -> int:
    """Write what `bitscale train` would have left, but for the weights."""
    cfg = parse_config(task.tree, where="task")
    run_dir, start = Path(task.directory), transition_step(cfg)
    first = 0
    if task.resume is not None and task.resume != "auto":
        assert (Path(task.resume) / "meta.json").is_file(), "nothing to begin from"
        first = int(Path(task.resume).name.removeprefix("step-"))
    last = until or cfg.train.stop_step or num_steps(cfg)
    lines: list[dict[str, Any]] = [{"kind": "event", "event": "start", "step": first, "tokens": 0}]
    for step in range(first + 1, last + 1):
        ternary = start is not None and step > start
        loss = 5.0 - 0.01 * step
        if ternary and start is not None and step < start + 5:  # .5, .3, .5, .3
            loss += 0.4 - 0.1 * (-1) ** (step - start)
        lines.append({"kind": "train", "step": step, "tokens": 128 * step, "loss": loss, "lr": 1e-3,
                      "weight_decay": 0.1, "lambda_weight": float(ternary),
                      "lambda_activation": float(ternary), "grad_norm": 1.0})  # fmt: skip
        if step % 10 == 0:
            lines.append({"kind": "speed", "step": step, "tokens_per_second": 1e3,
                          "step_seconds": 0.5, "peak_gib": 1.0})  # fmt: skip
        if step in (*cfg.checkpoint.at, last):
            write_json(run_dir / "checkpoints" / f"step-{step:08d}" / "meta.json", {})
    if last == num_steps(cfg):
        loss = valid_loss(start, cfg.train.seed)
        lines.append({"kind": "valid", "step": last, "tokens": 128 * last, "loss": loss,
                      "perplexity": 1.0, "bits_per_byte": loss / 2})  # fmt: skip
        lines.append({"kind": "event", "event": "finished", "step": last, "tokens": 128 * last})
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if task.reaches_end and until is None:
        write_json(run_dir / "done.json", {"status": "finished", **task.provenance})
    return OK if until is None else STOPPED


def run_all(schedule: Schedule, act: Callable[[Task], int] = pretend) -> list[str]:
    """Everything, one after the other. Returns 'label: how' in order."""
    said = []
    while (run := schedule.next_run()) is not None:
        said.append(schedule.end(run, act(schedule.begin(run))))
        if said[-1] == "stopped":
            return said
    return said


def schedule_of(campaign: Campaign) -> Schedule:
    provenance = {"commit": "abc", "versions": "v", "sweep_started": "2026-01-01T00:00"}
    return Schedule(campaign.runs, campaign.store, provenance)


# Order, retries, pruning


class Job:
    """As much of a submitit job as the back end uses."""

    def __init__(self, task: Task, number: int) -> None:
        self.job_id, self._task = str(number), task

    def done(self) -> bool:
        return True

    def result(self) -> int:
        if "lost" in self._task.provenance:
            raise RuntimeError("the job was cancelled")
        return pretend(self._task)


class Executor:
    def __init__(self) -> None:
        self.arrays: list[int] = []

    def batch(self) -> "Executor":
        self.arrays.append(0)
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    def submit(self, function: object, task: Task) -> Job:
        self.arrays[-1] += 1
        return Job(task, sum(self.arrays))
