"""A table of results as rows and columns."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitscale.errors import DataError
from bitscale.fit.laws import Floats

Row = dict[str, Any]
TABLE_NAME = "RESULTS"
_TEXTS = {"sweep", "label", "hash", "status", "trunk", "commit"}  # 12e34 is a hash, no number


def read_table(path: Path) -> list[Row]:
    """Rows of a RESULTS.parquet or .csv, or of the directory that holds one.

    In a CSV numbers are recognized by their looks, empty fields are None. Raises DataError.
    """
    if path.is_dir():
        path = path / f"{TABLE_NAME}.parquet"
    if not path.is_file():
        raise DataError(f"{path} does not exist; name a RESULTS.parquet or .csv, or its directory")
    if path.suffix == ".csv":
        return _read_csv(path)
    import pyarrow
    from pyarrow import parquet

    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
        return rows
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no parquet file: {str(error).splitlines()[0]}") from None


def _read_csv(path: Path) -> list[Row]:
    try:
        # Spreadsheets begin a CSV in UTF-8 with a byte-order mark.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows: list[Row] = []
            for row in reader:
                if None in row:
                    raise DataError(
                        f"{path}, line {reader.line_num}: more fields than the first line has "
                        "names; mend it (a decimal comma needs quotes)"
                    )
                rows.append({name: _parsed(name, text) for name, text in row.items()})
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not readable as CSV in UTF-8 ({error}); save it so") from error


def _parsed(name: str, text: str | None) -> Any:
    if text is None or text == "":
        return None
    if name in _TEXTS:
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def number(value: object) -> float:
    """`value` if it is a number, else NaN."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan  # type: ignore[arg-type]


def columns_of(rows: Sequence[Row], names: Sequence[str]) -> tuple[list[Row], dict[str, Floats]]:
    """The rows that have a finite number in every column of `names`, and those columns.

    Raises DataError for a column that no row has.
    """
    for name in names:
        if not any(name in row for row in rows):
            have = ", ".join(sorted({key for row in rows for key in row}))
            raise DataError(f"the table has no column {name!r}; it has {have}")
    whole = [row for row in rows if all(math.isfinite(number(row.get(name))) for name in names)]
    return whole, {name: np.array([number(row[name]) for row in whole]) for name in names}
