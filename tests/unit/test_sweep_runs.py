"""A sweep's bookkeeping without training: order, retries, pruning, results, verdicts, back ends."""

import json
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bitscale import guard, run_lock
from bitscale.cli.main import main
from bitscale.config import num_steps, parse_config, transition_step
from bitscale.data.corpus import load_corpus
from bitscale.errors import ConfigError, DataError
from bitscale.fit.table import Row, read_table
from bitscale.sweep import campaign as campaigns
from bitscale.sweep.campaign import Campaign
from bitscale.sweep.claims import _line, write_claims
from bitscale.sweep.commands import command_list
from bitscale.sweep.local import run_local
from bitscale.sweep.progress import Progress
from bitscale.sweep.results import measure_cells, write_table
from bitscale.sweep.schedule import GIB, Schedule
from bitscale.sweep.slurm import make_executor, run_slurm
from bitscale.sweep.store import Store, write_json
from bitscale.sweep.worker import FAILED, FAULT, OK, STOPPED, Task, run_task

pytestmark = pytest.mark.unit

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


@pytest.fixture
def make(tmp_path: Path) -> Make:
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


def test_every_run_once_and_nothing_kept(make: Make) -> None:
    campaign = make()
    schedule = schedule_of(campaign)
    assert len(schedule.remaining()) == 16
    assert run_all(schedule) == ["finished"] * 16
    assert list(campaign.store.root.rglob("step-*")) == []
    again = schedule_of(campaign)
    assert again.remaining() == [] and len(again.done) == 16


def test_the_last_checkpoint_stays_if_asked_for(make: Make) -> None:
    campaign = make(keep="last")
    run_all(schedule_of(campaign))
    kept = [path.name for path in campaign.store.root.rglob("step-*")]
    assert kept == [f"step-{STEPS:08d}"] * 16


def test_a_trunks_checkpoint_stays_as_long_as_somebody_begins_there(make: Make) -> None:
    campaign = make(seeds={"values": [0]})
    schedule, left = schedule_of(campaign), []

    def act(task: Task) -> int:
        code = pretend(task)
        left.append(sorted(path.name[-2:] for path in campaign.store.root.rglob("step-*")))
        return code

    run_all(schedule, act)
    # sixteen; scratch; early; late: before the schedule hears of each end.
    assert left == [["10", "20", "40"], ["10", "20", "40"], ["10", "20", "40"], ["20", "40"]]


CHECKPOINT_GIB = 12 * 18_848 / 2**30  # of the model of BASE: master and two moments in fp32


def test_checkpoints_keep_within_the_disk_budget(make: Make) -> None:
    """Eight runs want to begin; a second trunk waits until the first one's forks let it go."""
    campaign = make()
    budget = 9.5 * CHECKPOINT_GIB
    schedule = Schedule(campaign.runs, campaign.store, {}, disk_bytes=budget * GIB)
    assert 4 * len(schedule.runs) * 2 > 9.5  # they would not fit all at once
    names = {cell.key: f"{cell.label} {cell.seed}" for cell in campaign.cells}
    order, active = [], []
    while True:
        while (run := schedule.next_run()) is not None:
            order.append(names[run.key])
            active.append((run, schedule.begin(run)))
        if not active:
            break
        # A trunk of two forks may take 2 + 4, another run 2.
        assert sum(6 if run.is_trunk else 2 for run, _ in active) <= 9.5
        run, task = active.pop(0)
        code = pretend(task)
        for meta in Path(task.directory).glob("checkpoints/*/meta.json"):
            meta.write_bytes(b" " * round(CHECKPOINT_GIB * GIB))
        schedule.end(run, code)
        assert sum(map(schedule.store.saved_bytes, schedule.runs)) <= budget * GIB
    assert schedule.remaining() == [] and len(order) == 16
    assert order.index("sixteen 1") > order.index("early 0")
    with pytest.raises(
        ConfigError, match=r"--disk-gib .* is too little for a run that needs .*GiB"
    ):
        Schedule(make(arms=ARMS | {"new": {"transition.at.step": 30}}).runs, campaign.store, {},
                 disk_bytes=4 * CHECKPOINT_GIB * GIB)  # fmt: skip


