"""Write docs/configuration.md: every key of the schema, its type, default and meaning.

    python tools/document_config.py

Types and defaults come from pydantic, meanings from the comments in bitscale/config/schema.py: the
one on a field's line, or the ones directly above it.
"""

import inspect
import json
import re
from pathlib import Path
from typing import Any

from bitscale.config import Config, schema

TARGET = Path(__file__).parents[1] / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

Written by `python tools/document_config.py` from `bitscale/config/schema.py`; a test compares.

A run is one YAML file with the sections below, and dotted overrides on the command line:

    bitscale train configs/quickstart.yaml train.steps=200 transition.at.fraction=0.5
    bitscale config --show configs/quickstart.yaml train.steps=200

- `base: FILE` or `base: [FILE, FILE]` puts a file over others; paths are relative to the file.
  Key by key, the file wins over its bases, a later base over an earlier one, an override over all.
- Lists are replaced whole: `'data.corpora=[{path: a}, {path: b, weight: 2.0}]'`.
- A point or span of the run is given in one unit; giving another unit replaces the one below.
- `${section.key}` refers to another key, after merging; `${oc.env:SCRATCH}` to a variable, of those
  that hold no secret ([safety](safety.md)). Nothing else in `${}` is run.
- Nothing is converted: `64.0` is no integer and `"3e-4"` no number (but `3e-4` is one).
- Every key is checked, alone and together with the others, before anything is started
  (`bitscale/config/checks.py`). The resolved configuration is in `RUN/config.yaml` and in every
  checkpoint; its hash covers every key that can change the numbers of a run: all but `run`, `log`,
  `checkpoint`, `watch` and `train.stop_step`.
"""


def main() -> None:
    TARGET.write_text(render(), encoding="utf-8")
    print(f"wrote {TARGET}")


def render() -> str:
    """The whole document."""
    tree = Config.model_json_schema()
    shapes = dict(tree["$defs"])
    sections = {name: _reference(prop) for name, prop in tree["properties"].items()}
    parts = [INTRODUCTION]
    for section, model in sections.items():
        parts.append(f"## `{section}`\n\n{_table(model, shapes, f'{section}.')}")
    parts.append("## Shapes that several keys have\n")
    for model in shapes.keys() - set(sections.values()):
        parts.append(f"### {model}\n\n{_table(model, shapes, '.')}")
    head, tail = parts[: 2 + len(sections)], sorted(parts[2 + len(sections) :])
    return "\n".join([*head, *tail])


def _table(model: str, shapes: dict[str, Any], prefix: str) -> str:
    shape, notes = shapes[model], meanings(model)
    intro = f"{shape['description']}\n\n" if "description" in shape else ""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, prop in shape["properties"].items():
        default = "**required**"
        if "default" in prop:
            default = f"`{json.dumps(_without_nulls(prop['default']))}`"
        cells = (f"`{prefix}{key}`", _type(prop), default, notes[key])
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return intro + "\n".join(rows) + "\n"


def meanings(model: str) -> dict[str, str]:
    """{field: comment} of a class in schema.py."""
    found, above = {}, list[str]()
    for line in inspect.getsource(getattr(schema, model)).splitlines():
        if field := re.match(r"    (\w+): [^#]*?(?:  # (.*))?$", line):
            found[field[1]] = " ".join([*above, field[2]] if field[2] else above)
        comment = re.match(r"    # (.*)$", line)
        above = [*above, comment[1]] if comment else []
    return found


def _type(prop: dict[str, Any]) -> str:
    if "anyOf" in prop:
        return " or ".join(_type(choice) for choice in prop["anyOf"])
    if name := _reference(prop):
        return f"[{name}](#{name.lower()})"
    if "enum" in prop or "const" in prop:
        return ", ".join(f"`{choice}`" for choice in prop.get("enum", [prop.get("const")]))
    if prop["type"] == "array":
        items = prop.get("prefixItems") or [prop["items"]]
        return f"list of {_type(items[0])}" + (f", {len(items)} of them" if len(items) > 1 else "")
    limits = {
        "exclusiveMinimum": ">",
        "minimum": ">=",
        "exclusiveMaximum": "<",
        "maximum": "<=",
    }
    bounds = [f"{sign} {prop[name]:g}" for name, sign in limits.items() if name in prop]
    return " ".join([prop["type"], ", ".join(bounds)]).strip()


def _reference(prop: dict[str, Any]) -> str:
    inner = prop.get("allOf", [prop])[0]  # so pydantic before 2.9 wraps a reference with default
    return str(inner.get("$ref", "")).rpartition("/")[2]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return value


if __name__ == "__main__":
    main()
