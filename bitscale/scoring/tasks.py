"""lm-eval's tasks: which, on which data, and what a model scores on them."""

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitscale.errors import DataError
from bitscale.scoring.local_data import COLUMNS, find_files, read_rows
from bitscale.scoring.model import ScoredModel

GROUP = "bitscale_olmo11"
# Where lm-eval keeps the group's tasks: reading the index of all 14,000 takes many seconds.
_FOLDERS = ("piqa", "hellaswag", "winogrande", "openbookqa", "sciq", "arc", "super_glue", "glue")
_FEWSHOT_SEED = 1234  # lm-eval's own default
_BOOTSTRAPS = 1000  # of metrics whose standard error has no formula (f1)


@dataclass(frozen=True)
class TaskScore:
    """What one model scored on one task."""

    version: str  # of the task
    num_items: int
    values: Mapping[str, float]  # by metric
    stderrs: Mapping[str, float]  # NaN where lm-eval gives none
    items: Mapping[str, tuple[float, ...]]  # of each item, for metrics that are means of these
    data_sha256: str | None  # of the local file; None: from the hub

    def difference(self, first: "TaskScore", metric: str) -> tuple[float, float] | None:
        """More than `first`, and the standard error of that, item by item; None: not the same
        items, or no mean of items."""
        ours, theirs = self.items.get(metric), first.items.get(metric)
        if ours is None or theirs is None or len(ours) != len(theirs):
            return None
        return mean_stderr([a - b for a, b in zip(ours, theirs, strict=True)])


def mean_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (sample variance); NaN for one value."""
    num = len(values)
    mean = sum(values) / num
    if num < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (num - 1) / num)


def load_tasks(names: Sequence[str], data_dir: Path | None) -> dict[str, Any]:
    """{name: lm-eval's task} of tasks and groups of tasks; data of `data_dir`, or of the hub.

    Raises DataError for a name that lm-eval does not know, and for data that is not there.
    """
    if data_dir is None:
        manager = _manager(names)
        return {name: task for each in names for name, task in _from_hub(manager, each).items()}
    wanted = _leaves(names)
    files = find_files(data_dir, wanted)
    manager = _manager(names)
    tasks: dict[str, Any] = {}
    for name in wanted:
        # A group is lm-eval's way to override keys of a task that it knows.
        local = {"task": name, "custom_dataset": _Local(name, files[name]), "dataset_kwargs": {}}
        tasks |= manager.load({"group": f"local_{name}", "task": [local]})["tasks"]
    return tasks


@dataclass(frozen=True)
class _Local:
    """A task's data, as lm-eval asks for it."""

    task: str
    path: Path

    def __call__(self, **metadata: Any) -> dict[str, Any]:
        from datasets import Dataset

        rows = Dataset.from_list(read_rows(self.task, self.path))
        return {"train": rows, "validation": rows, "test": rows}  # whichever it evaluates


def _leaves(names: Sequence[str]) -> list[str]:
    every = [task for name in names for task in (COLUMNS if name == GROUP else (name,))]
    return list(dict.fromkeys(every))


def _manager(names: Sequence[str]) -> Any:
    try:
        from lm_eval import tasks as lm_eval_tasks
    except ImportError as error:
        raise DataError(
            "--tasks needs lm-eval, which is not installed; pip install 'bitscale[eval]'"
        ) from error
    # Its warnings about every default that is taken are no news.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    ours = Path(__file__).parent
    theirs = Path(lm_eval_tasks.__file__).parent
    known = all(name in COLUMNS or name == GROUP for name in names)
    manager = lm_eval_tasks.TaskManager(
        include_path=[*(theirs / name for name in _FOLDERS if known), ours],
        include_defaults=not known,
    )
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise DataError(
            f"lm-eval {version('lm-eval')} has no task {', '.join(map(repr, unknown))}; "
            f"`lm-eval ls tasks` lists them, and {GROUP} is bitscale's group of {len(COLUMNS)}"
        )
    return manager


def _from_hub(manager: Any, name: str) -> dict[str, Any]:
    try:
        tasks: dict[str, Any] = manager.load([name])["tasks"]
    except (OSError, ValueError) as error:  # what datasets and huggingface_hub raise
        reason = " ".join(str(error).split())[:150]
        raise DataError(
            f"{name}: its data cannot be had from the Hugging Face hub ({reason}); name local "
            "files with --data-dir DIR (docs/evaluation.md)"
        ) from error
    return tasks


def score_tasks(
    scored: ScoredModel,
    tasks: Mapping[str, Any],
    *,
    tokenizer: Any,
    batch_size: int,
    limit: int | None,
) -> dict[str, TaskScore]:
    """What the model scores on lm-eval's `tasks`, zero-shot but where a task says otherwise (a
    collective of all ranks)."""
    # Not simple_evaluate, which spends a minute on a description of the machine.
    from lm_eval.evaluator import evaluate

    from bitscale.scoring.lm_eval_model import BitscaleLM

    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    found = evaluate(
        BitscaleLM(scored, tokenizer, batch_size),
        {"tasks": dict(tasks)},
        limit=limit,
        log_samples=True,
        bootstrap_iters=_BOOTSTRAPS,
    )
    return {name: _task_score(name, task, found) for name, task in tasks.items()}


def _task_score(name: str, task: Any, found: Mapping[str, Any]) -> TaskScore:
    # Keys are METRIC,FILTER and METRIC_stderr,FILTER.
    figures = {
        key.removesuffix(",none"): value
        for key, value in found["results"][name].items()
        if isinstance(value, int | float | str) and key.endswith(",none")
    }
    values = {key: float(v) for key, v in figures.items() if not key.endswith("_stderr")}
    stderrs = {key: figures.get(f"{key}_stderr", math.nan) for key in values}
    samples = found["samples"][name]
    items = {
        key: tuple(float(sample[key]) for sample in samples)
        for key in values
        if all(isinstance(sample.get(key), int | float) for sample in samples)
    }
    local = task.config.custom_dataset
    return TaskScore(
        version=str(found["versions"].get(name, "unknown")),
        num_items=len(samples),
        values=values,
        stderrs={key: v if isinstance(v, float) else math.nan for key, v in stderrs.items()},
        items=items,
        data_sha256=_sha256(local.path) if isinstance(local, _Local) else None,
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
