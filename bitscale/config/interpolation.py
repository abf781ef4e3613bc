"""What `${...}` in a configuration may do: name another key, or read a harmless variable.

The resolved configuration is written into the run's directory and every checkpoint, and is read by
every rank: a variable that holds a secret must not get there, and one that other hosts do not have
would give them another configuration. OmegaConf's other resolvers (and those that a library may
have registered) are not run at all.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser as Grammar
from omegaconf.grammar_parser import parse

from bitscale.environment import is_allowed
from bitscale.errors import ConfigError

# Set by the login or the scheduler of every host, beside those that launchers hand on.
_READABLE = ("HOME", "USER", "SCRATCH", "SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID")


def check_interpolations(tree: object, where: str) -> None:
    """Raise ConfigError for a `${...}` in `tree` that is neither a key nor a readable variable."""
    for key, text in _strings(tree, ""):
        if "${" not in text:
            continue
        try:
            found = list(_resolvers(parse(text)))
        except OmegaConfBaseException:
            continue  # malformed: resolving says so
        for name, arguments, shown in found:
            variable = arguments.partition(",")[0].strip()
            if name != "oc.env":
                raise ConfigError(
                    f"{where}: {key}: {shown!a} is not run: a configuration refers to keys "
                    "(${section.key}) and to ${oc.env:NAME}, nothing else; write the value"
                )
            if variable not in _READABLE and not is_allowed(variable):
                raise ConfigError(
                    f"{where}: {key}: {shown!a} would put that variable into checkpoints; only "
                    f"{', '.join(_READABLE)} and those of `bitscale doctor --print-environment` "
                    "are read: write the value"
                )


def _strings(tree: object, key: str) -> Iterator[tuple[str, str]]:
    """Every string of a plain tree, with its dotted key."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _strings(value, f"{key}.{name}".lstrip("."))
    elif isinstance(tree, Sequence):
        for index, value in enumerate(tree):
            yield from _strings(value, f"{key}[{index}]")


def _resolvers(node: Any) -> Iterator[tuple[str, str, str]]:
    """Name, arguments and text of every call of a resolver, nested ones too."""
    children = getattr(node, "children", None) or []
    if isinstance(node, Grammar.InterpolationResolverContext):
        parts = {type(child): child.getText() for child in children}
        name = parts[Grammar.ResolverNameContext]
        yield name, parts.get(Grammar.SequenceContext, ""), node.getText()
    for child in children:
        yield from _resolvers(child)
