"""Libraries that are not there, or of another source, do not serve; their widths are those of one processor."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from loratools.linalg.native import delta, loaded
from loratools.linalg.native.delta import LIBRARY

SIZES = {"change_size": delta._Change, "product_size": delta._Product}

needs_library = pytest.mark.skipif(not delta.available(), reason="no C code is compiled here")


class Other(ctypes.Structure):
    """One field more than any of delta.c."""

    _fields_ = (("more", ctypes.c_char * 4096),)


@needs_library
def test_a_library_of_this_source_serves_with_its_width() -> None:
    library, width = loaded.load(LIBRARY, "delta_width", SIZES, ["difference"])
    assert library.loratools_difference.argtypes == [ctypes.c_void_p, ctypes.c_size_t]
    assert width == delta.widths()[0]


@needs_library
@pytest.mark.parametrize(
    ("width", "sizes", "calls"),
    [
        ("no_width", SIZES, ["difference"]), ("delta_width", SIZES, ["no_such_call"]),
        ("delta_width", SIZES | {"change_size": Other}, ["difference"]),
        ("delta_width", SIZES | {"no_such_size": Other}, ["difference"]),
    ],
)  # fmt: skip
def test_a_library_of_another_source_does_not_serve(
    width: str, sizes: dict[str, type[ctypes.Structure]], calls: list[str]
) -> None:
    assert loaded.load(LIBRARY, width, sizes, calls) == (None, 0)


def test_what_is_no_library_does_not_serve(tmp_path: Path) -> None:
    (tmp_path / "libdelta.so").write_bytes(b"no library")
    for name in ("libdelta.so", "none.so"):
        assert loaded.load(tmp_path / name, "delta_width", SIZES, []) == (None, 0)


@pytest.mark.parametrize(("widest", "wanted"), [(16, [16, 8]), (8, [8]), (4, [4]), (0, [])])
def test_narrow_vectors_serve_where_wide_ones_do_but_not_those_of_another_processor(
    widest: int, wanted: list[int]
) -> None:
    assert loaded.widths(widest) == wanted
