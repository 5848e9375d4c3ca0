"""Is this running model the base that an adapter was sealed with, and which base is it? By the bits of its weights.

A model may run in another dtype than its files have. A copy in a wider dtype has other bytes and says the same: where
casting it down loses nothing, it is taken for what it was cast from, and said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from loratools.adapter.model import BaseIdentity
from loratools.adapter.naming.wrappers import Names
from loratools.decisions import warned
from loratools.errors import IncompatibleAdapter, WrongBase, counted
from loratools.live.below.meta import stored
from loratools.live.place import Layout
from loratools.options import CheckBase
from loratools.storage import digest, dtypes
from loratools.storage.lazy import LazyTensor

_NARROWER = {torch.float64: (torch.float32,), torch.float32: (torch.bfloat16, torch.float16)}


def tensor_digest(tensor: Tensor, algorithm: str = digest.DEFAULT) -> str:
    """Return the digest of a tensor in its own dtype, as of one in a file."""
    lazy = LazyTensor.of(tensor.detach())
    return digest.tensor(lazy.dtype, lazy.shape, lazy.chunks("tensor"), algorithm)


_KEPT: dict[int, tuple[Any, Any, dict[tuple[Any, str], str]]] = {}
"""Id of a parameter -> a weak reference to it, its state, and the digests that it had then."""


def parameter_digest(parameter: Tensor, dtype: torch.dtype, algorithm: str = digest.DEFAULT) -> str:
    """Return the digest of a parameter cast to a dtype; kept until the parameter is changed, as autograd counts it.

    So every adapter after the first is compared in no time.
    """
    state = parameter.data_ptr(), parameter._version, tuple(parameter.shape), parameter.dtype
    key = id(parameter)
    held = _KEPT.get(key)
    if held is None or held[0]() is not parameter or held[1] != state:
        gone = ref(parameter, lambda _: _KEPT.pop(key, None))
        _KEPT[key] = held = (gone, state, {})
    digests = held[2]
    if (dtype, algorithm) not in digests:
        digests[dtype, algorithm] = tensor_digest(parameter.detach().to(dtype), algorithm)
    return digests[dtype, algorithm]


def narrowed(tensor: Tensor) -> list[Tensor]:
    """Return a tensor and its casts to narrower dtypes that lose nothing."""
    casts = (tensor.to(dtype) for dtype in _NARROWER.get(tensor.dtype, ()))
    return [tensor, *(cast for cast in casts if torch.equal(cast.to(tensor.dtype), tensor))]


def check_base(base: BaseIdentity | None, layout: Layout, check: CheckBase = "strict") -> None:
    """Compare the weights of a running model with the digests that an adapter was sealed with.

    Raises `WrongBase` with every tensor that differs; with `check` "warn" they are a warning, with "off" nothing is
    compared. What cannot be compared, for the model stores it otherwise, is a warning.
    """
    if check == "off":
        return
    if base is None or not base.sealed:
        warned("the adapter carries no base hash, so it cannot be told whether this model is its base")
        return
    problems, absent, casts = [], [], set()
    typed = layout.config.get("model_type")
    if base.model_type and typed and base.model_type != typed:
        problems.append(f"model_type: the sealed base is of type {base.model_type}, this model of type {typed}")
    names = Names(layout.shapes, layout.config)
    for name, recorded in base.tensors.items():
        tensor = live_tensor(name, layout, names)
        if tensor is None:
            absent.append(name)
            continue
        algorithm = digest.algorithm_of(recorded)
        wide = tensor.dtype
        dtype = wide if parameter_digest(tensor, wide, algorithm) == recorded else None
        if dtype is None:  # the sealed base may have it in a narrower dtype
            casts_of = (each.dtype for each in narrowed(tensor)[1:])
            dtype = next((each for each in casts_of if parameter_digest(tensor, each, algorithm) == recorded), None)
        if dtype is None:
            problems.append(f"{name}: its bytes are not those of the sealed base")
        elif dtype != tensor.dtype:
            casts.add(f"{dtypes.from_torch(tensor.dtype)} of {dtypes.from_torch(dtype)}")
    if problems and check == "strict":
        raise WrongBase(
            "this running model is not the base that the adapter was sealed with", problems,
            hint='Load the right base, or say check_base="warn" to use the adapter all the same.',
        )  # fmt: skip
    for problem in problems:
        warned("not the sealed base: %s", problem)
    if casts:
        warned("the weights are an exact copy of the sealed base in another dtype, %s", ", ".join(sorted(casts)))
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        warned(
            "could not be compared with the sealed base, for this model holds them otherwise: %s%s",
            ", ".join(absent[:3]),
            more,
        )


def live_tensor(name: str, layout: Layout, names: Names) -> Tensor | None:
    """Return the parameter that a tensor of the base's files is in a running model, where it is one and a float."""
    module, _, parameter = name.rpartition(".")
    found = names.find(module, parameter)
    if len(found) != 1:
        return None
    _, owner, own = layout.owners[found[0]]
    tensor = stored(owner, own)
    return tensor if tensor is not None and tensor.is_floating_point() and not tensor.is_meta else None


def seal(layout: Layout, touched: Iterable[str], base_id: str | None) -> BaseIdentity:
    """Return the identity of a running model as the base of an adapter: digests of the parameters it touches.

    A model that runs in float32 and of which every touched weight is a bfloat16 or float16 number is sealed with the
    digests of those, as its files have them; that is said.
    """
    tensors: dict[str, Tensor] = {}
    empty: list[str] = []
    codes = 0
    for name in sorted(set(touched)):
        _, owner, own = layout.owners[name]
        parameter = stored(owner, own)
        if parameter is not None and parameter.is_meta:
            empty.append(name)
        elif parameter is not None and parameter.is_floating_point():
            tensors[name] = parameter.detach()
        elif parameter is not None:
            codes += 1
    if empty:
        raise IncompatibleAdapter(
            "these weights are on the meta device and have no values, with which an adapter could be sealed", empty,
            hint="Load the weights into the model first.",
        )  # fmt: skip
    if codes:
        warned("left out of the adapter's seal, for they are codes in this model: %s", counted(codes, "weight"))
    dtypes_of = {tensor.dtype for tensor in tensors.values()}
    if dtypes_of == {torch.float32}:
        for narrow in _NARROWER[torch.float32]:
            if all(torch.equal(tensor.to(narrow).float(), tensor) for tensor in tensors.values()):
                tensors = {name: tensor.to(narrow) for name, tensor in tensors.items()}
                warned(
                    "sealed with the %s weights of which this model is an exact float32 copy", dtypes.from_torch(narrow)
                )
                break
    digests: Mapping[str, str] = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    typed = layout.config.get("model_type")
    return BaseIdentity(base_id, tensors=digests, model_type=typed if isinstance(typed, str) else None)
