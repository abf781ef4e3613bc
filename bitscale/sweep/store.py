"""Where a sweep's runs are, which of them are done, and what is kept of them.

OUT/runs/KEY/            a run directory as `bitscale train` writes it, KEY its configuration's hash
OUT/runs/KEY/log.txt     what it printed
OUT/runs/KEY/done.json   written last: how it ended
OUT/sweeps/NAME.json     which runs belong to a sweep, as what
OUT/RESULTS.parquet, .csv
OUT/corpora.json         on which text the runs were trained
OUT/sweep.lock           held by the command that trains here
"""

import json
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bitscale import checkpoint, run_lock
from bitscale.config import num_steps
from bitscale.data.corpus import load_corpus
from bitscale.errors import ConfigError
from bitscale.plan.memory import state_bytes
from bitscale.recorder import METRICS_NAME, read_lines
from bitscale.sweep.trunks import Run

DONE_NAME = "done.json"
LOG_NAME = "log.txt"
LOCK_NAME = "sweep.lock"
FINISHED, DIVERGED = "finished", "diverged"


class Store(NamedTuple):
    root: Path

    def run_dir(self, key: str) -> Path:
        return self.root / "runs" / key

    def log(self, key: str) -> Path:
        return self.run_dir(key) / LOG_NAME

    def checkpoint(self, key: str, step: int) -> Path:
        return self.run_dir(key) / "checkpoints" / f"step-{step:08d}"

    def has_checkpoint(self, key: str, step: int) -> bool:
        return (self.checkpoint(key, step) / "meta.json").is_file()

    def done(self, key: str) -> dict[str, Any] | None:
        """How a run ended, or None: it has not, or was stopped on the way."""
        path = self.run_dir(key) / DONE_NAME
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return content
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ConfigError(f"{path} is damaged ({error}); delete it to train it again") from None

    def finish(self, key: str, content: Mapping[str, Any]) -> None:
        write_json(self.run_dir(key) / DONE_NAME, content)

    def is_in_use(self, key: str) -> bool:
        """Whether a process trains in the run's directory now."""
        return run_lock.is_held(self.run_dir(key))

    def last_step(self, key: str) -> int:
        """Steps that a run has recorded; 0 before it began."""
        path = self.run_dir(key) / METRICS_NAME
        if not path.is_file():
            return 0
        return max((line["step"] for _, _, line in read_lines(path)), default=0)

    def log_tail(self, key: str, lines: int = 12) -> list[str]:
        path = self.log(key)
        return path.read_text(errors="replace").splitlines()[-lines:] if path.is_file() else []

    def saved_bytes(self, key: str) -> int:
        """That the checkpoints of a run take now."""
        total = 0
        for path in (self.run_dir(key) / "checkpoints").rglob("*"):
            with suppress(FileNotFoundError):  # a job of an earlier command may delete them
                total += path.stat().st_size
        return total

    def check_corpora(self, runs: Collection[Run]) -> None:
        """Note the corpora of `runs`, before anything is trained.

        Raises DataError for one that is not there, and ConfigError if another text lies where that
        of earlier runs lay: they have the same hash, and are not the same runs.
        """
        path = self.root / "corpora.json"
        known: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}
        for name in sorted({corpus.path for run in runs for corpus in run.cfg.data.corpora}):
            fingerprint = load_corpus(name).fingerprint
            if known.setdefault(name, fingerprint) != fingerprint:
                raise ConfigError(
                    f"{name} is not the corpus that the runs in {self.root} were trained on (its "
                    "fingerprint differs); choose another --out, or prepare that one again"
                )
        write_json(path, known)


def write_json(path: Path, content: object) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial")
    staging.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    staging.replace(path)


class Start(NamedTuple):
    """How a run is started now."""

    resume: str | None  # as `bitscale train --resume` takes it
    allow_change: tuple[str, ...]


def checkpoint_bytes(run: Run) -> int:
    """Of one checkpoint of the run."""
    m = run.cfg.model
    if m.vocab_size is None:
        corpus = load_corpus(run.cfg.data.corpora[0].path)
        m = m.model_copy(update={"vocab_size": corpus.vocab_size})
    return state_bytes(run.cfg.optim, m)


def missing_saves(store: Store, run: Run, needed: Collection[int]) -> list[int]:
    """Steps that others still begin at and that are not on the disk."""
    return sorted(step for step in needed if not store.has_checkpoint(run.key, step))


def prepare_start(store: Store, run: Run, needed: Collection[int], trunk: Run | None) -> Start:
    """Decide where `run` goes on from, and clear away what it cannot go on from."""
    allowed = ("quant",) if trunk is not None and trunk.cfg.quant != run.cfg.quant else ()
    root = store.run_dir(run.key) / "checkpoints"
    own = checkpoint.list_checkpoints(root) if root.is_dir() else []
    missing = missing_saves(store, run, needed)
    usable = [path for path in own if not missing or _step(path) <= missing[0]]
    if usable and usable == own:
        return Start("auto", allowed)
    if usable:  # it is past a step at which others are to begin: those steps again
        return Start(str(usable[-1]), allowed)
    clear(store, run.key)
    if run.fork is None:
        return Start(None, allowed)
    return Start(str(store.checkpoint(*run.fork)), allowed)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def clear(store: Store, key: str) -> None:
    """Remove what a run left, but for its log, and its lock: a new file would not be locked."""
    directory = store.run_dir(key)
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.name not in (LOG_NAME, run_lock.LOCK_NAME):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def prune(store: Store, run: Run, needed: Collection[int]) -> None:
    """Delete the checkpoints of a finished run, but for those at `needed` and one to keep."""
    root = store.run_dir(run.key) / "checkpoints"
    if not root.is_dir():
        return
    paths = checkpoint.list_checkpoints(root)
    if run.keep == "last":
        paths = paths[:-1]
    doomed = [path for path in paths if _step(path) not in needed]
    if len(doomed) == len(checkpoint.list_checkpoints(root)):
        shutil.rmtree(root)
        return
    for path in doomed:
        aside = path.with_name(f".{path.name}.deleted")  # a kill leaves nothing that looks whole
        path.rename(aside)
        shutil.rmtree(aside)


def adopt_finished(store: Store, run: Run, provenance: Mapping[str, Any]) -> bool:
    """Whether the run is done; one that was trained by hand is marked so (of no known commit)."""
    if store.done(run.key) is not None:
        return True
    if run.last_step == num_steps(run.cfg) and _says_finished(store, run.key):
        store.finish(run.key, {"status": FINISHED, **provenance, "commit": None})
        return True
    return False


def _says_finished(store: Store, key: str) -> bool:
    path = store.run_dir(key) / METRICS_NAME
    return path.is_file() and any(
        line.get("event") == "finished" for _, _, line in read_lines(path)
    )
