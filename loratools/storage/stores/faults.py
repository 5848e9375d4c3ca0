"""What to say of the failures of a store, and which of them may pass. No address is repeated as obstore has it."""

from __future__ import annotations

import re

from loratools.errors import LoraToolsError, StoreError
from loratools.storage.stores.address import shown

_CREDENTIALS = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket.",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket.",
    "az": "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or what else your account needs.",
}
_PLACES = {
    "s3": "Check its name, its region and the endpoint (AWS_ENDPOINT).",
    "az": "Check its name, the account and the endpoint (AZURE_STORAGE_ENDPOINT).",
}
_VARIABLES = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
_METADATA = ("169.254.", "metadata.google", "metadata/identity")  # where machines of a cloud ask who they are
_SCHEMES = ("s3://", "gs://", "az://", "https://", "http://")


class Short(Exception):
    """Fewer bytes arrived than were asked for; asking again may help."""


def changed(place: str) -> StoreError:
    """Return the error of an object that is another than when it was listed."""
    return StoreError(
        f"{place}: changed while it was read; nothing was made of it",
        hint="Run it again when nothing else writes it.",
    )


def passes(error: BaseException) -> bool:
    """Tell whether the same request may succeed later: a body that was cut, or is too short."""
    if isinstance(error, Short):
        return True
    if isinstance(error, LoraToolsError):
        return False
    text = str(error)
    return type(error).__name__ == "GenericError" and _status(text) is None and not _credentials(text)


def in_words(error: Exception, place: str, scheme: str) -> Exception:
    """Return a failure of obstore as a sentence with the next step; any other error as it is.

    Args:
        error: What obstore raised.
        place: The address that was asked, as it may be shown.
        scheme: `s3`, `gs`, `az`, `https` or `http`.
    """
    if isinstance(error, LoraToolsError):
        return error
    if found := re.search(r"Requested (\d+)\.\.(\d+), got (\d+)\.\.(\d+)", str(error)):
        first, last, begin, end = map(int, found.groups())
        error = Short(f"{end - begin} of {last - first} bytes arrived")
    if isinstance(error, Short):
        hint = "Try again later; a proxy in between may be at fault."
        return StoreError(f"{place}: the store sends less than it is asked for: {error}", hint=hint)
    if not type(error).__module__.startswith("obstore") and not isinstance(error, FileNotFoundError):
        return error
    text, kind, code = str(error), type(error).__name__, _status(str(error))
    what = _CREDENTIALS.get(scheme, "Check the address.")
    if "NoSuchBucket" in text or "ContainerNotFound" in text:
        return StoreError(f"{place}: no such bucket", hint=_PLACES.get(scheme, "Check its name."))
    if isinstance(error, FileNotFoundError):
        return StoreError(f"{place}: no such object", hint="Check the key; it may have been removed meanwhile.")
    if kind == "PreconditionError":
        return changed(place)
    if _credentials(text):
        return StoreError(f"{place}: no credentials for it were found", hint=what)
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or code in (401, 403):
        return StoreError(f"{place}: the store does not let you{_code(text)}", hint=f"If another account may: {what}")
    if code is not None and code >= 500:
        return StoreError(f"{place}: the store has a fault of its own (status {code})", hint="Try again later.")
    if code is not None:
        return StoreError(f"{place}: the store refused (status {code}{_code(text)})")
    if "scheme is not allowed" in text or "BadScheme" in text:
        hint = f"Set {_VARIABLES.get(scheme, 'AWS')}_ALLOW_HTTP=true for a store of your own."
        return StoreError(f"{place}: the endpoint is http://, which is not allowed", hint=hint)
    if kind == "NotSupportedError" or "range" in text.lower().partition("debug source")[0]:
        return StoreError(f"{place}: it cannot be read in parts: {_first(text)}")
    return StoreError(f"{place}: the store did not answer as it should: {_first(text)}", hint="Try again later.")


def _credentials(text: str) -> bool:
    """Tell whether obstore looked for credentials where a machine of a cloud has them, and there were none."""
    return any(place in text for place in _METADATA) or "Account must be specified" in text


def _status(text: str) -> int | None:
    found = re.search(r"status code: (\d{3})", text)
    return int(found[1]) if found else None


def _code(text: str) -> str:
    """Return the name that a store gives to its refusal, which holds nothing of who asked."""
    found = re.search(r"<Code>(\w{1,60})</Code>", text)
    return f": {found[1]}" if found else ""


def _first(text: str) -> str:
    """Return the last part of the first line of obstore's text, without addresses."""
    line = shown(text.strip().splitlines()[0] if text.strip() else "no reason given")
    line = re.sub(r"\S*(?:" + "|".join(map(re.escape, _SCHEMES)) + r")\S*", "it", line)
    return line.rpartition(" - ")[2].strip()[:200].rstrip(".")
