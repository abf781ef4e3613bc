"""YAML files, `base:` composition and dotted overrides -> a checked `Config`.

OmegaConf reads and merges (its YAML reads `3e-4` as a number, which plain YAML 1.1 does not);
pydantic validates the merged result, strictly.
"""

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from bitscale.config.checks import check
from bitscale.config.schema import Config
from bitscale.errors import ConfigError

# Exclusive units of one quantity (schema.Point, schema.Span, and the budget in `train`).
_UNITS = {"step", "steps", "tokens", "fraction"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (following `base:`), apply `section.key=value` overrides, validate, check."""
    merged = _read(Path(path), ())
    for text in overrides:
        if "=" not in text:
            raise ConfigError(f"override {text!r} is not of the form section.key=value")
        try:
            merged = _merge(merged, OmegaConf.from_dotlist([text]))
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"override {text!r}: {_first_line(error)}") from error
    try:
        tree = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error
    return parse_config(tree, where=str(path))


def parse_config(tree: object, where: str) -> Config:
    """Validate a plain tree (as read from YAML or a checkpoint) into a checked `Config`."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected sections (run, model, data, ...), got {tree!r:.60}")
    try:
        # JSON mode: lists become tuples, but "12" does not become 12 (strict).
        cfg = Config.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from error
    check(cfg)
    return cfg


def to_tree(cfg: Config) -> dict[str, Any]:
    """The resolved configuration as plain JSON types."""
    tree: dict[str, Any] = json.loads(cfg.model_dump_json(exclude_none=True))
    return tree


def to_yaml(cfg: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal Config."""
    text: str = yaml.safe_dump(to_tree(cfg), sort_keys=False, default_flow_style=None, width=100)
    return text


def config_hash(cfg: Config) -> str:
    """SHA-256 (12 hex digits) over every key that can change the numbers of a run.

    Left out: where it is written, how often it logs and saves, and when this session stops.
    """
    tree = to_tree(cfg)
    for section in ("run", "log", "checkpoint"):
        del tree[section]
    tree["train"].pop("stop_step", None)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def _read(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    if path in seen:
        raise ConfigError(f"{path}: `base:` goes round in a circle")
    try:
        node = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory; name a YAML file") from None
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {_first_line(error)}") from error
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{path}: expected sections (run, model, data, ...) at the top level")
    base = node.pop("base", None)
    if base is None:
        return node
    merged = OmegaConf.create()
    for name in [base] if isinstance(base, str) else list(base):
        merged = _merge(merged, _read(path.parent / name, (*seen, path)))
    return _merge(merged, node)


def _merge(below: DictConfig, above: DictConfig) -> DictConfig:
    """`above` wins key by key; a length given in one unit replaces the other units below it."""
    _drop_other_units(below, above)
    return cast(DictConfig, OmegaConf.merge(below, above))


def _drop_other_units(below: Any, above: DictConfig) -> None:
    if not isinstance(below, DictConfig):
        return
    if any(above.get(unit) is not None for unit in _UNITS if unit in above):
        for unit in _UNITS - set(above):
            below.pop(str(unit), None)
    for key, value in above.items():
        if isinstance(value, DictConfig) and key in below:
            _drop_other_units(below[key], value)


def _explain(error: ValidationError) -> str:
    first, *rest = error.errors(include_url=False)
    key = ".".join(str(part) for part in first["loc"]) or "configuration"
    more = f" (and {len(rest)} more)" if rest else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_did_you_mean(first['loc'])}{more}"
    if first["type"] == "missing":
        return f"{key} is missing; set it in the file or with {key}=VALUE{more}"
    shown = json.dumps(first["input"], default=str)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{key}={shown}: {first['msg'].removeprefix('Value error, ')}{more}"


def _did_you_mean(location: tuple[int | str, ...]) -> str:
    """' (did you mean ...?)' from the fields of the section in which the key stands."""
    section: type[BaseModel] = Config
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
