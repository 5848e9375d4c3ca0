"""Which failures of a Hub may pass, how long to wait before asking again, and what to say of all others.

The module names nothing of the HTTP library: huggingface_hub changed it from requests to httpx to httpx2.
"""

from __future__ import annotations

import errno
import random
import re
import time
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from typing import Any, TypeVar

from loratools.errors import HubError, LoraToolsError, NoSpace

T = TypeVar("T")

TRIES = 3
LONGEST = 60.0
"""Seconds that are waited for a rate limit; a longer one is reported instead."""

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_NETWORK = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"})
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


class Damaged(HubError):
    """Bytes arrived that differ from those that the Hub lists; asking again may help."""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def status(error: BaseException) -> int | None:
    """Return the HTTP status of the answer that an error is about, or None if there was none."""
    codes = (getattr(getattr(cause, "response", None), "status_code", None) for cause in chain(error))
    return next((code for code in codes if isinstance(code, int)), None)


def passes(error: BaseException) -> bool:
    """Tell whether the same request may succeed later: no answer, a cut or damaged body, 429, or a server's error."""
    if any(isinstance(cause, Damaged) for cause in chain(error)):
        return True
    if (code := status(error)) is not None:
        return code in _PASSING
    return any(_is_network(cause) or "Consistency check failed" in str(cause) for cause in chain(error))


def retried(call: Callable[[], T]) -> T:
    """Return `call()`, repeated after a failure that may pass; the call must be harmless when done twice.

    Waits a random time up to 1, 2, 4, … seconds ("full jitter", Brooker 2015), or as long as a rate limit says.
    """
    for attempt in range(TRIES - 1):
        try:
            return call()
        except Exception as error:
            if not passes(error) or (pause := _pause(error, attempt)) > LONGEST:
                raise
            time.sleep(pause)
    return call()


def pause(error: BaseException, attempt: int) -> None:
    """Wait before attempt number `attempt` + 2."""
    time.sleep(min(_pause(error, attempt), LONGEST))


def _pause(error: BaseException, attempt: int) -> float:
    wait = _named_wait(error) if status(error) == 429 else None
    return random.uniform(0, 2**attempt) if wait is None else wait + random.uniform(0, 1)


def _named_wait(error: BaseException) -> float | None:
    """Return the seconds that a rate limit names: `Retry-After: 3`, or `ratelimit: "api";r=0;t=3`."""
    answers: list[Any] = [getattr(cause, "response", None) for cause in chain(error)]
    headers: Any = next((answer.headers for answer in answers if answer is not None), {})
    after, limit = headers.get("retry-after", ""), headers.get("ratelimit", "")
    seconds = re.fullmatch(r"(\d+)", after) or re.search(r"t=(\d+)", limit)
    return float(seconds[1]) if seconds else None


def _is_network(error: BaseException) -> bool:
    """Tell whether there was no answer, or none that could be read (a page of a proxy instead of JSON)."""
    kind = type(error)
    return kind.__module__.partition(".")[0] in _NETWORK or kind in (ConnectionError, TimeoutError, JSONDecodeError)


def in_words(error: Exception, repo: str, endpoint: str, revision: str | None = None) -> Exception:
    """Return a failure of huggingface_hub as a sentence with the next step; any other error as it is.

    No address of a request is repeated: storage addresses carry their own permission.
    """
    from huggingface_hub import errors

    if isinstance(error, LoraToolsError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpace(f"{repo}: the disk is full", hint="Free some space and run it again; it goes on from there.")

    def is_a(kind: type[BaseException]) -> bool:
        return any(isinstance(cause, kind) for cause in chain(error))

    code = status(error)
    if is_a(errors.OfflineModeIsEnabled):
        return offline(repo)
    if is_a(errors.GatedRepoError):
        then = f"then {_LOGIN}" if code == 401 else "with the account that you are logged in with"
        return HubError(f"{repo} is gated", hint=f"Accept its licence at {endpoint}/{repo}, {then}.")
    if is_a(errors.RepositoryNotFoundError):
        return HubError(f"{repo}: no such repository, or a private one", hint=f"Check the name; or {_LOGIN}.")
    if is_a(errors.RevisionNotFoundError):
        return HubError(f"{repo} has no revision {revision or 'main'!r}")
    if is_a(errors.RemoteEntryNotFoundError):
        return HubError(f"{repo}: a file that was listed is gone")
    if is_a(errors.LocalEntryNotFoundError) and code is None and not passes(error):
        return HubError(f"{repo}: the cache does not hold it, and the Hub was not asked")
    if code is not None:
        return _refused(error, code, repo)
    if passes(error):
        first = next(cause for cause in chain(error) if _is_network(cause) or "Consistency" in str(cause))
        if type(first).__name__.startswith("Connect"):
            hint = "Check the connection, and HF_ENDPOINT if it is set."
            return HubError(f"{repo}: {endpoint} cannot be reached: {_first_line(first)}", hint=hint)
        reason = "a file arrived incomplete" if "Consistency" in str(first) else _first_line(first)
        return HubError(f"{repo}: {endpoint} did not answer as it should: {reason}", hint="Try again later.")
    if any(type(cause).__module__.startswith(("huggingface_hub", "hf_xet")) for cause in chain(error)):
        return HubError(f"{repo}: {_first_line(error)}")
    return error


def offline(repo: str) -> HubError:
    """Return the error of a repository that is not in the cache, while the Hub must not be asked."""
    return HubError(f"{repo}: HF_HUB_OFFLINE is set, and the cache does not hold it", hint="Unset HF_HUB_OFFLINE.")


def _refused(error: Exception, code: int, repo: str) -> HubError:
    message = next((getattr(cause, "server_message", None) for cause in chain(error)), None)
    tail = f": {_clean(message)}" if message else ""
    if code == 401 and "credentials" in (message or ""):
        return HubError(f"{repo}: the Hub does not accept the token", hint="Log in again with `hf auth login`.")
    if code == 401:
        return HubError(f"{repo}: the Hub asks who you are", hint=f"{_LOGIN[0].upper()}{_LOGIN[1:]}.")
    if code == 403:
        return HubError(f"{repo}: you may not do this{tail}", hint=f"If another account may, {_LOGIN}.")
    if code == 429:
        wait = _named_wait(error)
        after = f"Try again in {wait:.0f} seconds" if wait else "Try again later"
        return HubError(f"{repo}: the Hub's rate limit is reached", hint=f"{after}; it is higher for who is logged in.")
    if code >= 500:
        return HubError(f"{repo}: the Hub has a fault of its own (status {code})", hint="Try again later.")
    return HubError(f"{repo}: the Hub refused (status {code}){tail}")


def _first_line(error: BaseException) -> str:
    return _clean(str(error)) or type(error).__name__


def _clean(text: str) -> str:
    first = text.strip().splitlines()[0] if text.strip() else ""
    return re.sub(r"hf_[A-Za-z0-9_-]+", "hf_…", re.sub(r"\?\S*", "", first))[:300].rstrip(".")