def test_another_text_is_another_run(make: Make, corpus: Path) -> None:
    campaign = make(set={"data.corpora": [{"path": str(corpus)}]}, seeds={"values": [0]})
    campaign.store.check_corpora(campaign.runs)
    campaign.store.check_corpora(campaign.runs)
    known = campaign.store.root / "corpora.json"
    assert json.loads(known.read_text()) == {str(corpus): load_corpus(corpus).fingerprint}
    known.write_text(json.dumps({str(corpus): "f00"}))
    with pytest.raises(ConfigError, match=r"is not the corpus that the runs in .*another --out"):
        campaign.store.check_corpora(campaign.runs)
    with pytest.raises(DataError, match="is not a prepared corpus"):
        campaign.store.check_corpora(make().runs)


def test_what_was_stopped_goes_on(make: Make) -> None:
    campaign = make(seeds={"values": [0]})
    first = schedule_of(campaign)
    trunk = first.next_run()
    assert trunk is not None and trunk.is_trunk
    assert first.end(trunk, pretend(first.begin(trunk), until=15)) == "stopped"
    second = schedule_of(campaign)
    task = second.begin(second.next_run() or trunk)
    assert (task.key, task.resume) == (trunk.key, "auto")
    # Without a checkpoint of its own it begins afresh, in an empty directory.
    shutil.rmtree(campaign.store.run_dir(trunk.key) / "checkpoints")
    third = schedule_of(campaign)
    task = third.begin(third.next_run() or trunk)
    assert (task.key, task.resume) == (trunk.key, None)
    assert not (campaign.store.run_dir(trunk.key) / "metrics.jsonl").exists()


def test_a_stopped_fork_needs_its_trunk_no_more(make: Make) -> None:
    campaign = make(seeds={"values": [0]}, arms={k: ARMS[k] for k in ("sixteen", "early")})
    first = schedule_of(campaign)
    for until in (None, 15):
        run = first.next_run()
        assert run is not None
        first.end(run, pretend(first.begin(run), until=until))
    left = [path.name for path in campaign.store.root.rglob("step-*")]
    second = schedule_of(campaign)
    assert sorted(left) == ["step-00000010", "step-00000015"]
    second.prune()
    assert [path.name for path in campaign.store.root.rglob("step-*")] == ["step-00000015"]
    (run,) = second.remaining()
    assert second.begin(run).resume == "auto"


