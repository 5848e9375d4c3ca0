"""A weight of several names taken apart: the tensors that an output needs, and what config.json then has to say.

What is written is read alike by every version of transformers that has the class. Where that cannot be, it is refused:
a class that scales the input of its head only while it is tied; names that a version ties whatever config.json says,
but that are to differ; a file that names its tensors as the inner model does, beside which a head is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from loratools.adapter.placement.shared import architectures
from loratools.errors import IncompatibleAdapter

if TYPE_CHECKING:
    from loratools.adapter.placement.classes import Name, Tie
    from loratools.adapter.placement.shared import Ties

    Changes = Mapping[tuple[Tie, Name], Collection[int]]
    """Which changes, by number, act on each name that any acts on."""

_BOTH = "--tied both changes the shared weight."

Left = Mapping[str, list[frozenset[str]]]
"""What each version of transformers still ties, by the names' keys."""


def apart(
    ties: Ties, tensors: Mapping[str, Any], config: Mapping[str, Any], changes: Changes
) -> tuple[Callable[[Tie], Collection[str]], dict[str, str], dict[str, Any]]:
    """Return the names under which an output stores each tie, new tensor -> the base's, and fields of config.json.

    Raises `IncompatibleAdapter` where no output is read alike by every version of transformers.
    """
    if ties.model is not None and ties.model.scaled and any(tie.has_head for tie in ties.ties):
        raise IncompatibleAdapter(
            f"--tied untie: {ties.model.name} scales the input of its head by d_model**-0.5 while it is tied, and not "
            "when it is untied, so every output would change",
            hint=_BOTH,
        )
    fields = _fields(ties, config)
    left = ties.model.keys({**config, **fields}) if ties.model else {}
    _refuse_kept(ties, left, changes)
    own: dict[Tie, list[str]] = {}
    copies: dict[str, str] = {}
    for tie in ties.ties:
        own[tie] = [each.tensor for each in tie.names if each.tensor]
        for each in tie.names:
            if each.tensor is None and ((tie, each) in changes or not _stays(each, tie, left)):
                name = _new(each, ties, tensors, config)
                copies[name] = tie.stored[0]
                own[tie].append(name)
    return lambda tie: own[tie], copies, fields


def _stays(name: Name, tie: Tie, left: Left) -> bool:
    """Tell whether every version still ties a name to one that is stored."""
    stored = {each.key for each in tie.names if each.tensor}
    return bool(left) and all(any(name.key in group and group & stored for group in groups) for groups in left.values())


def _refuse_kept(ties: Ties, left: Left, changes: Changes) -> None:
    """Raise `IncompatibleAdapter` where names that a version always ties would differ.

    transformers 5 leaves apart what is stored with other numbers, whatever config.json says.
    """
    for tie in ties.ties:
        for group in left.get("4", ()):
            acting = {str(each.name): changes.get((tie, each), ()) for each in tie.names if each.key in group}
            if len(set(map(tuple, acting.values()))) > 1:
                raise IncompatibleAdapter(
                    "--tied untie: transformers 4 keeps "
                    f"{', '.join(name.removesuffix('.weight') for name in acting)} one weight, whatever config.json "
                    "says, and the adapter does not change all of them alike",
                    hint=_BOTH,
                )


def _new(each: Name, ties: Ties, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return the name of a tensor that the output gains; raise `IncompatibleAdapter` where it would not be read."""
    if each.name is None:
        raise IncompatibleAdapter(
            f"--tied untie: what {', '.join(architectures(config))} calls its head is not known; under another name it "
            "is not loaded",
            hint=_BOTH,
        )
    prefix = ties.model.prefix if ties.model else ""
    if not prefix or any(name.startswith(prefix) for name in tensors):
        return each.name
    if each.name.startswith(f"{prefix}."):
        return each.name.removeprefix(f"{prefix}.")
    raise IncompatibleAdapter(
        f"--tied untie: this base names its tensors without {prefix!r}, as the model without its head does, and "
        f"transformers 4 does not load {each.name} beside them",
        hint=f"Load the base with transformers' {ties.model.name if ties.model else ''} and save it; merge into that.",
    )


def _fields(ties: Ties, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json that take the ties away."""
    if ties.model is not None:
        return ties.model.untied(config)
    fields: dict[str, Any] = {"tie_word_embeddings": False}
    inner = config.get("text_config")
    if isinstance(inner, Mapping):  # transformers 4 reads the inner one, transformers 5 the outer one
        fields["text_config"] = {**inner, "tie_word_embeddings": False}
    return fields
