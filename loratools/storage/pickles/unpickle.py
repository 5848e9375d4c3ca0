"""A pickle read as data: a machine that knows the few operations of a state dict, and no other.

Python's unpickler imports and calls what a file names, and even torch's restricted one can be made to run for years or
to ask for terabytes by a file of a kilobyte. This one builds dicts, lists, tuples, numbers, strings and descriptions of
tensors. It imports nothing, calls nothing, hashes nothing but strings and numbers, and copies nothing: time and memory
are bounded by the length of the pickle.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from loratools.storage import dtypes
from loratools.storage.header import MAX_SIDES

MAX_ARGUMENTS = 16
"""Arguments of one call: a tensor has nine at most. Longer ones, used again and again, would take quadratic time."""

MAX_KEY = 2**31
"""Largest number that is a key: numbers below 2^61 have hashes of their own, and larger ones can all share one."""


MAX_OPERATIONS = 5_000_000
"""Operations of one pickle; a tensor takes about twenty-five."""

MAX_CONTAINERS = 1_000_000
"""Dicts, lists and tuples of one pickle: each takes many times the byte that asks for it."""


class Refused(Exception):
    """What a pickle asks for beyond tensors; becomes part of a sentence that names the file."""


class Damaged(Exception):
    """Where a pickle makes no sense; becomes part of a sentence that names the file."""


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A name that the pickle asks for, `torch.FloatStorage`; only a name."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A record of raw bytes by its key; `dtype` (safetensors name, None if untyped) comes from its class."""

    key: str
    dtype: str | None


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tensor: a dtype, a shape and strides in elements over a storage, from element `offset` on."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def is_contiguous(self) -> bool:
        """Whether its elements lie one after the other, the last side fastest; sides of one have no stride."""
        expected = 1
        for side, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if side != 1 and stride != expected:
                return 0 in self.shape
            expected *= side
        return True


# Classes of storages -> the dtype that they have, None for the untyped one.
_STORAGES = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8", "torch.BoolStorage": "BOOL",
    "torch.ComplexFloatStorage": "C64", "torch.storage.UntypedStorage": None,
}  # fmt: skip

_MARK = object()


