"""A file or a folder appears under its final name whole, or not at all.

Work happens in a scratch folder `.NAME.partial-XXXXXXXX…` beside the output, locked by the process that writes it; at
the end it is written to the disk itself, and renamed.

    afar          outputs in a store, which are sent
    outputs       what is new under its name, and what an output may not be
    hidden        making and locking the folders beside an output
    inputs        inputs are what they were when they were opened
    kept          folders that outlive a run: what was fetched, and parts of an output
    leftovers     hidden folders beside an output: removing those of killed runs
    locks         whose they are
    machine       whose they are where a lock does not tell
    names         names that not every system can write
    place         the final name, in one step
    sync          what was written outlasts a power cut
    system        what systems differ in
    together      a file and what lies beside it, all at once
    fleeting      folders that go away with the run
    undisturbed   steps that no signal tears apart

What reads needs `inputs` only: the others are imported when the functions of `outputs`, all of them here too, are asked
for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratools.storage.atomic import afar
    from loratools.storage.atomic.outputs import (
        check_output,
        check_space,
        free_space,
        kept_folder,
        new_file,
        new_files,
        new_folder,
        new_output,
        part_folder,
        part_folders,
        part_room,
        refuse_inputs,
        remove,
        spelled,
        sweep,
        temporary,
    )

__all__ = [
    "afar",
    "check_output",
    "check_space",
    "free_space",
    "kept_folder",
    "new_file",
    "new_files",
    "new_folder",
    "new_output",
    "part_folder",
    "part_folders",
    "part_room",
    "refuse_inputs",
    "remove",
    "spelled",
    "sweep",
    "temporary",
]


def __getattr__(name: str) -> Any:
    """Return a function of `outputs`, or `afar`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from loratools.storage.atomic import outputs

    return getattr(outputs, name)
