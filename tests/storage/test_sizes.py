"""Budgets as people write them: parameters, or bytes of parameters."""

import pytest

from loratools.storage.sizes import parse_budget


@pytest.mark.parametrize(
    ("text", "bits", "parameters"),
    [
        ("500000", 16, 500_000),
        ("2M", 16, 2_000_000),
        ("1.5k", 32, 1_500),
        ("8MB", 16, 4_000_000),
        ("8 MB", 32, 2_000_000),
        ("1MiB", 32, 2**18),
    ],
)
def test_a_budget(text: str, bits: int, parameters: int) -> None:
    assert parse_budget(text, bits) == parameters


@pytest.mark.parametrize("text", ["", "M", "0", "-1", "2 apples", "B", "nan"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(ValueError, match="write 20M parameters, or 64MB"):
        parse_budget(text, 16)
