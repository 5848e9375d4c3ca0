"""What lies at a path: file names, headers and small JSON files, read when a dialect asks for them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from loratools.adapter.model import Adapter
from loratools.adapter.parts import factors_of
from loratools.decisions import detailed, wants_detail, warned
from loratools.errors import BadFile
from loratools.storage.beside.links import refuse_outside
from loratools.storage.header import Header, read_header
from loratools.storage.lazy import LazyTensor
from loratools.storage.pickles import SUFFIXES as PICKLES
from loratools.storage.sources import Location, Need, absent, local, open_file
from loratools.storage.strict_json import read_json

if TYPE_CHECKING:
    from loratools.storage.checkpoint import Checkpoint

WEIGHTS = (".safetensors", ".gguf", ".npz", *PICKLES)
"""Endings of files that can hold an adapter's tensors."""

_Read = TypeVar("_Read")
_MODULE = r"\d+_\w+"  # a folder of a sentence-transformer: 1_Pooling, 2_Dense
_LFS = b"version https://git-lfs"


class Evidence(NamedTuple):
    """How sure a dialect is that a listing is its own: a score, and the reason for it.

    100        the file names its own format
    80 to 99   a config says so, and the tensors agree
    50 to 79   the names of the tensors say so
    below 50   a guess
    """

    score: int
    reason: str


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Listing:
    """An adapter's folder, or a single file.

    `path`     the path that the user named
    `folder`   where the files lie; the parent of a single file
    `files`    names of all files in the folder, sorted, or of the single one
    `alpha`    the user's alpha, for dialects whose files do not record it
    `base`     the base model, for dialects whose names or layout only the base explains
    `initial`  whether the caller subtracts the adapter that training started from (PiSSA, OLoRA, CorDA)
    `enabled`  which of the projections in one weight have factors, for loralib's MergedLinear
    """

    path: Path
    folder: Path
    files: tuple[str, ...]
    alpha: float | None = None
    base: Checkpoint | None = None
    initial: bool = False
    enabled: tuple[bool, ...] | None = None
    _read: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        path: Location,
        *,
        need: Need = "adapter",
        alpha: float | None = None,
        base: Checkpoint | None = None,
        initial: bool = False,
        enabled: tuple[bool, ...] | None = None,
    ) -> Listing:
        """List a folder or a single file; raise `BadFile` if there is nothing at the path or it cannot be listed.

        `need` says what will be read of a reference: `header` fetches headers alone.
        """
        path = local(path, need)
        try:
            if path.is_dir():
                with os.scandir(path) as entries:
                    files = tuple(sorted([entry.name for entry in entries if entry.is_file()]))
                return cls(path, path, files, alpha, base, initial, enabled)
            if path.is_file():
                return cls(path, path.parent, (path.name,), alpha, base, initial, enabled)
        except OSError as error:
            raise BadFile(f"{path}: cannot be read: {error.strerror}") from None
        raise absent(path)

    @property
    def single(self) -> bool:
        """Whether the path is one file and not a folder."""
        return self.path != self.folder

    def only(self, *endings: str) -> str | None:
        """Return the name of the one file that ends so; None where there is none, or more than one."""
        names = [name for name in self.files if name.endswith(endings)]
        return names[0] if len(names) == 1 else None

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the files that by their ending can hold tensors."""
        return tuple(name for name in self.files if name.endswith(WEIGHTS))

    @property
    def own_weights(self) -> list[str]:
        """Names of those of `weights` that are not a trainer's own, such as an optimizer's state."""
        from loratools.storage.beside.along import is_of_training

        return [name for name in self.weights if not is_of_training(name)]

    @property
    def factors(self) -> list[str]:
        """Names of factors in its safetensors files, where most of their names are such: an adapter, in any dialect."""
        headers = (self.header(name) for name in self.weights)
        return factors_of(tensor for header in headers if header for tensor in header.tensors)

    def json(self, name: str) -> dict[str, Any] | None:
        """Return a JSON object in the folder, also beside a single file; None if there is no such file.

        Raises `BadFile` where it is damaged, too large, or no file.
        """
        path = self.folder / name

        def read() -> dict[str, Any] | None:
            refuse_outside([path], self.folder)
            return read_json(path) if os.path.lexists(path) else None

        return self._once(name, read)

    def header(self, name: str) -> Header | None:
        """Return the header of a safetensors file, or None if the file is of another kind; raise `BadFile`."""
        if not name.endswith(".safetensors"):
            return None

        def read() -> Header:
            self._inside(name)
            return read_header(self.folder / name)

        return self._once(name, read)

    def tensors(self, name: str) -> dict[str, LazyTensor]:
        """Return the tensors of a safetensors file (without torch) or of a `torch.save` file (with it), unread.

        A `torch.save` file is opened once, however many dialects look at it.
        Raises `BadFile` for a Git-LFS pointer, a damaged file, a pickle with more than tensors, and an empty one.
        """
        header = self.header(name)
        if header is not None:
            return {tensor: LazyTensor.stored(spec) for tensor, spec in header.tensors.items()}
        path = self.folder / name

        def read() -> dict[str, LazyTensor]:
            from loratools.storage.pickles.archive import read_pickled

            self._inside(name)
            specs = read_pickled(path)
            if not specs:
                raise BadFile(
                    f"{path}: an empty state dict ({path.stat().st_size} bytes), as some early training scripts saved"
                    " it",
                    hint="The trained tensors are not in this file. Look for another checkpoint of the run.",
                )
            return {tensor: LazyTensor.stored(spec) for tensor, spec in specs.items()}

        return dict(self._once(name, read))

    def _once(self, name: str, read: Callable[[], _Read]) -> _Read:
        """Return what `read` makes of a file, or raise the `BadFile` that it raised, and ask it only once."""
        if name not in self._read:
            try:
                self._read[name] = read()
            except BadFile as error:
                self._read[name] = error
        result = self._read[name]
        if isinstance(result, BadFile):
            raise result.with_traceback(None)
        return cast(_Read, result)

    def _inside(self, name: str) -> None:
        """Raise `BadFile` for a link that leads out of the folder, unless it is the file that the user named."""
        if not self.single:
            refuse_outside([self.folder / name], self.folder)

    def tell_unread(self, adapter: Adapter) -> set[Path]:
        """Warn of files in the folder that can hold tensors, and of which the adapter that was read has none.

        Returns the files that were read. For who wants every detail, what each module is.
        """
        for module, update in adapter.updates.items() if wants_detail() else ():
            detailed("%s: %s, rank %s, scaling %g", module, update.kind, update.rank, update.scaling)
        files = adapter.files()
        read = {file.name for file in files}
        unread = [name for name in self.weights if name not in read]
        unread = [name for name in self.own_weights if name in unread] if unread else []
        unread += self._modules_beside()
        if unread and read and not self.single:
            warned("%s: %s is read; not looked at: %s", self.path, ", ".join(sorted(read)), ", ".join(unread[:12]))
        return files

    def _modules_beside(self) -> list[str]:
        """Return the weights of a sentence-transformer's other modules, such as `2_Dense/model.safetensors`."""
        if self.single or "modules.json" not in self.files:
            return []
        folders = sorted(path for path in self.folder.iterdir() if path.is_dir() and re.fullmatch(_MODULE, path.name))
        files = (file for path in folders for file in sorted(path.iterdir()) if file.name.endswith(WEIGHTS))
        return [f"{file.parent.name}/{file.name}" for file in files]

    def check(self) -> None:
        """Raise `BadFile` where a Git-LFS pointer, or the damage of a lone file, keeps every dialect from an adapter.

        Only a lone file of tensors is opened: among several, some may be a trainer's own, which no dialect reads.
        """
        weights = self.own_weights
        for name in weights:
            with open_file(self.folder / name) as file:
                check_pointer(file.read(len(_LFS)), self.folder / name)
        if len(weights) == 1 and weights[0].endswith((".safetensors", *PICKLES)):
            self.tensors(weights[0])


def by_convert(listing: Listing, option: str, what: str) -> str:
    """Return the hint to give an option where it can be given: `convert` has it, and every command reads the result."""
    from shlex import quote

    return f"{what}: loratools convert {quote(str(listing.path))} -o OUTPUT {option}"


def check_pointer(begin: bytes, path: Path) -> None:
    """Raise `BadFile` where a file begins as a Git-LFS pointer does."""
    if begin.startswith(_LFS):
        raise BadFile(f"{path}: this is a Git-LFS pointer, not the file itself", hint="Fetch it with `git lfs pull`.")