def test_what_only_looks_deletes_nothing(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan or a report of a part of the sweeps knows nothing of what the others still need."""
    campaign = make(seeds={"values": [0]})
    schedule = schedule_of(campaign)
    trunk = schedule.next_run()
    assert trunk is not None
    schedule.end(trunk, pretend(schedule.begin(trunk)))
    saved = [path.name for path in campaign.store.root.rglob("step-*")]
    content = yaml.safe_load((tmp_path / "try.yaml").read_text())
    content["arms"] = {"sixteen": ARMS["sixteen"]}
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(content))
    command = ["sweep", str(tmp_path / "part.yaml"), "--out", str(campaign.store.root)]
    for look in ("--dry-run", "--report"):
        assert main([*command, look]) == 0
        assert [path.name for path in campaign.store.root.rglob("step-*")] == saved != []
    # The command that trains does: there is nothing to train, and nobody of its own begins there.
    assert main(command) == 0
    assert list(campaign.store.root.rglob("step-*")) == []
    # Whoever waited for these can no longer begin here, and is not forgotten.
    names = {cell.key: cell.label for cell in campaign.cells}
    assert run_all(schedule) == ["finished"]
    assert [names[run.key] for run in schedule.not_begun()] == ["early", "late"]
    assert run_all(schedule_of(campaign)) == ["finished"] * 3  # the trunk once more


def test_two_commands_do_not_train_in_one_directory(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign = make(seeds={"values": [0]})
    command = ["sweep", str(tmp_path / "try.yaml"), "--out", str(campaign.store.root)]
    with campaigns.sole_trainer(campaign):
        assert main(command) == 2
        assert "is in use by process" in (error := capsys.readouterr().err), error
        assert "choose another --out" in error
        assert main([*command, "--dry-run"]) == 0


def test_a_job_of_an_earlier_command_is_left_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files stay; what it has finished then is not trained again, what it has not, is."""
    campaign = make(seeds={"values": [0]}, arms={k: ARMS[k] for k in ("sixteen", "scratch")})
    first, second = schedule_of(campaign), schedule_of(campaign)
    task = first.begin(campaign.runs[0])
    with run_lock.hold(Path(task.directory)):
        (Path(task.directory) / "metrics.jsonl").write_text("")
        run = second.next_run()
        assert run is campaign.runs[1] and second.elsewhere == {task.key}
        assert second.end(run, pretend(second.begin(run))) == "finished"
        assert second.next_run() is None
        assert [run.key for run in second.not_begun()] == [task.key]
        assert (Path(task.directory) / "metrics.jsonl").exists()
    third = schedule_of(campaign)
    third.elsewhere.add(task.key)
    assert third.next_run() is campaign.runs[0]  # it was killed
    pretend(task)
    assert second.next_run() is None and second.remaining() == []
    # Slurm's command waits for it.
    waits, lines = [True, True, False], list[str]()
    for path in campaign.store.root.rglob("done.json"):
        path.unlink()
    monkeypatch.setattr(Store, "is_in_use", lambda self, key: key == task.key and waits.pop(0))
    schedule, executor = schedule_of(campaign), _Executor()
    schedule.done.clear()
    run_slurm(schedule, Progress(schedule, campaign.names, write=lines.append), executor, 0.0)
    waiting = [line for line in lines if "another job trains it; waiting for that" in line]
    assert executor.arrays == [1] and waits == []
    assert len(waiting) == 1 and f"sixteen, seed 0 ({task.key})" in waiting[0]
    # So does the local one, though it finds nothing to do meanwhile.
    waits += [True, False]
    schedule = schedule_of(campaign)
    schedule.done.discard(task.key)
    assert run_local(schedule, Progress(schedule, campaign.names, write=lines.append), 1)
    assert waits == [] and schedule.remaining() == []


def test_a_stop_is_no_failure(make: Make) -> None:
    campaign = make(seeds={"values": [0]}, arms={"scratch": ARMS["scratch"]})
    schedule = schedule_of(campaign)
    codes, said = [STOPPED, STOPPED, FAILED, STOPPED, FAILED], []
    while codes and (run := schedule.next_run()) is not None:
        schedule.begin(run)
        said.append(schedule.end(run, codes.pop(0)))
    assert said == ["stopped", "stopped", "retry", "stopped", "failed"]


def test_a_failed_run_is_tried_twice_and_others_go_on(make: Make) -> None:
    campaign = make(seeds={"values": [0]})
    schedule = schedule_of(campaign)
    names = {cell.key: cell.label for cell in campaign.cells}

    def act(task: Task) -> int:
        if names[task.key] != "early":
            return pretend(task)
        Path(task.directory).mkdir(parents=True, exist_ok=True)
        (Path(task.directory) / "log.txt").write_text("a\nTraceback\nValueError: no\n")
        return FAILED

    assert sorted(run_all(schedule, act)) == ["failed", *["finished"] * 3, "retry"]
    ((key, lines),) = schedule.failed.items()
    assert names[key] == "early" and lines[-1] == "ValueError: no"
    # It needs its trunk's checkpoint the next time.
    assert [path.name for path in campaign.store.root.rglob("step-*")] == ["step-00000010"]
    assert run_all(schedule_of(campaign)) == ["finished"]


def test_forks_of_a_failed_trunk_are_not_begun(make: Make) -> None:
    campaign = make(seeds={"values": [0]})
    schedule = schedule_of(campaign)
    names = {cell.key: cell.label for cell in campaign.cells}
    run_all(schedule, lambda task: FAILED if names[task.key] == "sixteen" else pretend(task))
    assert [names[run.key] for run in schedule.blocked()] == ["early", "late"]


def test_a_diverged_run_is_a_result(make: Make) -> None:
    campaign = make(seeds={"values": [0]})
    schedule = schedule_of(campaign)
    names = {cell.key: cell.label for cell in campaign.cells}

    def act(task: Task) -> int:
        if names[task.key] != "sixteen":
            return pretend(task)
        pretend(task, until=15)
        shutil.rmtree(Path(task.directory) / "checkpoints" / "step-00000015")
        write_json(Path(task.directory) / "done.json", {"status": "diverged"})
        return FAULT

    # 15 steps: early has begun at 10, late would have begun at 20.
    assert run_all(schedule, act) == ["diverged", "finished", "finished"]
    rows = measure_cells(campaign.cells, schedule.runs, campaign.store)
    statuses = {row["label"]: row["status"] for row in rows}
    assert statuses == {
        "sixteen": "diverged",
        "late": "diverged",
        "scratch": "finished",
        "early": "finished",
    }
    assert not schedule.failed and schedule_of(campaign).remaining() == []


def test_a_new_fork_of_a_pruned_trunk_trains_it_again(make: Make) -> None:
    run_all(schedule_of(make(seeds={"values": [0]})))
    more = ARMS | {"later": {"transition.at.step": 20, "quant.preset": "absmedian"}}
    campaign = make(seeds={"values": [0]}, arms=more)
    names = {cell.key: cell.label for cell in campaign.cells}
    trained: list[tuple[str, str | None]] = []

    def act(task: Task) -> int:
        trained.append((names[task.key], task.resume and Path(task.resume).name))
        assert task.allow_change == (("quant",) if names[task.key] == "later" else ())
        return pretend(task)

    schedule = schedule_of(campaign)
    assert len(schedule.done) == 3
    run_all(schedule, act)
    assert trained == [("sixteen", None), ("later", "step-00000020")]


def test_what_was_trained_by_hand_counts(make: Make) -> None:
    campaign = make(seeds={"values": [0]})
    run_all(schedule_of(campaign))
    for path in campaign.store.root.rglob("done.json"):
        path.unlink()
    assert schedule_of(campaign).remaining() == []
    (campaign.store.run_dir(campaign.cells[0].key) / "done.json").write_text("{")
    with pytest.raises(ConfigError, match=r"done.json is damaged .*; delete it to train it again"):
        schedule_of(campaign)


def test_progress_says_how_far_it_is(make: Make) -> None:
    campaign, lines = make(seeds={"values": [0]}), list[str]()
    schedule = schedule_of(campaign)
    progress = Progress(schedule, campaign.names, write=lines.append)
    while (run := schedule.next_run()) is not None:
        task = schedule.begin(run)
        progress.begin(run)
        progress.end(run, schedule.end(run, pretend(task)))
    assert [line.split(" (")[0] for line in lines] == [
        "[1/4] try: sixteen, seed 0",
        "[2/4] try: scratch, seed 0",
        "[3/4] try: early, seed 0",
        "[4/4] try: late, seed 0",
    ]


@pytest.mark.parametrize(
    ("exit_code", "error", "meaning", "status"),
    [
        (1, "fault", FAULT, "diverged"),  # of torchrun, which adds a traceback of its own
        (1, "error: corpus is not a prepared corpus", FAILED, None),
        (1, "", FAILED, None),
        (2, "error: corpus is not a prepared corpus", 2, None),
        (75, "", STOPPED, None),
        (0, "", OK, "finished"),
    ],
)
def test_what_a_launcher_ends_with(
    exit_code: int, error: str, meaning: int, status: str | None, make: Make
) -> None:
    campaign = make(seeds={"values": [0]})
    task = schedule_of(campaign).begin(campaign.runs[0])
    directory = Path(task.directory)
    directory.mkdir(parents=True)
    (directory / "log.txt").write_text("error: loss is nan at another attempt\n")
    if error == "fault":
        problem = guard.Fault(3, "loss is nan and the gradient norm 1 at step 3", is_finite=False)
        error = f"error: {guard.error_for(problem)}"
    script = f"import sys; print({error!r}, 'Traceback of the launcher', sep='\\n'); "
    shell = shlex.join([sys.executable, "-c", f"{script}sys.exit({exit_code})"])
    launcher = ("/bin/sh", "-c", f"{shell} >> {shlex.quote(str(directory / 'log.txt'))}")
    before = signal.getsignal(signal.SIGTERM)
    assert run_task(task._replace(launcher=launcher)) == meaning
    signal.signal(signal.SIGTERM, before)
    done = campaign.store.done(task.key)
    assert (done and done["status"]) == status


# Results


@pytest.fixture
def finished(make: Make) -> tuple[Campaign, list[Row]]:
    campaign = make(claims=CLAIMS, seeds={"values": [0, 1, 2, 3, 4]})
    run_all(schedule_of(campaign))
    return campaign, campaigns.collect(campaign)


def test_rows(finished: tuple[Campaign, list[Row]]) -> None:
    campaign, rows = finished
    by_point = {(row["label"], row["seed"]): row for row in rows}
    assert len(by_point) == 20
    early, sixteen = by_point["early", 2], by_point["sixteen", 2]
    assert early["valid_loss"] == valid_loss(10, 2) and early["trunk"] == sixteen["hash"]
    assert (early["transition_fraction"], early["qat_fraction"]) == (0.25, 0.75)
    assert early["weight_bits"] == pytest.approx(1.585, abs=1e-3) and sixteen["weight_bits"] == 16
    # Steps 11 to 14 lie .4 above: the trunk's steps before are part of the fork's history.
    assert early["spike_height"] == pytest.approx(0.4 - 0.01 * (12.5 - 6.5), abs=0.011)
    assert early["peak_excess"] == pytest.approx(0.4) and early["end_excess"] == pytest.approx(0)
    assert early["mean_excess"] == pytest.approx(0.4 * 4 / 30)
    assert by_point["scratch", 0]["peak_excess"] is None and sixteen["spike_height"] is None
    assert early["train_seconds"] == 15.0 and sixteen["train_seconds"] == 20.0
    assert (early["commit"], early["steps"], early["tokens"]) == ("abc", 40, 40 * 128)
    stored = read_table(campaign.store.root)
    assert stored == rows and read_table(campaign.store.root / "RESULTS.csv") == rows


def test_rows_of_other_sweeps_stay_in_the_table(
    finished: tuple[Campaign, list[Row]], tmp_path: Path
) -> None:
    _, rows = finished
    content = (tmp_path / "try.yaml").read_text()
    (tmp_path / "other.yaml").write_text(content.replace("early", "soon"))
    other = campaigns.plan([tmp_path / "other.yaml"], [], tmp_path / "out")
    assert schedule_of(other).remaining() == []  # the same runs
    campaigns.collect(other)
    stored = read_table(tmp_path / "out")
    assert len(stored) == 40 and {row["sweep"] for row in stored} == {"try", "other"}
    assert [row for row in stored if row["sweep"] == "try"] == rows


def test_columns_have_one_type(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": True, "c": None, "d": 1}, {"a": 0.5, "b": "x", "c": None, "d": None}]
    write_table(rows, tmp_path)
    assert read_table(tmp_path) == [
        {"a": 1.0, "b": "True", "c": None, "d": 1},
        {"a": 0.5, "b": "x", "c": None, "d": None},
    ]


# Verdicts


def test_verdicts_and_the_page(
    finished: tuple[Campaign, list[Row]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign, rows = finished
    figures, said = tmp_path / "docs" / "images", list[str]()
    judgements = campaigns.report(campaign, rows, figures, said.append)
    assert [judgement.verdict for judgement in judgements] == [
        *("confirmed", "confirmed", "not seen", "confirmed")
    ]
    better, same, _, when = (judgement.interval for judgement in judgements)
    assert better.value == pytest.approx(-0.2, abs=0.01)  # though seeds lie .5 apart
    assert better.high - better.low < 0.05 and same.num_seeds == 5
    assert (when.value, when.low, when.high) == (0.25, 0.125, 0.375)
    assert any(line.startswith("  Early beats scratch: confirmed (-0.") for line in said)
    assert (figures / "try.svg").read_text().startswith("<?xml")

    page = tmp_path / "docs" / "results" / "claims.md"
    write_claims(page, campaign, rows, judgements, figures)
    text = page.read_text()
    assert "| Early beats scratch | a paper | below 0 | valid_loss -0." in text
    assert "| Late is early | us | within ±0.05 |" in text
    assert re.search(r"models of \S+k to \S+k parameters", text)
    assert "| Early is best | us | 0.1 to 0.4 | transition_fraction +0.25" in text
    assert "![try](../images/try.svg)" in text and "20 finished cells of 20" in text
    # The command does the same, and trains nothing.
    arguments = ["sweep", str(tmp_path / "try.yaml"), "--out", str(tmp_path / "out"), "--report"]
    assert main([*arguments, "--claims", str(page)]) == 0
    assert "20 of 20 cells" in capsys.readouterr().out
    # From the page's table alone, with all runs gone, the page and the figure come out the same.
    shutil.rmtree(tmp_path / "out")
    figure = (figures / "try.svg").read_bytes()
    arguments += ["--figures", str(figures), "--claims", str(page)]
    assert main([*arguments, "--table", str(page.with_suffix(".csv"))]) == 0
    assert page.read_text() == text and (figures / "try.svg").read_bytes() == figure
    assert not (tmp_path / "out").exists()
    assert main([*arguments[:-5], "--table", str(page.with_suffix(".csv"))]) == 2
    assert "--table is for --report" in capsys.readouterr().err


def test_seeds_that_are_missing_or_diverged_leave_no_verdict(
    finished: tuple[Campaign, list[Row]],
) -> None:
    campaign, rows = finished
    four = campaigns.judge_all(campaign, [row for row in rows if row["seed"] != 3])
    assert {(j.verdict, len(j.seeds)) for j in four} == {("underpowered", 4)}
    # Early is better where scratch did not diverge: those seeds alone would confirm it.
    lost = [
        {**row, "status": "diverged", "valid_loss": None}
        if (row["label"], row["seed"]) == ("scratch", 3)
        else row
        for row in [*rows, *({**row, "seed": 9} for row in rows if row["seed"] == 0)]
    ]
    better, same, *_ = campaigns.judge_all(campaign, lost)
    assert (better.verdict, len(better.seeds)) == ("underpowered", 5) and better.interval.high < 0
    assert (same.verdict, len(same.seeds)) == ("confirmed", 6)
    assert better.sentence.endswith("5 seeds, 95%; a cell diverged with seed 3).")
    assert "**underpowered** (a cell diverged with seed 3) |" in _line(better)


def test_a_best_point_at_the_edge_says_so(finished: tuple[Campaign, list[Row]]) -> None:
    campaign, rows = finished
    for label, place, beyond in (("late", 0.5, True), ("scratch", 0.0, False)):
        moved = [
            {**row, "valid_loss": row["valid_loss"] - 0.4 * (row["label"] == label)} for row in rows
        ]
        when = campaigns.judge_all(campaign, moved)[-1]
        assert when.interval.value == place
        assert ("the best may lie beyond" in when.sentence) == beyond
    assert campaigns.judge_all(campaign, rows)[-1].note == ""


def test_claims_wait_for_their_cells(make: Make, tmp_path: Path) -> None:
    campaign = make(claims=CLAIMS)
    schedule = schedule_of(campaign)
    rows = measure_cells(campaign.cells, schedule.runs, campaign.store)
    judgements = campaigns.judge_all(campaign, rows)
    assert {judgement.verdict for judgement in judgements} == {"underpowered"}
    assert "no seed has all its cells" in judgements[0].sentence
    write_claims(tmp_path / "page.md", campaign, rows, judgements, tmp_path)
    assert "no data" in (tmp_path / "page.md").read_text()
    wrong = make(claims=[{**CLAIMS[0], "measure": "los"}])
    with pytest.raises(ConfigError, match="'los' is no measure; use one of valid_loss"):
        campaigns.judge_all(wrong, rows)


# Other back ends


def test_printed_commands_come_in_an_order_that_works(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign = make(seeds={"values": [0]})
    lines = command_list(schedule_of(campaign))
    trunk = campaign.cells[0].key
    assert len(lines) == 4 and f"configs/{trunk}.yaml --resume auto" in lines[0]
    resumes = [line.split("--resume ")[1] for line in lines[2:]]
    assert [Path(path).name for path in resumes] == ["step-00000010", "step-00000020"]
    assert all(f"runs/{trunk}/checkpoints" in path for path in resumes)
    written = parse_config(yaml.safe_load((tmp_path / f"out/configs/{trunk}.yaml").read_text()), "")
    assert written.checkpoint.at == (10, 20)
    arguments = ["sweep", str(tmp_path / "try.yaml"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--backend", "print"]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert main([*arguments, "--dry-run"]) == 0
    assert f"from {trunk} at step 10 to 40" in capsys.readouterr().out


class _Job:
    """As much of a submitit job as the back end uses."""

    def __init__(self, task: Task, number: int) -> None:
        self.job_id, self._task = str(number), task

    def done(self) -> bool:
        return True

    def result(self) -> int:
        if "lost" in self._task.provenance:
            raise RuntimeError("the job was cancelled")
        return pretend(self._task)


class _Executor:
    def __init__(self) -> None:
        self.arrays: list[int] = []

    def batch(self) -> "_Executor":
        self.arrays.append(0)
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    def submit(self, function: object, task: Task) -> _Job:
        self.arrays[-1] += 1
        return _Job(task, sum(self.arrays))


def test_slurm_submits_trunks_first(make: Make) -> None:
    campaign, executor, lines = make(), _Executor(), list[str]()
    schedule = schedule_of(campaign)
    progress = Progress(schedule, campaign.names, write=lines.append)
    assert run_slurm(schedule, progress, executor, poll_seconds=0.0)
    assert executor.arrays == [8, 8]  # four trunks and four from scratch, then the forks
    assert len(schedule.done) == 16 and lines[0] == "submitted 8 jobs: 1 to 8"


def test_a_lost_job_is_submitted_again(make: Make) -> None:
    campaign, executor = make(seeds={"values": [0]}), _Executor()
    schedule = Schedule(campaign.runs, campaign.store, {"lost": True})
    assert run_slurm(schedule, Progress(schedule, campaign.names), executor, poll_seconds=0.0)
    assert executor.arrays == [2, 2] and len(schedule.failed) == 2


def test_slurm_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(ConfigError, match="--backend slurm"):
        make_executor(tmp_path, "local", {"no_such_parameter": 1})
    assert make_executor(tmp_path, "local", {"timeout_min": 5}) is not None


def test_wrong_slurm_parameter(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make()
    arguments = ["sweep", str(tmp_path / "try.yaml"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--backend", "slurm", "--slurm", "timeout"]) == 2
    assert "--slurm 'timeout' is not of the form NAME=VALUE" in capsys.readouterr().err
    assert main([*arguments, "--workers", "0"]) == 2
    assert "--workers 0 trains nothing; give 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--disk-gib", "0"])
    assert "--disk-gib: 0 is not above 0" in capsys.readouterr().err