def unpickle(raw: bytes) -> Any:
    """Return what a pickle of `torch.save` describes, tensors as `View`; raise `Refused` or `Damaged`."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    containers = 0
    try:
        for number, (opcode, value, _) in enumerate(pickletools.genops(raw)):
            name, argument = opcode.name, cast(Any, value)
            containers += name in _CONTAINERS
            if number >= MAX_OPERATIONS or containers > MAX_CONTAINERS:
                raise Damaged(f"its pickle has more than {MAX_OPERATIONS} operations or {MAX_CONTAINERS} containers")
            if name in _PUSHED:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "STOP":
                (result,) = stack
                return result
            elif name not in _IGNORED:
                if name not in _OPERATIONS:
                    raise Refused(f"the operation {name}")
                _OPERATIONS[name](stack, argument)
    except (IndexError, KeyError, TypeError, AttributeError):
        raise Damaged("its pickle has operations that do not fit each other") from None
    except (ValueError, OverflowError) as error:
        raise Damaged(f"its pickle cannot be read: {str(error)[:80]}") from None
    raise Damaged("its pickle has no end")


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    at = len(stack) - 1
    while stack[at] is not _MARK:  # IndexError below the bottom
        at -= 1
        if at < 0:
            raise IndexError
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _pop(stack: list[Any], count: int) -> list[Any]:
    items = stack[-count:]
    if len(items) < count:
        raise IndexError
    del stack[-count:]
    return items


def _set(stack: list[Any], items: list[Any]) -> None:
    target = stack[-1]
    if type(target) is not dict or len(items) % 2:
        raise TypeError
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):
            raise Refused(f"a dict with a key of type {type(key).__name__}")
        if type(key) is int and abs(key) > MAX_KEY:
            raise Refused("a dict with a number as a key that no state dict has")
        if key in target:
            raise Damaged("its pickle has a dict with the same key twice")
        target[key] = value


def _extend(stack: list[Any], items: list[Any]) -> None:
    if type(stack[-1]) is not list:
        raise TypeError
    stack[-1].extend(items)


def _stack_global(stack: list[Any], _: Any) -> None:
    module, name = _pop(stack, 2)
    if type(name) is not str or type(module) is not str:
        raise TypeError
    stack.append(_known(f"{module}.{name}"))


def is_known(name: str) -> bool:
    """Tell whether a state dict has need of a name, such as `torch.FloatStorage`."""
    return name in _CALLS or name in _STORAGES or _dtype(name) is not None


def _known(name: str) -> Global:
    if not is_known(name):
        raise Refused(name[:200])
    return Global(name)


def _persistent(stack: list[Any], _: Any) -> None:
    kind, cls, key, _, elements = stack.pop()
    if kind != "storage" or type(key) is not str or type(elements) is not int:
        raise TypeError
    stack.append(Storage(key, _STORAGES[cls.name]))


def _reduce(stack: list[Any], _: Any) -> None:
    function, arguments = _pop(stack, 2)
    if type(arguments) is not tuple or len(arguments) > MAX_ARGUMENTS:
        raise TypeError
    stack.append(_CALLS[function.name](*arguments))


def _build(stack: list[Any], _: Any) -> None:
    stack.pop()  # attributes: a state dict carries the versions of its modules
    if type(stack[-1]) is not dict:
        raise TypeError


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> View:
    """`_rebuild_tensor_v2`: after the strides come requires_grad, hooks, and perhaps bits like `conj`."""
    return _view(storage, storage.dtype, offset, shape, strides, rest)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *bits: Any
) -> View:
    """`_rebuild_tensor_v3`, over an untyped storage: the dtype is said."""
    return _view(storage, _dtype(dtype.name), offset, shape, strides, (grad, hooks, *bits))


def _view(storage: Any, dtype: Any, offset: Any, shape: Any, strides: Any, rest: tuple[Any, ...]) -> View:
    if type(storage) is not Storage or not isinstance(dtype, str) or not len(shape) == len(strides) <= MAX_SIDES:
        raise TypeError
    numbers = (offset, *shape, *strides)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise TypeError
    if any(rest[1:]):
        raise Refused("a tensor with hooks or lazy bits (conj, neg)")
    return View(storage, dtype, offset, tuple(shape), tuple(strides))


def _parameter(data: Any, *_: Any) -> View:
    if type(data) is not View:
        raise TypeError
    return data


def _size(sides: Any) -> tuple[Any, ...]:
    if len(sides) > MAX_SIDES:
        raise TypeError
    return tuple(sides)


def _dtype(name: str) -> str | None:
    return dtypes.from_name(name.removeprefix("torch.")) if name.startswith("torch.") else None


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: {},
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
}

_IGNORED = frozenset({"PROTO", "FRAME"})
_PUSHED = frozenset({
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES", "BINBYTES",
})  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "MARK": lambda: _MARK, "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip
_CONTAINERS = frozenset({"EMPTY_DICT", "EMPTY_LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE"})
_OPERATIONS: dict[str, Callable[[list[Any], Any], None]] = {
    "SETITEM": lambda stack, _: _set(stack, _pop(stack, 2)),
    "SETITEMS": lambda stack, _: _set(stack, _pop_to_mark(stack)),
    "APPEND": lambda stack, _: _extend(stack, _pop(stack, 1)),
    "APPENDS": lambda stack, _: _extend(stack, _pop_to_mark(stack)),
    "TUPLE": lambda stack, _: stack.append(tuple(_pop_to_mark(stack))),
    "TUPLE1": lambda stack, _: stack.append(tuple(_pop(stack, 1))),
    "TUPLE2": lambda stack, _: stack.append(tuple(_pop(stack, 2))),
    "TUPLE3": lambda stack, _: stack.append(tuple(_pop(stack, 3))),
    "GLOBAL": lambda stack, argument: stack.append(_known(argument.replace(" ", "."))),
    "STACK_GLOBAL": _stack_global, "BINPERSID": _persistent, "REDUCE": _reduce, "BUILD": _build,
}  # fmt: skip
