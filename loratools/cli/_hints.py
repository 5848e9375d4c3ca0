"""Hints that name an option: one that the running command lacks is said to be another command's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_OPTION = r"(?<![\w-])--[a-z][a-z-]*"
_COMMAND = r"(?:loratools |`){}\b"


def placed(hint: str, command: str, options: Mapping[str, Iterable[str]]) -> str:
    """Return a hint with the commands that have its options, where the one that runs has not and none is named.

    `options` are those of every command, by its name.

    >>> placed("Use --tied untie.", "verify", {"verify": ["--base"], "merge": ["--tied"], "switch": ["--tied"]})
    'Use --tied untie. (--tied is an option of merge and switch)'
    >>> placed("`merge --tied untie` does.", "verify", {"verify": [], "merge": ["--tied"]})
    '`merge --tied untie` does.'
    """
    places = {name: set(of_command) for name, of_command in options.items()}
    told = [name for name in places if re.search(_COMMAND.format(name), hint)]
    added = []
    for option in dict.fromkeys(re.findall(_OPTION, hint)):
        having = [name for name in sorted(places) if option in places[name]]
        if option in places.get(command, ()) or any(name in told for name in having):
            continue
        added.append(owners(option, places).rstrip(". "))
    added = list(filter(None, added))
    return f"{hint} ({'; '.join(added)})" if added else hint


def owners(option: str, options: Mapping[str, Iterable[str]]) -> str:
    """Return a sentence with the commands that have an option, and a space after it; nothing where none has.

    >>> owners("--tied", {"merge": ["--tied"], "switch": ["--tied"], "hash": []})
    '--tied is an option of merge and switch. '
    """
    having = [name for name in sorted(options) if option in options[name]]
    listed = " and ".join(filter(None, (", ".join(having[:-1]), *having[-1:])))
    return f"{option} is an option of {listed}. " if having else ""
