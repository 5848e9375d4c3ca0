"""How numbers are stored: floats, and the codes of quantized models, one file a scheme.

A codec, which `schemes.SCHEMES` names beside each scheme that it reads, is a module with

    opened(module)               the `Encoding` of a module's weight; raises `UnsupportedAdapter` with the scheme's name
                                 and what to do where the module is stored in a way that this codec does not read
    plain(statement, modules)    config.json's statement of the quantization, changed to say that these modules are
                                 stored as plain weights

What others ask of a weight that is stored as codes is in `Encoding`; `encoded` makes the tensor that stands for it.

The entries that are no codecs:

_fp8      FP8 codes with scales that multiply, for the codecs of the schemes that have them
encoding  what is asked of a weight that is stored as codes: all of it can be had here
_scales   numbers rounded to 8-bit floats, and new scales as each library makes them
folded    models whose weights lie in another basis, as AWQ and SmoothQuant leave them
floats    bfloat16, float16, float32 and float64, read and rounded in NumPy
schemes   what of a model is codes, and the name of the scheme
state     what config.json and headers say of a quantization: found, changed, taken out
turned    weights of GPT-2, which quantization turns; which those are
tables    the numbers that small codes stand for: FP8, FP4, powers of two
unread    schemes that config.json may name and no file here reads
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratools.storage.codecs.encoding import Encoder, Encoding, Grid, Module, Parts, encoded, get

__all__ = ["Encoder", "Encoding", "Grid", "Module", "Parts", "encoded", "get"]


def __getattr__(name: str) -> Any:
    """Return what `encoding` has: a model without codes asks for none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from loratools.storage.codecs import encoding

    return getattr(encoding, name)
