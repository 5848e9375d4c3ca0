"""loratools dialects"""

from __future__ import annotations

from typing import Any

from loratools.cli._group import command as make
from loratools.cli._show import Report, fields


@make(section="Learn")
def command() -> Report:
    """List the dialects: the layouts of adapter files that loratools reads and writes.

    \b
    Examples:
      loratools dialects
      loratools dialects --json
    """
    from loratools.dialects import get, names

    found = [
        {
            "name": name,
            "summary": get(name).SUMMARY,
            "extra": get(name).EXTRA,
            "files": get(name).FILES,
            "cannot": get(name).CANNOT,
        }
        for name in names()
    ]
    return Report({"dialects": found}, fields(map(_row, found)))


def _row(one: dict[str, Any]) -> tuple[str, str]:
    lines = [one["summary"], f"writes: {' or '.join((*one['files'], 'a folder'))}"]
    if one["cannot"]:
        lines.append(f"cannot say: {'; '.join(one['cannot'])}")
    if one["extra"]:
        lines.append(f"needs: pip install 'loratools[{one['extra']}]'")
    return one["name"], "\n".join(lines)
