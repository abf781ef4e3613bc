"""The tokenizer beside an export."""

import shutil
from pathlib import Path

from bitscale.convert.model_source import ModelSource


def copy_tokenizer(source: ModelSource, out: Path) -> str | None:
    """Name of the copied file; None if the corpus has moved since the run."""
    if source.tokenizer_file is None or not source.tokenizer_file.is_file():
        return None
    shutil.copyfile(source.tokenizer_file, out / source.tokenizer_file.name)
    return source.tokenizer_file.name
