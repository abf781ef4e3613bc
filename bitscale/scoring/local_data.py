"""lm-eval's tasks on local jsonl files in place of the Hugging Face hub.

A file is either what the data set itself has (a row an item, with the columns that the task reads:
`datasets.load_dataset(...)["validation"].to_json(path)` writes it), or one of MosaicML's
llm-foundry (scripts/eval/local_data: query, choices, gold). Rows of the latter are turned back
into the data set's columns, so that the prompts are lm-eval's own in any case.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitscale.errors import DataError

Row = dict[str, Any]
LETTERS = "ABCDEFGH"

# Columns that a task's prompt and metric read, by lm-eval's names of tasks.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "piqa": ("goal", "sol1", "sol2", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
    "sciq": ("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer"),
    "arc_easy": ("question", "choices", "answerKey"),
    "copa": ("premise", "question", "choice1", "choice2", "label"),
    "rte": ("sentence1", "sentence2", "label"),
    "cb": ("premise", "hypothesis", "label"),
    "mrpc": ("sentence1", "sentence2", "label"),
    "sst2": ("sentence", "label"),
}
# Other names that a task's file may have.
_ALIASES = {"openbookqa": ("openbook_qa",)}


def find_files(directory: Path, tasks: Sequence[str]) -> dict[str, Path]:
    """{task: its jsonl file}. DataError if `directory` has none for some, naming all of them."""
    if not directory.is_dir():
        raise DataError(f"--data-dir {directory} is no directory; name one with TASK.jsonl files")
    unknown = [task for task in tasks if task not in COLUMNS]
    if unknown:
        raise DataError(
            f"--data-dir holds data for {', '.join(COLUMNS)} only, not for {', '.join(unknown)}; "
            "leave --data-dir out for it (lm-eval then asks the Hugging Face hub)"
        )
    found: dict[str, Path] = {}
    for task in tasks:
        for name in (task, *_ALIASES.get(task, ())):
            if (file := directory / f"{name}.jsonl").is_file():
                found[task] = file
    missing = [task for task in tasks if task not in found]
    if missing:
        there = f"--tasks {','.join(found)}" if found else "other --tasks"
        raise DataError(
            f"--data-dir {directory} has no {', '.join(f'{task}.jsonl' for task in missing)}; put "
            f"them there (docs/evaluation.md has the columns), or ask for {there}"
        )
    return found


def read_rows(task: str, path: Path) -> list[Row]:
    """The items of a file, in the columns of the task's data set.

    Raises DataError for a file that is not jsonl, or has neither these columns nor llm-foundry's.
    """
    rows: list[Row] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_row(task, path, number, json.loads(line)))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not readable as one JSON object a line: {error}; mend it"
        ) from error
    if not rows:
        raise DataError(f"{path} has no items; write one JSON object a line")
    return rows


def _row(task: str, path: Path, number: int, row: Any) -> Row:
    columns = COLUMNS[task]
    if isinstance(row, dict) and all(column in row for column in columns):
        return row
    convert = _FROM_FOUNDRY.get(task)
    if convert is not None and isinstance(row, dict):
        try:
            return convert(row)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            pass
    other = "" if convert is None else ", or llm-foundry's query, choices and gold"
    raise DataError(
        f"{path}, line {number}: {task} needs the columns {', '.join(columns)}{other}; write them, "
        "for example with datasets.load_dataset(...)['validation'].to_json(path)"
    )


def _piqa(row: Row) -> Row:
    goal = row["query"].removeprefix("Question: ").removesuffix("\n")
    first, second = row["choices"]
    return {"goal": goal, "sol1": first, "sol2": second, "label": row["gold"]}


def _lettered(row: Row) -> Row:
    letters = list(LETTERS[: len(row["choices"])])
    choices = {"text": row["choices"], "label": letters}
    return {"choices": choices, "answerKey": letters[row["gold"]]}


def _arc(row: Row) -> Row:
    return {"question": row["query"].removeprefix("Question: ")} | _lettered(row)


def _openbookqa(row: Row) -> Row:
    return {"question_stem": row["query"]} | _lettered(row)


def _copa(row: Row) -> Row:
    premise, connector = row["query"].strip().rsplit(" ", 1)
    question = {"because": "cause", "therefore": "effect"}[connector]
    first, second = row["choices"]
    # The task itself drops the last character of a premise, its full stop.
    return {
        "premise": premise.removesuffix(",") + ".",
        "question": question,
        "choice1": first,
        "choice2": second,
        "label": row["gold"],
    }


def _winogrande(row: Row) -> Row:
    """Any common beginning may stand before the gap: the task puts the contexts together again."""
    first, second = row["context_options"]
    pairs = zip(first, second, strict=False)
    length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if "_" in first[:length]:
        raise ValueError("the gap of the task's own format")
    return {
        "sentence": f"{first[:length]}_ {row['continuation']}",
        "option1": first[length:],
        "option2": second[length:],
        "answer": "12"[row["gold"]],
    }


_FROM_FOUNDRY: Mapping[str, Callable[[Row], Row]] = {
    "piqa": _piqa,
    "winogrande": _winogrande,
    "openbookqa": _openbookqa,
    "arc_easy": _arc,
    "copa": _copa,
}
