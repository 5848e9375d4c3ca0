"""The layouts of adapter files: each is read into an `Adapter`, and written from one.

A dialect is a module or a package here, found by its name, with

    SUMMARY            what it is and who writes it, in one line
    EXTRA              the pip extra that it needs, or None
    FILES              endings of the single files that it can write; () if it writes folders only
    CANNOT             what no file of it can say, a phrase for each; `losses` names them for an adapter
    detect(listing)    `Evidence` that a listing is of this dialect, or None; from names, headers and small files only
    read(listing)      the `Adapter`: every tensor becomes part of it, or an exception lists all problems
    losses(adapter)    every `Loss` that writing this adapter would mean
    write(adapter, target, force)   write the folder `target`, or a file of an ending in FILES, by `storage.atomic`, and
                         return the adapter as it was written, under the dialect's names and without what is lost

The entries:

    comfy       ComfyUI, ai-toolkit, musubi-tuner, BFL, XLabs        mlx         MLX-LM
    diffusers   Hugging Face diffusers                               peft        Hugging Face PEFT
    gguf        llama.cpp                                            tinker      Tinker, read only
    kohya       sd-scripts and LyCORIS                               torchtune   torchtune
    loralib     microsoft/loralib                                    _frame      what dialects are made of
    loratools   our own format                                       megatron    Megatron-Bridge and NeMo, read only
    mistral     mistral-finetune, read only                          mlx_vlm     MLX-VLM, read only
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loratools.adapter.model import Adapter, Loss
from loratools.decisions import decided, warned, warnings_to
from loratools.dialects._frame import folders
from loratools.dialects._frame.dialect import Dialect, DialectSummary
from loratools.dialects._frame.listing import Evidence, Listing
from loratools.dialects._frame.once import once
from loratools.dialects._frame.read_as import ReadAs, check_alpha, check_told, told
from loratools.dialects._frame.values import HasAdapter, InMemory, is_pair, is_saved
from loratools.errors import InvalidOption, LoraToolsError, UnknownName
from loratools.options import Options, modules_in, near

if TYPE_CHECKING:
    from loratools.storage.checkpoint import Checkpoint

__all__ = [
    "Dialect", "DialectSummary", "Evidence", "HasAdapter", "InMemory", "Listing", "ReadAs", "candidates_for",
    "check_alpha", "detect", "get", "is_adapter", "is_pair", "list_dialects", "located", "names", "open_adapter",
    "save_adapter", "told",
]  # fmt: skip


@cache
def names() -> tuple[str, ...]:
    """Return the names of all dialects, sorted.

    Example:
        >>> "peft" in names(), "_frame" in names()
        (True, False)
    """
    return tuple(modules_in(__path__))


@cache
def get(name: str) -> Dialect:
    """Return a dialect's module.

    Args:
        name: One of `names()`.

    Raises:
        UnknownName: There is no such dialect; the error lists those that exist.

    Example:
        >>> get("gguf").FILES
        ('.gguf',)
    """
    if name not in names():
        raise UnknownName(f"no dialect {name!r}; loratools knows {', '.join(names())}{near(name, names())}")
    return cast(Dialect, import_module(f"{__name__}.{name}"))


def list_dialects() -> tuple[DialectSummary, ...]:
    """List the layouts of adapter files that loratools reads and writes, sorted by name.

    Example:
        >>> "peft" in [dialect.name for dialect in list_dialects()]
        True
    """
    dialects = ((name, get(name)) for name in names())
    return tuple(DialectSummary(name, each.SUMMARY, each.EXTRA, each.FILES, each.CANNOT) for name, each in dialects)


def detect(listing: Listing, candidates: Sequence[tuple[str, Evidence]] | None = None) -> tuple[str, Evidence]:
    """Return the name of the dialect with the best evidence, and the evidence.

    Args:
        listing: What lies at a path, `Listing.of(path)`.
        candidates: The dialects that know it, `candidates_for(listing)`. Default: they are asked.

    Raises:
        UnknownKind: No dialect knows it, or the best two are equally sure.
        BadFile: No dialect knows it, because a file in it cannot be opened.

    Example:
        >>> detect(Listing.of("my-lora"))[0]  # doctest: +SKIP
        'peft'
    """
    candidates = candidates or candidates_for(listing)
    if not candidates:
        listing.check()
        raise folders.unknown(listing, [f"{name}: {get(name).SUMMARY}" for name in names()])
    best = max(evidence.score for _, evidence in candidates)
    first = sorted((pair for pair in candidates if pair[1].score == best), key=lambda pair: pair[0])
    if len(first) > 1:
        raise folders.several(listing, [(name, evidence.reason) for name, evidence in first])
    return first[0]


_HIGHEST = {
    "comfy": 85, "diffusers": 95, "kohya": 90, "loralib": 70, "mistral": 95, "mlx": 90, "mlx_vlm": 90, "peft": 90,
    "tinker": 95, "torchtune": 85,
}  # fmt: skip
"""The highest scores of dialects that never are quite sure, 100: the others are asked, and imported, before them."""


def candidates_for(listing: Listing) -> list[tuple[str, Evidence]]:
    """Return the dialects that know a listing, with their evidence, but for those that know it less well than one."""
    known: list[tuple[str, Evidence]] = []
    for name in sorted(names(), key=lambda name: -_HIGHEST.get(name, 100)):
        if any(evidence.score > _HIGHEST.get(name, 100) for _, evidence in known):
            break
        if evidence := get(name).detect(listing):
            known.append((name, evidence))
    return known


def is_adapter(listing: Listing, dialect: str | None = None) -> bool:
    """Tell whether a dialect (default: any) reads a listing, from names, headers and small files only."""
    surest = sorted(names(), key=lambda name: -_HIGHEST.get(name, 100))
    return any(get(name).detect(listing) for name in ([dialect] if dialect else surest))


def located(listing: Listing, dialect: str | None = None) -> Listing:
    """Return where an adapter lies that a `dialect` (default: any) reads: there, or in the only folder below with one.

    Raises `UnknownKind` that names them where several folders have one, or one below other weights.
    """
    if listing.single or is_adapter(listing, dialect):
        return listing
    return folders.only_below(listing, lambda below: is_adapter(below, dialect))


def open_adapter(
    path: str | PathLike[str] | Adapter | InMemory,
    *,
    dialect: str | None = None,
    alpha: float | None = None,
    base: Checkpoint | None = None,
    initial: bool = False,
    enabled: tuple[bool, ...] | None = None,
) -> Adapter:
    """Read an adapter from a folder or a single file, or take one that is in memory.

    Reads names, dtypes and shapes; the numbers of a factor are loaded when they are asked for. Imports torch for
    pickles only.

    Args:
        path: A folder, also one above the only adapter, or a single file; an adapter held in memory, which is copied:
            a pair (state dict, config) with the config as in adapter_config.json or PEFT's object, a `PeftModel` (its
            active adapter), a live handle (the adapter in use); a state dict as any dialect saves it, alone or in a
            pair with the entries of its file's header. A state dict maps names to tensors, or to arrays of numpy. An
            `Adapter` comes back as it is.
        dialect: The dialect to read it as, one of `names()`. Default: the one that `detect` finds.
        alpha: The alpha of training, a finite number, for every module, as of files that record none; it wins over what
            a file records, with a warning. Our own format refuses it. Default: the file's.
        base: The base model, whose names (kohya, GGUF) or heads (torchtune, GGUF, Megatron) explain the file. Default:
            what the file itself says; where that is too little, the adapter is refused.
        initial: Read an adapter whose training changed the base model (PiSSA, OLoRA, CorDA): the caller subtracts the
            adapter that training started from. Default: it is refused.
        enabled: Which of the projections in one weight have factors, in order (loralib's MergedLinear). Default: a file
            with such a weight is refused.

    Raises:
        InvalidOption: `alpha` is no finite number, or it or `enabled` is for another dialect than this file's; the
            value holds no adapter, or several.
        UnknownKind: No dialect reads it, or two are equally sure.
        BadFile, InvalidFormat: It is damaged, or contradicts itself; the error lists all problems.
        UnsupportedAdapter: It is sound and not read; the error lists all reasons.

    Example:
        >>> adapter = open_adapter("my-lora")  # doctest: +SKIP
        >>> adapter.updates["model.layers.0.self_attn.q_proj"].rank  # doctest: +SKIP
        8
    """
    path, dialect, alpha = told(path, dialect, alpha)
    if is_saved(path):
        return _of_state(path, dialect=dialect, alpha=alpha, base=base, initial=initial, enabled=enabled)
    stated = {"dialect": dialect, "alpha": alpha, "enabled": enabled}
    check_told(stated, initial, in_memory=not isinstance(path, str | PathLike))
    if not isinstance(path, str | PathLike):
        from loratools.dialects.peft.held import held

        return held(path, initial=initial)
    if dialect is not None:
        get(dialect)
    return once(Listing.of(path, alpha=alpha, base=base, initial=initial, enabled=enabled), dialect, _open)


def _open(listing: Listing, dialect: str | None) -> Adapter:
    """Read the adapter of a listing, or of the only folder below it that has one, in a dialect, or in its own."""
    candidates = [] if dialect else candidates_for(listing)
    listing = listing if candidates else located(listing, dialect)
    name, evidence = (dialect, None) if dialect else detect(listing, candidates)
    if listing.enabled is not None and name != "loralib":
        raise InvalidOption(f"{listing.path}: enabled is for files of loralib, and this is one of {name}")
    adapter = get(name).read(listing)
    listing.tell_unread(adapter)
    decided("%s: dialect %s: %s", listing.path, name, evidence.reason if evidence else "as the call says")
    return adapter if adapter.dialect == name else replace(adapter, dialect=name)


def _of_state(value: Any, *, dialect: str | None, alpha: float | None, **options: Any) -> Adapter:
    """Return the adapter of a state dict that no config of PEFT goes with, read as the file that it would be."""
    from loratools.dialects._frame import memory

    said: list[str] = []
    with memory.as_file(value) as place:

        def named(text: str) -> str:
            return text.replace(str(place), str(memory.STATE))

        try:
            with warnings_to(said.append):
                bare = dialect is None and isinstance(value, Mapping)
                if bare and alpha is None and detect(Listing.of(place))[0] == "peft":
                    from loratools.dialects.peft.held import refuse_unscaled

                    refuse_unscaled(value)
                adapter = memory.kept(open_adapter(place, dialect=dialect, alpha=alpha, **options))
        except LoraToolsError as error:
            error.reword(named)
            raise
    for text in said:
        warned("%s", named(text))
    return adapter


def save_adapter(
    adapter: str | PathLike[str] | Adapter | InMemory,
    path: str | PathLike[str],
    *,
    dialect: str = "loratools",
    allow_loss: bool = False,
    force: bool = False,
) -> list[Loss]:
    """Write an adapter in a dialect, whole or not at all; return what the dialect could not say.

    Args:
        adapter: An adapter, from `open_adapter` or another function, or what `open_adapter` takes.
        path: The output: a single file where it ends as a file of tensors does (`.safetensors`, `.gguf`, …), else a
            folder.
        dialect: The dialect to write, one of `names()`. Default: `"loratools"`, our own format.
        allow_loss: Write the adapter without what the dialect cannot say. Default: any loss is an error.
        force: Replace an output that exists. Default: that is an error.

    Returns:
        What the dialect could not say; [] if nothing.

    Raises:
        LossyConversion: Something would be lost, and `allow_loss` is not set, or everything would; the error lists
            every loss.
        OutputRefused: The output exists, is also an input, or ends as no file of this dialect does.
        UnknownName: There is no such dialect.
        NoSpace: The disk is too full.

    Example:
        >>> save_adapter(open_adapter("my-lora"), "my-lora.gguf", dialect="gguf", allow_loss=True)  # doctest: +SKIP
        []
    """
    from loratools.storage import atomic

    atomic.sweep(path)
    Options().flag("allow_loss", allow_loss).flag("force", force).done()
    get(dialect)
    return write_adapter(open_adapter(adapter), Path(path), dialect=dialect, allow_loss=allow_loss, force=force)[1]


def write_adapter(
    adapter: Adapter, path: Path, *, dialect: str, allow_loss: bool, force: bool
) -> tuple[Adapter, list[Loss]]:
    """Do what `save_adapter` says; return also the adapter as it was written, under the dialect's names."""
    from loratools.dialects._frame.writing import written

    return written(get(dialect), adapter, path, dialect, allow_loss, force)
