"""How a module's class is swapped for one with a mixin over it, and given back, also between what others do to it.

The swapped class has the name of the old one and derives from it. A parametrization and FSDP2 put a class of their own
over a module's class: what is there is rebuilt over ours, or over the old one when ours goes. accelerate's hooks keep
the old forward as a bound method of the module: it is bound to the class that the module has now.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

_OF_THE_OBJECT = ("__dict__", "__weakref__")


@cache
def mixed(base: Any, mixin: Any) -> Any:
    """Return the class with a mixin over a module's class."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), {**names, "base": base, "mixin": mixin})


def blank(base: Any, mixin: Any) -> Any:
    """Return an object of the class with a mixin over a module's class, not initialized: pickle and copy fill it."""
    kind = mixed(base, mixin)
    return kind.__new__(kind)


def over(module: Any, mixin: Any) -> None:
    """Put a mixin over a module's own class, below what a parametrization has put there."""
    own: Any = type(module)
    base = own.__bases__[0] if "parametrizations" in module._modules else own
    _become(module, _rebuilt(own, base, mixed(base, mixin)), base.forward)


def under(module: Any, mixin: Any) -> None:
    """Take a mixin away from a module's class, whatever class was put over it since."""
    own = type(module)
    kind = mixed(own.base, mixin)
    _become(module, _rebuilt(own, kind, own.base), kind.forward)


def foreign_forward(module: Any) -> bool:
    """Tell whether a module has a forward of its own, past its class, that calls the class's in no known way."""
    held = vars(module)
    return "forward" in held and not any(_is_bound(value, module, type(module).forward) for value in held.values())


def _become(module: Any, kind: Any, forward: Callable[..., Any]) -> None:
    """Give a module another class; what is bound to the forward of the class before is bound to the new one's."""
    module.__class__ = kind
    if "forward" in vars(module):
        for name, value in list(vars(module).items()):
            if _is_bound(value, module, forward):
                vars(module)[name] = MethodType(kind.forward, module)


def _is_bound(value: Any, module: Any, forward: Callable[..., Any]) -> bool:
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ is forward


def _rebuilt(kind: Any, old: Any, new: Any) -> Any:
    """Return a class as it is, with `new` in the place of `old` among what it derives from."""
    if kind is old:
        return new
    if not issubclass(kind, old):
        return kind
    names = {name: value for name, value in vars(kind).items() if name not in _OF_THE_OBJECT}
    return type(kind)(kind.__name__, tuple(_rebuilt(base, old, new) for base in kind.__bases__), names)
