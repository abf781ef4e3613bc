"""YAML files, `base:` composition and dotted overrides -> a checked `Config`.

OmegaConf reads and merges (its YAML reads `3e-4` as a number, which plain YAML 1.1 does not);
pydantic validates the merged result, strictly.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from bitscale.config.checks import check
from bitscale.config.interpolation import check_interpolations
from bitscale.config.presets import preset as named
from bitscale.config.schema import Config, QuantConfig
from bitscale.errors import ConfigError

_Location = tuple[int | str, ...]  # keys and positions in lists, from the top
# Keys that older checkpoints lack, and the value that they mean.
_LATER_KEYS = {"model.post_norm": "false"}
# Exclusive units of one quantity (schema.Point, schema.Span, and the budget in `train`).
_UNITS = {"step", "steps", "tokens", "fraction"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (following `base:`), apply `section.key=value` overrides, validate, check."""
    tree = override(read_tree(path), overrides)
    return parse_config(interpolate(tree, where=str(path)), where=str(path))


def read_tree(path: str | Path) -> dict[Any, Any]:
    """The tree of `path` merged over its bases: not validated, `${...}` as it stands."""
    return _read(Path(path), ())


def interpolate(tree: dict[Any, Any], where: str) -> dict[Any, Any]:
    """`tree` with every `${section.key}` replaced by what it refers to."""
    check_interpolations(tree, where)
    try:
        return cast(dict[Any, Any], OmegaConf.to_container(OmegaConf.create(tree), resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from error


def override(tree: dict[Any, Any], overrides: Sequence[str]) -> dict[Any, Any]:
    """`tree` with dotted overrides (`section.key=value`) merged on top, not validated."""
    merged = tree
    for text in overrides:
        if "=" not in text:
            raise ConfigError(f"override {text!r} is not of the form section.key=value")
        try:
            above = cast(dict[Any, Any], OmegaConf.to_container(OmegaConf.from_dotlist([text])))
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
            raise ConfigError(f"override {text!r}: {_first_line(error)}") from error
        merged = merge(merged, above)
    return merged


def parse_config(tree: object, where: str) -> Config:
    """Validate a plain tree (as read from YAML or a checkpoint) into a checked `Config`."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected sections (run, model, data, ...), got {tree!r:.60}")
    try:
        # JSON mode: lists become tuples, but "12" does not become 12 (strict).
        cfg = Config.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, Config)}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from error
    check(cfg)
    return cfg


def quant_config(preset: str) -> QuantConfig:
    """The section `quant: {preset: ...}`. ConfigError for an unknown preset."""
    named(preset)  # its message lists the presets
    return QuantConfig.model_validate({"preset": preset})


def to_tree(cfg: Config) -> dict[str, Any]:
    """The resolved configuration as plain JSON types."""
    tree: dict[str, Any] = json.loads(cfg.model_dump_json(exclude_none=True))
    return tree


def section_items(cfg: Config, *sections: str) -> dict[str, str]:
    """Every key of `sections` that is set, with its value as JSON: for comparing runs."""
    tree = to_tree(cfg)
    items = {
        f"{section}.{key}": json.dumps(value, sort_keys=True)
        for section in sections
        for key, value in tree[section].items()
    }
    return {key: value for key, value in items.items() if _LATER_KEYS.get(key) != value}


def to_yaml(cfg: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal Config."""
    text: str = yaml.dump(
        to_tree(cfg), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100
    )
    return text


class _Dumper(yaml.SafeDumper):
    """Also quotes strings such as 1e3, which OmegaConf's YAML reads as numbers."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9_.]+[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def config_hash(cfg: Config) -> str:
    """SHA-256 (12 hex digits) over every key that can change the numbers of a run.

    Left out: where it is written, how often it logs and saves, how it is watched, and when this
    session stops.
    """
    tree = to_tree(cfg)
    for section in ("run", "log", "checkpoint", "watch"):
        del tree[section]
    tree["train"].pop("stop_step", None)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def _read(path: Path, seen: tuple[Path, ...]) -> dict[Any, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base:` goes round in a circle")
    tree = read_yaml(path)
    base = tree.pop("base", None)
    names = [] if base is None else base if isinstance(base, list) else [base]
    merged: dict[Any, Any] = {}
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(f"{path}: base={base!r}: expected a file name or a list of them")
        merged = merge(merged, _read(path.parent / name, (*seen, path.resolve())))
    return merge(merged, tree)


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping in one file, read as OmegaConf does (`3e-4` is a number)."""
    try:
        node = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory; name a YAML file") from None
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {_first_line(error)}") from error
    tree = OmegaConf.to_container(node)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections (run, model, data, ...) at the top level")
    return tree


def merge(below: dict[Any, Any], above: dict[Any, Any]) -> dict[Any, Any]:
    """`above` wins key by key; a length given in one unit replaces the other units below it.

    Lists are replaced whole.
    """
    merged = dict(below)
    if any(above.get(unit) is not None for unit in _UNITS):
        merged = {key: value for key, value in below.items() if key not in _UNITS}
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = merge(old, value)
        merged[key] = value
    return merged


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line on what is wrong with a tree that was to be a `root`: key, value, remedy."""
    found: dict[_Location, list[ErrorDetails]] = {}
    for each in error.errors(include_url=False):
        found.setdefault(_fields(each, root), []).append(each)
    # A key that may be a section or a word complains as both: the section's complaint says more.
    deepest = [key for key in found if not any(k[: len(key)] == key != k for k in found)]
    # Unknown keys first: a misspelt key is also a missing one, and the spelling is the cause.
    location, *rest = sorted(deepest, key=lambda k: found[k][0]["type"] != "extra_forbidden")
    first, *alternatives = found[location]
    key = ".".join(str(part) for part in location) if location else "configuration"
    more = f" (and {len(rest)} more)" if rest else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_did_you_mean(location, root)}{more}"
    if first["type"] == "missing":
        in_list = any(isinstance(part, int) for part in location)
        remedy = "set it in the file" + ("" if in_list else f" or with {key}=VALUE")
        return f"{key} is missing; {remedy}{more}"
    shown = json.dumps(first["input"], default=str)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    wanted = [first["msg"].removeprefix("Value error, ")]
    wanted += [other["msg"].removeprefix("Input should be ") for other in alternatives]
    return f"{key}={shown}: {', or '.join(wanted)}{more}"


def _fields(error: ErrorDetails, root: type[BaseModel]) -> _Location:
    """Where the error is, without the names that pydantic gives to a key's alternatives."""
    section: type[BaseModel] | None = root
    location: list[int | str] = []
    for part in error["loc"]:
        fields = {} if section is None else section.model_fields
        if isinstance(part, str) and part in fields:
            section = _section_of(fields[part].annotation)
            location.append(part)
        elif isinstance(part, int):
            location.append(part)
    if error["type"] == "extra_forbidden":
        location.append(error["loc"][-1])
    return tuple(location)


def _did_you_mean(location: _Location, root: type[BaseModel]) -> str:
    """' (did you mean ...?)' from the fields of the section in which the key stands."""
    section = root
    for part in location[:-1]:
        if not isinstance(part, str):
            continue
        field = section.model_fields.get(part)
        inner = _section_of(field.annotation) if field else None
        if inner is None:
            return ""
        section = inner
    names = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {'.'.join([*map(str, location[:-1]), close[0]])!r}?"
    return f"; this section has: {', '.join(names)}"


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_of(argument)
        if found is not None:
            return found
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(line.strip() for line in lines[:3]) if lines else type(error).__name__
