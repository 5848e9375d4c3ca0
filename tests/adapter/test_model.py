"""What Python and a notebook show of an adapter: its length, its modules, one line, a table that obeys nobody."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from loratools.adapter.model import Adapter, BaseIdentity
from loratools.storage.lazy import LazyTensor
from loratools.surgery.inputs import as_list
from tests.dialects.adapters import Q0, Q1, V0, lora, samples


class Texts(HTMLParser):
    """The tags of a page and the texts between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_it_is_a_collection_of_modules() -> None:
    adapter = samples()["ranks"]
    assert len(adapter) == 3
    assert list(adapter) == [Q0, Q1, V0]
    assert Q1 in adapter
    assert "other" not in adapter
    assert adapter[Q1].rank == 4
    with pytest.raises(KeyError):
        adapter["other"]
    assert as_list(adapter) == [adapter], "one adapter, though Python can go through it"


def test_one_without_modules_is_an_adapter_too() -> None:
    import torch

    empty = Adapter({}, replacements={"lm_head.weight": LazyTensor.of(torch.ones(2, 3))})
    assert len(empty) == 0
    assert empty
    assert repr(empty) == "<Adapter: 0 modules; 1 replaced tensor>"
    assert "lm_head.weight" in empty._repr_html_()


def test_its_line_says_what_it_is() -> None:
    adapter = Adapter({Q0: lora(1, 2), Q1: lora(2), V0: lora(3)}, base=BaseIdentity("org/base"), dialect="peft")
    assert repr(adapter) == "<Adapter: peft; 3 modules; lora of rank 4, lora of rank 2; for org/base>"
    many = Adapter({f"blocks.{rank}": lora(rank, rank) for rank in range(1, 9)})
    assert repr(many) == "<Adapter: 8 modules; lora of rank 1, lora of rank 2, lora of rank 3, …>"


def test_the_table_has_a_row_for_modules_that_are_alike() -> None:
    page = Texts(Adapter({Q0: lora(1, 2, 6), Q1: lora(2, 2, 6), V0: lora(3)}, dialect="peft")._repr_html_())
    assert page.texts[-12:] == ["lora", "2", "6", "3", "2", "q_proj", "lora", "4", "8", "2", "1", "v_proj"]


def test_names_of_strangers_stay_text() -> None:
    nasty = "<script>alert(1)</script>&\x1b[2J"
    adapter = Adapter({f"blocks.{nasty}": lora(1)}, base=BaseIdentity(nasty), dialect=nasty)
    page = Texts(adapter._repr_html_())
    assert page.tags == {"div", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    assert sum("<script>alert(1)</script>&\\x1b[2J" in text for text in page.texts) == 3
    assert "\x1b" not in repr(adapter)
