"""Numbers that were computed from the size of a tensor, and that know the operators which computed them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, fx


class Watch(Protocol):
    """Whoever writes down what is computed from sizes."""

    def compute(self, function: Callable[..., Any], operands: tuple[Any, ...], value: int | float) -> Any:
        """The value as a number that knows the operator; called for arithmetic."""

    def decide(self, number: Size | Quotient) -> None:
        """Called where code compares the number: it may do something else for another size."""


class _Number:
    node: fx.Node
    watch: Watch

    def plain(self) -> int | float:
        """The value by itself."""
        raise NotImplementedError

    def __reduce__(self) -> Any:
        return type(self.plain()), (self.plain(),)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.plain()


class Size(_Number, int):
    """A whole number; like any other to the code that uses it."""

    def __hash__(self) -> int:
        self.watch.decide(self)  # a cache or a set may hold another answer for another size
        return int.__hash__(self)

    def plain(self) -> int:
        return int.__int__(self)

    def __int__(self) -> int:
        self.watch.decide(self)  # what is computed from it from now on, nobody sees
        return self.plain()

    def __float__(self) -> float:
        self.watch.decide(self)
        return float(self.plain())


class Quotient(_Number, float):
    """A number with a fraction."""

    def __hash__(self) -> int:
        self.watch.decide(self)
        return float.__hash__(self)

    def plain(self) -> float:
        return float.__float__(self)

    def __int__(self) -> int:
        self.watch.decide(self)
        return int(self.plain())

    def __float__(self) -> float:
        self.watch.decide(self)
        return self.plain()


def tracked(value: int | float, node: fx.Node, watch: Watch) -> Size | Quotient:
    """The value as a number that `node` computes."""
    number: Size | Quotient = Quotient(value) if isinstance(value, float) else Size(value)
    number.node, number.watch = node, watch
    return number


def plain(value: Any) -> Any:
    """A number by itself; anything else as it is."""
    return value.plain() if isinstance(value, _Number) else value


def _arithmetic(function: Callable[..., Any], *, reflected: bool = False) -> Callable[..., Any]:
    def method(self: Any, *others: Any) -> Any:
        operands = (*others, self) if reflected else (self, *others)
        if any(isinstance(other, Tensor) for other in others):
            return NotImplemented  # the tensor's own operator is given the number
        try:
            value = function(*map(plain, operands))
        except TypeError:
            return NotImplemented
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return value
        return self.watch.compute(function, operands, value)

    return method


def _comparison(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *others: Any) -> Any:
        self.watch.decide(self)
        try:
            return function(*map(plain, (self, *others)))
        except TypeError:
            return NotImplemented

    return method


_BINARY = ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift")
_UNARY: dict[str, Callable[..., Any]] = {
    "__neg__": operator.neg,
    "__abs__": operator.abs,
    "__ceil__": math.ceil,
    "__floor__": math.floor,
}
_UNARY |= {"__trunc__": math.trunc, "__round__": round}
for _name in _BINARY:
    for _class in (Size, Quotient):
        _bare = _name.rstrip("_")
        setattr(_class, f"__{_bare}__", _arithmetic(getattr(operator, _name)))
        setattr(_class, f"__r{_bare}__", _arithmetic(getattr(operator, _name), reflected=True))
for _name, _function in _UNARY.items():
    for _class in (Size, Quotient):
        setattr(_class, _name, _arithmetic(_function))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    for _class in (Size, Quotient):
        setattr(_class, f"__{_name}__", _comparison(getattr(operator, _name)))
for _class in (Size, Quotient):
    _class.__divmod__ = _comparison(divmod)  # type: ignore[method-assign]  # made in a loop like its siblings
    _class.__bool__ = _comparison(bool)  # type: ignore[method-assign]  # made in a loop like its siblings
