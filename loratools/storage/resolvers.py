"""Who makes a path of a reference such as `hf://org/name`: a module and its function, by name, imported when met.

`import loratools` fills it, so it imports nothing: what comes before a program's handlers of signals must be short.
"""

from __future__ import annotations

RESOLVERS: dict[str, tuple[str, str]] = {}
"""Beginning of a reference -> module and function."""


def install(prefix: str, module: str, function: str) -> None:
    """Have `function` of `module` resolve references that begin with `prefix`.

    It is called as `function(reference, need, watch, folder)` and returns a local path; `folder()` makes a folder for
    headers, which goes away when they have been read.
    """
    RESOLVERS[prefix] = (module, function)
