"""A merge that goes to the Hub while it is made: one commit, and the same bytes as a merge that stays here."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub.fixtures import hub, hub_home
from tests.hub.server import LocalHub
from tests.hub.server.client import environment
from tests.hub.trips import contents

__all__ = ["hub", "hub_home"]

REPO = "tester/merged"


@pytest.fixture
def line(hub: LocalHub, hub_home: Path, workplace: Path, shell: Callable) -> Callable:
    """Return a function that runs a line among the prepared files, logged in to the local Hub."""
    names = {name: value for name, value in environment(hub, hub_home).items() if name.startswith("HF_")}
    return lambda command: shell(command, workplace, **names)


@pytest.mark.parametrize("local", [True, False])
def test_it_equals_the_local_merge(local: bool, hub: LocalHub, line: Callable, workplace: Path) -> None:
    there = "-o sent" if local else "--no-local"
    done = line(f"loratools merge base adapter {there} --push {REPO} --license mit --base-model lab/base --json")
    assert done.code == 0, done.err
    assert line("loratools merge base adapter -o here").code == 0
    sent, here = hub.files(REPO), contents(workplace / "here")
    assert {n: d for n, d in sent.items() if n != "README.md"} == {n: d for n, d in here.items() if n != "README.md"}
    assert b"license: mit" in sent["README.md"]
    assert len(hub.commits(REPO)) == 2  # the Hub's own first one, and ours
    assert json.loads(done.out)["pushed"]["commit"] == hub.commits(REPO)[0].oid
    assert (workplace / "sent").exists() == local
    if local:
        assert contents(workplace / "sent") == here


@pytest.mark.parametrize(
    "line_of_options",
    ["--no-local -o out", "", "--push tester/x --no-local --verify", "--push tester/x --no-local --keep-residual"],
)
def test_what_does_not_go_together(line_of_options: str, line: Callable) -> None:
    assert line(f"loratools merge base adapter {line_of_options}").code == 2
