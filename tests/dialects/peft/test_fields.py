"""Every field of PEFT's LoraConfig has a meaning here, and the table of them is that of the installed PEFT."""

from __future__ import annotations

import json

import pytest

from loratools.dialects.peft import fields as tables
from tests.make.peft_fields import TABLE, listed

OF_PEFT = json.loads(TABLE.read_text())
REFUSED = {name for name, _, _ in tables.REFUSED}
# Of older versions of PEFT, and of trainers that are not PEFT.
OLDER = {
    "enable_lora",
    "merge_weights",
    "scale",
    "scaling",
    "lora_scale",
    "lora_scaling",
    "scaling_factor",
    "lora_B_layout",
    "unsloth_fused_expert_lora",
}


def test_the_table_is_that_of_the_installed_peft() -> None:
    pytest.importorskip("peft")
    assert listed() == OF_PEFT


def test_every_field_is_implemented_refused_or_harmless_and_no_other() -> None:
    known = {*tables.TYPES, *REFUSED, *tables.HARMLESS}
    assert known == OF_PEFT["fields"].keys() | OLDER
    assert not tables.HARMLESS.keys() & {*tables.TYPES, *REFUSED}


def test_what_is_taken_for_a_missing_field_is_pefts_default() -> None:
    fields = OF_PEFT["fields"]
    assert (fields["r"], fields["lora_alpha"]) == (tables.DEFAULT_R, tables.DEFAULT_ALPHA)


def test_pefts_own_defaults_are_neither_refused_nor_unknown() -> None:
    fields = {name: value for name, value in OF_PEFT["fields"].items() if value is not None}
    assert [name for name, refuses, _ in tables.REFUSED if name in fields and refuses(fields[name])] == []
    assert [name for name, (fits, _) in tables.TYPES.items() if name in fields and not fits(fields[name])] == []
    assert tables.unknown_to_peft(fields) == []


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_a_field_that_says_nothing_is_not_unknown(value: object) -> None:
    assert tables.unknown_to_peft({"stranger": value}) == []


@pytest.mark.parametrize("value", [True, 0, 0.0, 1, "x", [0], {"a": None}])
def test_a_field_that_says_something_is_unknown(value: object) -> None:
    assert tables.unknown_to_peft({"stranger": value}) == ["stranger"]
