"""Values that a sweep derives from others: arithmetic, and nothing else.

    train.tokens: "= 20 * parameters"
    optim.lr: "= 3e-3 * sqrt(128 / model.d_model)"

An expression is parsed, never evaluated by Python: its tree may hold numbers, dotted keys, the
operators + - * / // % **, and calls of the functions below. Whoever writes a sweep file can
therefore compute numbers and do nothing besides.
"""

import ast
import math
from collections.abc import Callable
from typing import Any

from bitscale.errors import ConfigError

Number = int | float

_LARGEST = 1e30
_LARGEST_POWER = 64
_MAX_LENGTH = 500
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: a**b,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ceil": math.ceil,
    "exp": math.exp,
    "floor": math.floor,
    "log": math.log,
    "log2": math.log2,
    "max": max,
    "min": min,
    "multiple": lambda value, of: round(value / of) * of,  # the nearest multiple
    "round": round,
    "sqrt": math.sqrt,
}


def is_expression(value: object) -> bool:
    """Whether `value` is a text that begins with `=`."""
    return isinstance(value, str) and value.lstrip().startswith("=")


def evaluate(text: str, look_up: Callable[[str], object]) -> Number:
    """The number that `text` ("= 20 * parameters") stands for.

    Args:
        look_up: the value of a name such as `parameters` or `model.d_model`; raises KeyError.

    Whole results of whole numbers stay whole. Raises ConfigError for what is no arithmetic, for an
    unknown name, and for a result that is not finite.
    """
    source = text.strip().removeprefix("=").strip()
    try:
        if len(source) > _MAX_LENGTH:
            raise ValueError(f"longer than {_MAX_LENGTH} characters")
        return _value(ast.parse(source, mode="eval").body, look_up)
    except ConfigError as error:
        raise ConfigError(f"expression {text[:100]!r}: {error}") from None
    except SyntaxError as error:
        raise ConfigError(f"expression {text[:100]!r} is not arithmetic: {error.msg}") from None
    except (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ConfigError(f"expression {text[:100]!r}: {error}") from None


def _value(node: ast.expr, look_up: Callable[[str], object]) -> Number:
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float() as value):
            return _checked(value)
        case ast.Name() | ast.Attribute():
            return _named(_dotted(node), look_up)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, look_up)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _value(left, look_up), _value(right, look_up)
            if isinstance(op, ast.Pow) and abs(b) > _LARGEST_POWER:
                raise ConfigError(f"the exponent {b} is beyond {_LARGEST_POWER}")
            return _checked(_OPERATORS[type(op)](a, b))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _checked(_FUNCTIONS[name](*(_value(arg, look_up) for arg in args)))
    raise ConfigError(
        f"{ast.unparse(node)[:60]!r} is not allowed; use numbers, keys such as model.d_model, "
        f"+ - * / // % ** and {', '.join(sorted(_FUNCTIONS))}"
    )


def _named(name: str, look_up: Callable[[str], object]) -> Number:
    try:
        value = look_up(name)
    except KeyError:
        raise ConfigError(f"{name} is unknown") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} is {value!r}, no number; set it in the sweep's base")
    return _checked(value)


def _dotted(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=inner, attr=attribute):
            return f"{_dotted(inner)}.{attribute}"
    raise ConfigError(f"{ast.unparse(node)[:60]!r} is no key")


def _checked(value: Any) -> Number:
    if isinstance(value, complex) or not abs(value) <= _LARGEST:
        raise ConfigError(f"{str(value)[:40]} is not a number up to {_LARGEST:g}")
    number: Number = value
    return number
