"""loratools dialects"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.cli._group import command as make
from loratools.cli._show import Report, fields, plain

if TYPE_CHECKING:
    from loratools.dialects import DialectSummary


@make(section="Learn")
def command() -> Report:
    """List the dialects: the layouts of adapter files that loratools reads and writes.

    \b
    Examples:
      loratools dialects
      loratools dialects --json
    """
    from loratools.dialects import list_dialects

    listed = list_dialects()
    return Report({"dialects": plain(listed)}, fields(*map(_row, listed)))


def _row(dialect: DialectSummary) -> tuple[str, list[str]]:
    lines = [dialect.summary, f"writes: {' or '.join((*dialect.files, 'a folder'))}"]
    if dialect.cannot:
        lines.append(f"cannot say: {'; '.join(dialect.cannot)}")
    if dialect.extra:
        lines.append(f"needs: pip install 'loratools[{dialect.extra}]'")
    return dialect.name, lines
