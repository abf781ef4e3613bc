"""The embedded corpus `builtin:python-docs`: documentation shipped with the running Python.

The language reference's topics (`pydoc_data.topics`) and the docstrings of the standard library,
read from its source files without importing them. English prose with code; the same Python gives
the same documents. About 2 MB: enough to try everything without a download, too little to train
anything useful.
"""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

NAME = "builtin:python-docs"

# Tests are not prose, the others are not the standard library or not in every installation.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages"}
)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class DocumentationFile(NamedTuple):
    """A source file of the corpus: the topics, or one module of the standard library."""

    path: Path
    module: str
    num_bytes: int


@lru_cache(maxsize=1)
def documentation_files() -> tuple[DocumentationFile, ...]:
    """The files in a fixed order: the topics first (where present), then modules by name."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = [
        DocumentationFile(path, _module_name(path.relative_to(root)), path.stat().st_size)
        for path in root.rglob("*.py")
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts) and path != _topics_path()
    ]
    modules.sort(key=lambda file: file.module)
    topics = _topics_path()
    if topics is None:
        return tuple(modules)
    return (DocumentationFile(topics, "pydoc_data.topics", topics.stat().st_size), *modules)


def has_topics() -> bool:
    """Whether this Python ships `pydoc_data.topics`; some distributions leave it out."""
    return _topics_path() is not None


def read_documents(file: DocumentationFile) -> Iterator[str]:
    """One document per topic, or one for all docstrings of a module (none if it has none)."""
    source = file.path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the library's own sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and deliberately broken files
        return
    if file.path == _topics_path():
        yield from _topics(tree)
    elif document := _module_document(file.module, tree):
        yield document


def _topics(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        value = getattr(node, "value", None)
        if isinstance(value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(value)
            for name in sorted(topics):
                yield topics[name].strip() + "\n"


def _module_document(module: str, tree: ast.Module) -> str:
    paragraphs = [f"{module}\n\n{docstring}" if (docstring := ast.get_docstring(tree)) else ""]
    paragraphs += _definitions(tree, prefix="")
    text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    return text + "\n" if text else ""


def _definitions(parent: ast.AST, prefix: str) -> Iterator[str]:
    """`name(arguments)` and docstring of every documented class and function, in source order."""
    for node in ast.iter_child_nodes(parent):
        if not isinstance(node, Definition):
            yield from _definitions(node, prefix)
            continue
        name = f"{prefix}{node.name}"
        if docstring := ast.get_docstring(node):
            yield f"{_signature(name, node)}\n\n{docstring}"
        yield from _definitions(node, prefix=f"{name}.")


def _signature(name: str, node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"{name}({ast.unparse(node.args)})"


@lru_cache(maxsize=1)
def _topics_path() -> Path | None:
    try:
        spec = importlib.util.find_spec("pydoc_data.topics")
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
