"""Pages that show what is in adapters and merges: one HTML file each, of our own drawing, that needs nothing else.

pages      what each kind of page shows, one file a kind
charts     heat maps, lines and bars as inline SVG
arrange    modules by layer and projection
scale      colours and round numbers of an axis
page       the frame of a page, its sections, figures and tables
style      how it looks
subjects   the inputs of a page, opened and named
numbers    numbers and names as a page shows them
markup     text that is escaped, and elements
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from loratools.adapter.model import Adapter
from loratools.decisions import decided
from loratools.dialects import InMemory
from loratools.errors import InvalidOption, OutputRefused
from loratools.options import Options
from loratools.parallel import Progress, no_progress
from loratools.reports import pages
from loratools.reports.subjects import Source, opened
from loratools.storage import atomic
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.sources import Location, session
from loratools.surgery.inputs import as_list

_ENDINGS = (".html", ".htm")


@dataclass(frozen=True, slots=True)
class ReportPage:
    """What was written: the file, its bytes, the `kind` of page that its inputs make, the page's name and headline."""

    output: str
    kind: str
    name: str
    lead: str
    nbytes: int


@session()
def report(
    inputs: Source | Sequence[Source],
    output: Location,
    *,
    base: Location | Checkpoint | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> ReportPage:
    """Write a page about adapters or a merge: one HTML file that needs no network, no script and no other file.

    What the page shows follows from what the inputs are. Its numbers are those of `spectrum`, `compare`, `certify` and
    `verify`; every figure has them as a table below it. Equal inputs give equal bytes, and no path of the machine is in
    them.

    Args:
        inputs: One input or several: paths, `hf://` references, open adapters and models.
        output: The file to write, NAME.html, which may lie in an input's folder; it must not exist, unless `force`.
        base: The base model (a path, a reference, or an open `Checkpoint`), for ‖ΔW‖/‖W‖, for Table 7 of the LoRA
            paper, and for changes that depend on it. Default: none, and a page without them.
        seed: A whole number that draws what is random on the page: the control of a comparison, the probes of a merge.
            Default: 0.
        force: Whether to replace an output that exists. Default: no.
        progress: Called with the bytes of models read since the last call, from any thread, where a page of a merge or
            of an extraction is made. Default: nobody is told.

    Returns:
        What was written, and which kind of page it is.

    Raises:
        InvalidOption: An option cannot be, or no page is made of these inputs.
        IncompatibleAdapter: The inputs do not belong together.
        BadFile, UnsupportedAdapter, UnknownKind: An input cannot be read.
        OutputRefused: The output exists, or its name does not end in .html.

    Example:
        >>> report("adapter", "page.html").kind
        'adapter'
    """
    Options().number("seed", seed, least=0).flag("force", force).done()
    atomic.sweep(output)
    target = Path(output)
    sources = cast(list[Source], as_list(cast(Adapter | InMemory, inputs)))
    if not sources:
        raise InvalidOption("a page is made of at least one adapter or model, and none was given")
    if target.suffix.lower() not in _ENDINGS:  # which no input has: a page may lie among them, and replaces none
        raise OutputRefused(f"{target}: a page is an HTML file", hint="Give it a name that ends in .html.")
    atomic.check_output(target, force=force)
    subjects = opened(sources, base, seed, progress or no_progress)
    kind = pages.of(subjects)
    decided("%s: a page of kind %s, which is made of %s", target, kind, pages.get(kind).NEEDS)
    made = pages.get(kind).page(subjects)
    content = made.draw().encode("utf-8")
    with atomic.new_file(target, force=force) as scratch:
        scratch.write_bytes(content)
    return ReportPage(atomic.spelled(target), kind, made.name, made.lead, len(content))
