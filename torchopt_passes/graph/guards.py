"""Guards: the conditions on input sizes under which a captured graph computes what its source computes."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torchopt_passes.errors import ConfigError

__all__ = ["Guard", "check_guards", "parse_guard"]

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Eq": operator.eq,
    "Ne": operator.ne,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Max": max,
    "Min": min,
    "max": max,
    "min": min,
    "floor": math.floor,
    "math.floor": math.floor,
    "ceil": math.ceil,
    "math.ceil": math.ceil,
    "math.trunc": math.trunc,
    "int": int,
    "Not": operator.not_,
}


class Guard:
    """One condition, such as ``input_ids.size()[1] <= 512``; written by torch.export, read here without `eval`.

    Args:
        code: the condition in the form of torch.export, ``L['input_ids'].size()[1] <= 512``.

    Raises:
        ConfigError: the code is not an arithmetic condition on sizes.

    Example:
        >>> guard = Guard("L['x'].size()[1] == 2*L['y'].size()[0]")
        >>> guard({"x": torch.ones(1, 4), "y": torch.ones(2)}), str(guard)
        (True, 'x.size()[1] == 2*y.size()[0]')
    """

    def __init__(self, code: str) -> None:
        self.code = code
        try:
            self._body = ast.parse(code, mode="eval").body
        except SyntaxError as error:
            raise ConfigError(f"guard {code!r} cannot be read") from error
        _check(self._body, code)

    def __call__(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether inputs, by the names of the forward, meet the condition."""
        return bool(_value(self._body, inputs))

    def __str__(self) -> str:
        return self.code.replace("L['", "").replace("']", "")


def parse_guard(code: str) -> Guard | None:
    """Return the guard of a piece of code, or None when it is no arithmetic condition on sizes."""
    try:
        return Guard(code)
    except ConfigError:
        return None


def check_guards(guards: Sequence[Guard], inputs: Mapping[str, Any]) -> str | None:
    """Return the first condition that inputs do not meet, with their sizes, or None."""
    for guard in guards:
        if not guard(inputs):
            shapes = {
                name: tuple(value.shape)
                for name, value in inputs.items()
                if isinstance(value, torch.Tensor) and f"L['{name}']" in guard.code
            }
            return f"{guard} (it is called with {shapes})"
    return None


def _check(node: ast.expr, code: str) -> None:
    """Refuse whatever `_value` cannot compute."""
    try:
        _value(node, _Anything())
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"guard {code!r} is not a condition on sizes") from error
    except ArithmeticError:
        pass


class _Anything(dict[str, Any]):
    """Inputs that have every name, and tensors of every size."""

    def __missing__(self, key: str) -> Any:
        return _Sized()


class _Sized:
    def __getitem__(self, index: Any) -> _Sized:
        return self

    def size(self) -> Sequence[int]:
        return [1] * 32

    stride = size

    def storage_offset(self) -> int:
        return 0


def _value(node: ast.expr, inputs: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int() | float() | bool() | str() as value):
            return value
        case ast.Name(id="L"):
            return inputs
        case ast.Subscript(value=value, slice=index):
            return _value(value, inputs)[_value(index, inputs)]
        case ast.Call(func=ast.Attribute(value=value, attr="size" | "stride" | "storage_offset" as name), args=[]):
            return getattr(_value(value, inputs), name)()
        case ast.Call(func=function, args=args, keywords=[]):
            return _FUNCTIONS[ast.unparse(function)](*[_value(a, inputs) for a in args])
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](_value(left, inputs), _value(right, inputs))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, inputs)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, inputs)
        case ast.BoolOp(op=ast.And(), values=values):
            conditions = [_value(v, inputs) for v in values]  # every part is computed, so that _check sees it
            return all(conditions)
        case ast.BoolOp(values=values):
            conditions = [_value(v, inputs) for v in values]
            return any(conditions)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            values = [_value(v, inputs) for v in (left, *comparators)]
            pairs = zip(ops, values, values[1:], strict=False)
            conditions = [_COMPARE[type(op)](a, b) for op, a, b in pairs]
            return all(conditions)
        case _:
            raise TypeError(ast.unparse(node))
