"""The dtypes of safetensors: names, sizes in bits, and their torch twins. The one place that knows both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from loratools.errors import UnsupportedAdapter

if TYPE_CHECKING:
    import torch

# name in a safetensors header -> (bits of one element, attribute of torch or None where torch has no such array)
_TABLE: dict[str, tuple[int, str | None]] = {
    "F4": (4, None), "F6_E2M3": (6, None), "F6_E3M2": (6, None),
    "BOOL": (8, "bool"), "U8": (8, "uint8"), "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"), "F8_E4M3": (8, "float8_e4m3fn"), "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"), "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"), "U16": (16, "uint16"), "F16": (16, "float16"), "BF16": (16, "bfloat16"),
    "I32": (32, "int32"), "U32": (32, "uint32"), "F32": (32, "float32"),
    "I64": (64, "int64"), "U64": (64, "uint64"), "F64": (64, "float64"), "C64": (64, "complex64"),
}  # fmt: skip

BITS = {name: bits for name, (bits, _) in _TABLE.items()}
"""Name of a dtype -> the size of one element in bits."""

_FROM_TORCH = {twin: name for name, (_, twin) in _TABLE.items() if twin}

FLOATS = ("BF16", "F16", "F32", "F64")
"""The dtypes that a merge may change: every value is a number of its own, not a code that needs a scale elsewhere."""

ROW_DTYPES = frozenset({"BF16", "F16", "F32"})
"""The dtypes of rows and factors that the C code of a merge reads."""

INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
"""The bits of infinity: those of every finite number, without the sign, are less as integers, those of NaN greater."""

MANTISSA = {"BF16": 8, "F16": 11, "F32": 24, "F64": 53}
"""Bits of precision p, the hidden one included: rounding to nearest errs by at most 2^-p of the value."""


def half_unit(dtype: str, largest: float) -> float:
    """Return how far a number of at most this magnitude can be from itself rounded to the nearest of a float dtype."""
    return max(2.0 ** -MANTISSA[dtype] * largest, 2.0 ** (_RANGE[dtype][1] - 1))


# Of the float dtypes: the exponents of the largest power of two and of the smallest number above zero.
_RANGE = {"F16": (15, -24), "BF16": (127, -133), "F32": (127, -149), "F64": (1023, -1074)}


def narrows(source: str, target: str) -> bool:
    """Tell whether a cast between two float dtypes can make an infinity of a number, or zero of one that is not."""
    # Two dtypes with the same largest exponent differ in the digits of the largest number, which may round beyond it.
    (largest, least), (most, fewest) = _RANGE[source], _RANGE[target]
    return largest > most or least < fewest or (largest == most and MANTISSA[source] > MANTISSA[target])


def holders(dtype: str) -> str:
    """Return which float dtypes hold numbers that `dtype` does not, as a sentence says it."""
    return "BF16 and F32 hold them" if dtype == "F16" else "F64 holds them"


def smallest(dtype: str) -> float:
    """Return the smallest number above zero that a float dtype holds: the step between numbers around zero."""
    return 2.0 ** _RANGE[dtype][1]


def is_known(dtype: str) -> bool:
    """Tell whether the safetensors format defines a dtype of this name."""
    return dtype in _TABLE


def bits(dtype: str) -> int:
    """Return the size of one element in bits (4 and 6 occur)."""
    return BITS[dtype]


def to_torch(dtype: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype name; raise `UnsupportedAdapter` where torch has none."""
    import torch

    attribute = _TABLE[dtype][1]
    twin = getattr(torch, attribute, None) if attribute else None
    if not isinstance(twin, torch.dtype):
        raise UnsupportedAdapter(f"this torch ({torch.__version__}) has no array of dtype {dtype}")
    return twin


def from_torch(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype; raise `ValueError` where there is none."""
    name = from_name(str(dtype).removeprefix("torch."))
    if name is None:
        raise ValueError(f"safetensors has no dtype for {dtype}")
    return name


def from_name(attribute: str) -> str | None:
    """Return the safetensors name of a torch dtype by its name, `bfloat16`; None where there is none."""
    return _FROM_TORCH.get(attribute)


# How configs, command lines and people spell the float dtypes.
ALIASES = {
    "bf16": "BF16", "bfloat16": "BF16", "f16": "F16", "fp16": "F16", "float16": "F16", "half": "F16",
    "f32": "F32", "fp32": "F32", "float32": "F32", "float": "F32", "f64": "F64", "fp64": "F64", "float64": "F64",
    "double": "F64",
}  # fmt: skip

SPELLINGS = ("bf16", "f16", "f32", "f64")
"""The shortest spelling of each: what messages and the command line list."""

FACTORS = ("f32", "bf16", "f16", "f64")
"""Those that the factors of an adapter are stored in."""

FloatName = Literal[
    "bf16", "f16", "f32", "f64", "BF16", "F16", "F32", "F64", "bfloat16", "float16", "float32", "float64",
]  # fmt: skip
"""The spellings of a float dtype that editors offer; `parse_float` reads every one of `ALIASES`."""


def parse_float(dtype: str | torch.dtype) -> str:
    """Return the safetensors name of a float dtype in any spelling: `bf16`, `BF16`, `bfloat16`, `torch.bfloat16`.

    Raises `ValueError` for any other dtype.
    """
    name = ALIASES.get(str(dtype).removeprefix("torch.").lower())
    if name is None:
        choices = f"{', '.join(SPELLINGS[:-1])} or {SPELLINGS[-1]}"
        raise ValueError(f"{str(dtype)!r} is not a dtype that a model can be written in; it can be {choices}")
    return name


CONFIG_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""How `config.json` of transformers spells them."""
