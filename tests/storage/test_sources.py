"""References become paths: by whom, how often, and what stays of them. The real resolver is tested in tests/hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.errors import BadFile, InvalidOption
from loratools.storage import resolvers, sources


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A resolver of `toy://`, installed by name as the Hub's is; the list says what it was asked for."""
    (tmp_path / "toy_resolver.py").write_text(
        "asked = []\n"
        "def resolve(reference, need, watch, folder):\n"
        "    asked.append((reference, need))\n"
        "    with watch(3) as advance:\n"
        "        advance(3)\n"
        "    return folder() if need == 'header' else __import__('pathlib').Path('/cache')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "toy_resolver", raising=False)
    monkeypatch.setitem(resolvers.RESOLVERS, "toy://", ("", ""))  # what is installed now goes with the test
    resolvers.install("toy://", "toy_resolver", "resolve")
    import toy_resolver

    return toy_resolver.asked


def test_a_path_is_itself(asked: list) -> None:
    assert sources.local("toy") == sources.local(Path("toy")) == Path("toy")
    assert sources.local(Path("toy://a")) == Path("toy:/a")
    assert asked == []
    with pytest.raises(InvalidOption, match=r"^expected a path or a reference such as hf://org/name, found int$"):
        sources.local(3)  # type: ignore[arg-type]


def test_within_a_session_each_reference_is_resolved_once(asked: list) -> None:
    with sources.session() as current:
        headers = sources.local("toy://a", "header")
        assert headers.is_dir()
        assert sources.local("toy://a", "header") == headers
        assert sources.local("toy://a", "checkpoint") == Path("/cache")
        assert current.named(f"{headers}/x: damaged") == "toy://a/x: damaged"
        with sources.session() as inner:
            assert inner is current
        assert headers.is_dir()
    assert not headers.exists()
    assert asked == [("toy://a", "header"), ("toy://a", "checkpoint")]
    sources.local("toy://a")
    sources.local("toy://a")
    assert len(asked) == 4, "without a session nothing is remembered: what a branch names may change"


def test_data_that_is_there_serves_for_headers(asked: list) -> None:
    with sources.session():
        sources.local("toy://a", "adapter")
        assert sources.local("toy://a", "header") == Path("/cache")
    assert asked == [("toy://a", "adapter")]


def test_an_error_names_what_the_user_named(asked: list) -> None:
    @sources.session()
    def fail() -> None:
        folder = sources.local("toy://a", "header")
        raise BadFile(f"{folder}/x: damaged", [f"{folder}/y"], hint=f"See {folder}.")

    with pytest.raises(BadFile) as caught:
        fail()
    error = caught.value
    assert (error.message, error.problems, error.hint) == ("toy://a/x: damaged", ("toy://a/y",), "See toy://a.")
    assert error.args == ("toy://a/x: damaged",)


def test_a_session_shows_what_is_fetched(asked: list) -> None:
    from contextlib import contextmanager

    seen: list[object] = []

    @contextmanager
    def show(reference, total):
        seen.append((reference, total))
        yield seen.append

    with sources.session(show):
        sources.local("toy://a")
    assert seen == [("toy://a", 3), 3]
