"""A file and what lies beside it become one output: all of them have their names, or none has.

The kernel renames one file at a time. So the others come first, what was there is kept, and a plan of it all lies in
the scratch folder: whoever sweeps that after a kill puts back what was there, unless the file itself had its name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from loratools.storage.atomic.place import put
from loratools.storage.atomic.undisturbed import undisturbed

_PLAN, _OLD = ".together.json", ".old"


def put_together(scratch: Path, target: Path, names: Sequence[str], *, force: bool) -> None:
    """Give the file `target.name` in `scratch` its place, and the files `names` theirs beside it.

    Of `names` those that are not in `scratch` go where they lie beside the target. Raises `FileExistsError` where the
    target exists and `force` is not set, and `OSError`; then all is as it was.
    """
    new = [name for name in names if (scratch / name).exists()]
    old = [name for name in names if os.path.lexists(target.with_name(name))]
    with undisturbed():
        try:
            if new or old:
                (scratch / _OLD).mkdir()
                (scratch / f"{_PLAN}.new").write_text(json.dumps(new), encoding="utf-8", newline="\n")
                (scratch / f"{_PLAN}.new").replace(scratch / _PLAN)
            for name in old:
                target.with_name(name).rename(scratch / _OLD / name)
            for name in new:
                put(scratch / name, target.with_name(name), scratch / _OLD / name, force=False)
            put(scratch / target.name, target, scratch / _OLD / target.name, force=force)
        except BaseException:
            put_back(scratch, target)
            raise


def put_back(scratch: Path, target: Path) -> None:
    """Put back what lay beside `target`, where the run of a scratch folder ended before its file had its name."""
    if not (scratch / _PLAN).is_file() or not (scratch / target.name).exists():
        return
    for name in json.loads((scratch / _PLAN).read_text(encoding="utf-8")):
        if not (scratch / name).exists():
            with suppress(FileNotFoundError):
                target.with_name(name).rename(scratch / name)
    for path in sorted((scratch / _OLD).iterdir()):
        path.rename(target.with_name(path.name))
