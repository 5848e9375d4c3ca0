"""What the Hub refuses, in the user's words: what happened, and what to do."""

from contextlib import nullcontext
from pathlib import Path

import pytest
from huggingface_hub import constants

from loratools.errors import HubError
from loratools.hub.client import Hub
from loratools.hub.pull import resolve
from loratools.storage.sources import local
from tests.hub.server import LocalHub
from tests.hub.server.client import environment
from tests.hub.trips import REPO, fetch, send, stored


@pytest.fixture(autouse=True)
def no_naps(naps: list[float]) -> None:
    """Back-off takes no time."""


def log_in(monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    """Be somebody else."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)


def refusal(tmp_path: Path, repo: str = REPO, revision: str | None = None) -> HubError:
    """Return how a pull is refused."""
    with pytest.raises(HubError) as caught:
        fetch(tmp_path / "down", repo, revision)
    assert not (tmp_path / "down").exists()
    assert "hf_" not in str(caught.value)
    return caught.value


def test_gated(hub: LocalHub, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(hub, workplace / "adapter", REPO)
    hub.seed(REPO, {}, gated="auto")
    address = f"Accept its licence at {hub.endpoint}/{REPO}, "
    log_in(monkeypatch, None)
    error = refusal(tmp_path)
    assert (error.message, error.hint) == (
        f"{REPO} is gated",
        address + "then log in with `hf auth login`, or set HF_TOKEN.",
    )
    log_in(monkeypatch, hub.other_token)
    error = refusal(tmp_path)
    assert (error.message, error.hint) == (
        f"{REPO} is gated",
        address + "with the account that you are logged in with.",
    )
    with pytest.raises(HubError, match="is gated"):
        local(f"hf://{REPO}", need="header")


@pytest.mark.parametrize("token", [None, LocalHub.other_token])
def test_missing_or_private(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    hub.seed(REPO, {}, private=True)
    log_in(monkeypatch, token)
    for repo in (REPO, "tester/nothing"):
        error = refusal(tmp_path, repo)
        assert error.message == f"{repo}: no such repository, or a private one"
        assert "hf auth login" in str(error.hint)


def test_a_revision(hub: LocalHub, tmp_path: Path) -> None:
    hub.seed(REPO, {})
    assert refusal(tmp_path, revision="v9").message == f"{REPO} has no revision 'v9'"


def test_a_bad_token(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch, "hf_nobodys-token")
    error = refusal(tmp_path)
    assert error.message == f"{REPO}: the Hub does not accept the token"


@pytest.mark.parametrize("token", [LocalHub.reader_token, LocalHub.other_token])
def test_no_right_to_write(hub: LocalHub, workplace: Path, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    hub.seed(REPO, {})
    log_in(monkeypatch, token)
    with pytest.raises(HubError, match=f"{REPO}: you may not do this: ") as caught:
        send(workplace / "adapter")
    assert token not in str(caught.value)
    assert hub.files(REPO) == {}


def test_anonymous_pushes(hub: LocalHub, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch, None)
    with pytest.raises(HubError, match="the Hub asks who you are") as caught:
        send(workplace / "adapter")
    assert "hf auth login" in str(caught.value.hint)


def test_offline(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(tmp_path).message
    assert hub.log.select() == []


def test_nobody_there(hub: LocalHub, tmp_path: Path) -> None:
    hub.__exit__()
    error = refusal(tmp_path)
    assert f"{hub.endpoint} cannot be reached" in error.message
    assert "HF_ENDPOINT" in str(error.hint)


def test_not_a_hub(hub: LocalHub, tmp_path: Path) -> None:
    hub.faults.add("GET", "/api/models/", times=None, status=404, message="Not here")
    assert refusal(tmp_path).message == f"{REPO}: the Hub refused (status 404): Not here"


def test_a_redirect_loop(hub: LocalHub, workplace: Path) -> None:
    stored(hub, workplace / "adapter", REPO)
    hub.faults.add("GET", "resolve", times=None, redirect_loop=True)
    with pytest.raises(HubError, match="did not answer as it should"):
        local(f"hf://{REPO}", need="header")


def test_a_token_given_is_used_and_kept_nowhere(
    hub: LocalHub, hub_home: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, None)
    stored(hub, workplace / "adapter", REPO)
    hub.seed(REPO, {}, private=True)
    path = resolve(f"hf://{REPO}", "adapter", lambda total: nullcontext(lambda count: None), Path, token=hub.token)
    assert (path / "adapter_config.json").is_file()
    assert Hub(token=hub.token).commit(REPO)
    for file in [*hub_home.rglob("*"), *path.rglob("*")]:
        if file.is_file():
            assert hub.token.encode() not in file.read_bytes()
    assert hub.log.leaks() == []
    assert "HF_TOKEN" in environment(hub, hub_home)
