"""Memory that files are read into: where no processor copies slowly, used again, and lent to one at a time."""

from __future__ import annotations

import ctypes

import pytest

from loratools.parallel.memory import PAGE, Room, lent, place


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@pytest.mark.parametrize("read", [None, *range(0, PAGE, 8), 1, 31, 33, 4065, 4095, 3 * PAGE + 4072])
def test_no_copy_goes_a_little_further_into_a_page(read: int | None) -> None:
    slow = range(1, 32)
    for write in (None, *range(0, 256), *range(256, PAGE, 24), *range(PAGE - 64, PAGE)):
        at = place(read, write)
        assert at % 64 == 0
        assert read is None or (at - read) % PAGE not in slow
        assert write is None or (write - at) % PAGE not in slow


def test_memory_lies_at_its_place_and_is_used_again() -> None:
    room = Room()
    first = room.of(100_000, read=0)
    assert (address(first) % PAGE, first.nbytes) == (0, 100_000)
    first[:5] = b"first"
    smaller = room.of(10, read=PAGE - 8)
    assert (address(smaller) - address(first), smaller.nbytes) == (64, 10)
    assert bytes(room.of(5, read=0)) == b"first"
    larger = room.of(5_000_000, read=8, write=24)
    assert address(larger) % PAGE == place(8, 24)
    assert larger.nbytes == 5_000_000
    assert bytes(first[:5]) == b"first"
    assert room.of(0, read=16).nbytes == 0


def test_what_is_lent_is_lent_to_one_and_comes_back() -> None:
    with lent() as one, lent() as two:
        assert one is not two
        one.of(1000)
    with lent() as again, lent() as other:
        assert {id(again), id(other)} == {id(one), id(two)}
        again.of(8 << 20)
    with lent() as kept, lent() as fresh:
        assert again not in (kept, fresh)


def test_two_that_read_at_once_do_not_share() -> None:
    def numbers(seed: int):
        with lent() as room:
            for i in range(3):
                piece = room.of(4)
                piece[:] = bytes([seed, i, seed, i])
                yield piece

    for i, (one, two) in enumerate(zip(numbers(1), numbers(2), strict=True)):
        assert (bytes(one), bytes(two)) == (bytes([1, i, 1, i]), bytes([2, i, 2, i]))
