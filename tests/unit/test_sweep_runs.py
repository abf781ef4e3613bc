"""A sweep's bookkeeping without training: order, retries, pruning, results, verdicts, back ends."""

import json
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import yaml
from pretended_runs import ARMS, STEPS, Executor, Make, pretend, run_all, schedule_of

from bitscale import guard, run_lock
from bitscale.cli.main import main
from bitscale.data.corpus import load_corpus
from bitscale.errors import ConfigError, DataError
from bitscale.sweep import campaign as campaigns
from bitscale.sweep.local import run_local
from bitscale.sweep.progress import Progress
from bitscale.sweep.results import measure_cells
from bitscale.sweep.schedule import GIB, Schedule
from bitscale.sweep.slurm import run_slurm
from bitscale.sweep.store import Store, write_json
from bitscale.sweep.worker import FAILED, FAULT, OK, STOPPED, Task, run_task

pytestmark = pytest.mark.unit


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
    schedule, executor = schedule_of(campaign), Executor()
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
