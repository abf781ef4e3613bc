"""Sweep files as one campaign in one directory: plan, run, collect, judge."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bitscale import run_lock
from bitscale.config import num_steps
from bitscale.fit.table import Row
from bitscale.recorder import format_duration
from bitscale.sweep.expand import Cell, check_names, expand, sweep_paths
from bitscale.sweep.provenance import provenance
from bitscale.sweep.results import measure_cells, write_table
from bitscale.sweep.schedule import GIB, Schedule
from bitscale.sweep.spec import Sweep, read_sweep
from bitscale.sweep.store import LOCK_NAME, Store, write_json
from bitscale.sweep.trunks import Run, plan_runs
from bitscale.sweep.verdict import Judgement, judge


@dataclass(frozen=True)
class Campaign:
    """Sweeps whose cells live in one store; equal cells and equal trunks of theirs are one run."""

    sweeps: tuple[Sweep, ...]
    cells: tuple[Cell, ...]
    runs: tuple[Run, ...]
    store: Store
    over: Path | None = None  # what goes over every base

    @property
    def names(self) -> dict[str, str]:
        """What to call each run."""
        names: dict[str, str] = {}
        for cell in self.cells:
            names.setdefault(cell.key, f"{cell.sweep}: {cell.label}, seed {cell.seed}")
        for run in self.runs:
            names.setdefault(run.key, f"trunk of 16 bit, seed {run.seeds[0]}")
        return names


def plan(
    paths: Sequence[Path],
    overrides: Sequence[str],
    out: Path,
    over: Path | None = None,
    seeds: Sequence[int] = (),
) -> Campaign:
    """Read and expand every file (a directory stands for its *.yaml); everything is checked.

    `over` and then `overrides` go over the bases of all; `seeds` take the place of each file's.

    Raises ConfigError or DataError, before anything is trained.
    """
    sweeps = [read_sweep(path, overrides, over, seeds) for path in sweep_paths(list(paths))]
    check_names(sweeps)
    cells = [cell for sweep in sweeps for cell in expand(sweep)]
    return Campaign(tuple(sweeps), tuple(cells), tuple(plan_runs(cells)), Store(out), over)


def sole_trainer(campaign: Campaign, *, enabled: bool = True) -> AbstractContextManager[None]:
    """While it is entered, no other command trains in the directory.

    Two would delete each other's checkpoints. Raises ConfigError if another is at it.
    """
    return run_lock.hold(campaign.store.root, enabled=enabled, name=LOCK_NAME, called="--out")


def make_schedule(
    campaign: Campaign, launcher: Sequence[str] = (), disk_gib: float | None = None
) -> Schedule:
    disk_bytes = None if disk_gib is None else disk_gib * GIB
    return Schedule(campaign.runs, campaign.store, provenance(), launcher, disk_bytes)


def describe(campaign: Campaign, schedule: Schedule) -> list[str]:
    """The plan in lines: runs, what they share, how much of it is done."""
    runs, cells = campaign.runs, campaign.cells
    own = sum(run.last_step - (run.fork.step if run.fork else 0) for run in runs)
    alone = sum(num_steps(cell.cfg) for cell in cells)
    seeds = len({cell.seed for cell in cells})
    forks = sum(run.fork is not None for run in runs)
    return [
        f"{len(cells)} cells of {len(campaign.sweeps)} sweeps, {seeds} seeds: {len(runs)} runs, "
        f"{forks} of them forked from {sum(run.is_trunk for run in runs)} trunks; {own:,} steps "
        f"instead of {alone:,}",
        f"{len(schedule.done)} runs are done; results in {campaign.store.root}",
    ]


def table_of_runs(campaign: Campaign, schedule: Schedule) -> list[str]:
    """A line for each run (`--dry-run`)."""
    names, lines = campaign.names, []
    for run in campaign.runs:
        begin = f"from {run.fork.trunk} at step {run.fork.step:,}" if run.fork else "from scratch"
        saves = f", saves at {', '.join(map(str, run.save_at))}" if run.save_at else ""
        state = "done" if run.key in schedule.done else "to do"
        lines.append(f"{run.key}  {state:5}  {names[run.key]}: {begin} to {run.last_step:,}{saves}")
    return lines


def collect(campaign: Campaign) -> list[Row]:
    """Measure what has finished and write RESULTS; returns the rows of this campaign's sweeps.

    Rows of other sweeps in the same directory, as they were when they last ran, stay in the table.
    """
    rows = measure_cells(campaign.cells, {r.key: r for r in campaign.runs}, campaign.store)
    folder = campaign.store.root / "sweeps"
    for sweep in campaign.sweeps:
        mine = [row for row in rows if row["sweep"] == sweep.name]
        write_json(folder / f"{sweep.name}.json", mine)
    stored: list[Row] = []
    for path in sorted(folder.glob("*.json")):
        stored += json.loads(path.read_text(encoding="utf-8"))
    write_table(stored, campaign.store.root)
    return rows


def judge_all(campaign: Campaign, rows: Sequence[Row]) -> list[Judgement]:
    return [judgement for sweep in campaign.sweeps for judgement in judge(sweep, rows)]


def report(
    campaign: Campaign, rows: Sequence[Row], figures: Path, say: Callable[[str], None]
) -> list[Judgement]:
    """One figure a sweep into `figures`, one sentence a claim through `say`."""
    from bitscale.sweep.figure import draw_sweep

    judgements = []
    for sweep in campaign.sweeps:
        found = judge(sweep, rows)
        judgements += found
        path = figures / f"{sweep.name}.svg"
        draw_sweep(sweep, rows, found, path)
        done = [row for row in rows if row["sweep"] == sweep.name and row["valid_loss"]]
        total = sum(row["sweep"] == sweep.name for row in rows)
        seconds = sum(row["train_seconds"] or 0 for row in done)
        say(
            f"{sweep.name}: {len(done)} of {total} cells, {format_duration(seconds)} of training; "
            f"figure {path}"
        )
        for judgement in found:
            say(f"  {judgement.sentence}")
    return judgements
