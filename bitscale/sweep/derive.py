"""Expressions in a cell's configuration, wherever they stand, replaced by numbers."""

import json
from collections.abc import Iterator
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from bitscale.config import Config, ModelConfig, explain, merge
from bitscale.data.corpus import load_corpus
from bitscale.errors import ConfigError
from bitscale.model import cost
from bitscale.sweep.expression import evaluate, is_expression

Tree = dict[str, Any]
_COUNTS = ("parameters", "ternary_parameters")


class Derivation:
    """One cell's tree while its expressions are evaluated, each after those that it refers to.

    Names in an expression: a configuration key of the cell; `base.` and a key, for its value before
    the cell's own keys; `parameters` and `ternary_parameters` of the cell's model (with `base.`, of
    the model of before); `seed`.
    """

    def __init__(self, tree: Tree, base: Tree, seed: int) -> None:
        self._tree, self._base, self._seed = tree, base, seed
        self._open: list[str] = []  # keys that are being evaluated

    def whole(self) -> Tree:
        """The tree with numbers only. Raises ConfigError, naming the key."""
        for key in list(_expressions(self._tree)):
            self._resolve(key)
        return self._tree

    def _resolve(self, key: str) -> object:
        value = get(self._tree, key)
        if not is_expression(value):
            return value
        if key in self._open:
            raise ConfigError(f"{' -> '.join([*self._open, key])}: goes round in a circle")
        self._open.append(key)
        try:
            number = evaluate(cast(str, value), self._look_up)
        except ConfigError as error:
            if len(self._open) > 1:
                raise
            raise ConfigError(f"{key}: {error}") from None
        finally:
            self._open.pop()
        self._tree = merge(self._tree, nested(key, number))
        return number

    def _look_up(self, name: str) -> object:
        if name == "seed":
            return self._seed
        if name in _COUNTS:
            for key in list(_expressions({"model": self._tree.get("model") or {}})):
                self._resolve(key)
            counts = cost.parameters(_model(self._tree))
            return counts.total if name == "parameters" else counts.matrices
        try:
            if name.startswith("base."):
                base = Derivation(self._base, self._base, self._seed)
                return base._look_up(name.removeprefix("base."))
            return self._resolve(name)
        except KeyError:
            raise ConfigError(
                f"{name!r} is no configuration key; use one (base.KEY for its value before the "
                f"cell's own), {', '.join(_COUNTS)} or seed"
            ) from None


def _expressions(tree: Tree, above: str = "") -> Iterator[str]:
    """Dotted keys whose values are expressions."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _expressions(value, f"{above}{key}.")
        elif is_expression(value):
            yield f"{above}{key}"


def get(tree: Tree, key: str) -> Any:
    """The value of a dotted key: the tree's, or else the schema's default.

    Raises KeyError for a key that no configuration has.
    """
    node: Any = tree
    section: type[BaseModel] | None = Config
    for part in key.split("."):
        field = None if section is None else section.model_fields.get(part)
        if field is None and not (isinstance(node, dict) and part in node):
            raise KeyError(key)
        # Below a section that is null or absent there is nothing.
        node = node.get(part, _default(field)) if isinstance(node, dict) else None
        section = None if field is None else _section_of(field.annotation)
    return node


def _default(field: FieldInfo | None) -> Any:
    if field is None or field.is_required():
        return None
    value = field.default
    return json.loads(value.model_dump_json()) if isinstance(value, BaseModel) else value


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, BaseModel) else None
    inner = (_section_of(argument) for argument in getattr(annotation, "__args__", ()))
    return next((section for section in inner if section is not None), None)


def nested(key: str, value: Any) -> Tree:
    """{"a": {"b": value}} for "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return cast(Tree, value)


def _model(tree: Tree) -> ModelConfig:
    """The model section, with its vocabulary taken from the corpus where it is not given."""
    section = dict(tree.get("model") or {})
    if section.get("vocab_size") is None:
        section["vocab_size"] = load_corpus(tree["data"]["corpora"][0]["path"]).vocab_size
    try:
        return ModelConfig.model_validate_json(json.dumps(section))
    except ValidationError as error:
        raise ConfigError(f"parameters cannot be counted: {explain(error, ModelConfig)}") from error
