"""What a handle does with the adapters that it holds: let them act, by name, by row, stacked, or merged."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from loratools.adapter.model import Adapter, Step
from loratools.errors import InvalidOption, LoraToolsError
from loratools.live.below.replay import Replay
from loratools.live.below.stack import who
from loratools.live.uses.merged import Merge, merge, unmerge
from loratools.live.uses.named import ByName, Use
from loratools.live.uses.rows import Rows
from loratools.live.uses.stacks import Stacks
from loratools.live.whole import Whole
from loratools.options import Options, is_finite


@dataclass(slots=True, eq=False)
class Entry:
    """One adapter of a model: its value as it was loaded, or None, and the step that made it, where it is trained."""

    trainable: bool
    adapter: Adapter | None = None
    step: Step | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class Acting:
    """The adapters of one model and which of them act.

    `model` is the model, `sites` its modules with adapters by path, `entries` the adapters by name, `active` what acts,
    None where nothing does; `state` is a merge that is in the weights, `routes` are the blocks of `route` that run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        self.active: Use | None = None
        self.state: Merge | None = None
        self.routes: list[Rows] = []
        self.replay = Replay()
        self.blocks: list[tuple[int, int]] = []  # who is in a block of `off`, `route` or `merged`

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "blocks": []}

    def use(self, which: str | Mapping[str, float] | None) -> None:
        """Let an adapter act, None of them, or several, each with a weight on its scaling.

        Takes microseconds at any size of the model. Raises `InvalidOption` for a name that is not there.
        """
        self._separate("use another adapter")
        pairs = self._pairs(which)
        if isinstance(self.active, Stacks):
            self.active.choose(pairs)
        else:
            self.active = ByName(pairs) if pairs else None

    def acting(self) -> tuple[tuple[str, float], ...]:
        """Return each adapter that acts, with its weight: of rows, each that some row has; of a merge, those in it."""
        return self.active.pairs if self.active is not None else ()

    def _pairs(self, which: str | Mapping[str, float] | None) -> tuple[tuple[str, float], ...]:
        """Return adapters with their weights, in the order in which they were added; raise for what cannot be."""
        if which is not None and not isinstance(which, str | Mapping):
            raise InvalidOption(f"{which!r} is no adapter's name, no mapping of names to weights, and not None")
        wanted = {} if which is None else {which: 1.0} if isinstance(which, str) else dict(which)
        if missing := [name for name in wanted if name not in self.entries]:
            raise self._unknown(missing)
        if wrong := [f"weight of {name} is {w!r}" for name, w in wanted.items() if not is_finite(w)]:
            raise InvalidOption("a weight is a finite number", wrong)
        pairs = tuple((name, float(wanted[name])) for name in self.entries if name in wanted)
        if any(weight != 1 for _, weight in pairs):
            halves = [
                f"{child.path}: trained whole in {name}, which cannot have the weight {dict(pairs)[name]:g}"
                for name, child, _, _ in self.children()
                if isinstance(child, Whole) and child.replaces and dict(pairs).get(name, 1.0) != 1
            ]
            if halves:
                raise InvalidOption("a tensor trained whole is there or is not", list(dict.fromkeys(halves)))
        if len(pairs) > 1 and (twice := self._rows_of_two(wanted)):
            raise InvalidOption("rows of tokens are replaced by one adapter at a time", twice)
        return pairs

    def _rows_of_two(self, names: Collection[str]) -> list[str]:
        """Return a line for each parameter of which two of these adapters replace the same rows."""
        taken: dict[tuple[str, int], str] = {}
        lines = {
            f"{path}: row {row} is that of {taken[path, row]} and of {name}": None
            for name, child, path, _ in self.children()
            if name in names and isinstance(child, Whole)
            for row in child.rows
            if taken.setdefault((path, row), name) != name
        }
        return list(lines)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let no adapter act while the block runs."""
        self._separate("turn adapters off")
        before, pairs = self.active, acting_pairs(self.active)
        if isinstance(before, Stacks):
            before.choose(())
        else:
            self.active = None
        try:
            with self._block():
                yield
        finally:
            self._act_again(before, pairs)

    @contextmanager
    def route(self, names: Sequence[str | None]) -> Iterator[None]:
        """Give each row of the batch an adapter of its own, None being the base, while the block runs.

        Training works, each row's gradient reaching its own adapter; call `backward` inside the block where gradient
        checkpointing repeats the forward. Rows that transformers' `generate` repeats, for beams and returned
        sequences, keep their adapter. A model or a module whose input has other rows than there are names raises
        `IncompatibleAdapter` when it runs; the rows are the first side of an input.

        Args:
            names: One adapter, or None, for each row.

        Raises:
            InvalidOption: There are no names, or no adapter of such a name.
        """
        self._separate("route rows")
        if isinstance(names, str) or not len(names):
            raise InvalidOption(f"names is {names!r}; it has one adapter, or None, for each row of the batch")
        if missing := [name for name in names if name is not None and name not in self.entries]:
            raise self._unknown(missing)
        before, pairs, rows = self.active, acting_pairs(self.active), Rows(names)
        self.active = rows
        self.routes.append(rows)
        try:
            with self._block():
                yield
        finally:
            self._act_again(before, pairs)
            self.routes = [each for each in self.routes if each is not rows]

    def _act_again(self, before: Use | None, pairs: tuple[tuple[str, float], ...]) -> None:
        """After a block, let act what acted before it, `pairs`, as far as it is there still.

        What the block stacked or merged stays stacked or merged: a merged adapter acts by the weights alone.
        """
        now: Use | None = self.active if self.state is None else self.state.before
        rest = tuple(pair for pair in pairs if pair[0] in self.entries)
        use: Use | None = ByName(rest) if rest else None
        if before in self.routes:
            use = before
        elif isinstance(now, Stacks) or (now in self.routes and isinstance(before, Stacks)):
            use = stacks = now if isinstance(now, Stacks) else before
            assert isinstance(stacks, Stacks)
            stacks.choose(rest)
        if self.state is None:
            self.active = use
        else:
            self.state.before = use

    def compiled(self, max_rank: int | None = 16, max_adapters: int = 8) -> None:
        """Stack the factors of all adapters, so that under torch.compile a switch never compiles again.

        Args:
            max_rank: Largest rank that fits, also of later adapters and of mixes; None goes back to single factors.
                Default: 16.
            max_adapters: How many adapters fit. Default: 8.

        Raises:
            InvalidOption: Something does not fit; everything stays as it was.
        """
        self._separate("stack adapters")
        stacks = self.active if isinstance(self.active, Stacks) else None
        if max_rank is None:
            if stacks is not None:
                stacks.close()
                self.active = ByName(stacks.acting) if stacks.acting else None
            return
        options = Options().number("max_rank", max_rank, least=1).number("max_adapters", max_adapters, least=1)
        options.done()
        acting = acting_pairs(self.active)
        fresh = Stacks(self, max_rank, max_adapters)
        fresh.choose(acting)
        self.active = fresh

    def merge(self, which: str | Mapping[str, float] | None = None) -> None:
        """Change the weights themselves, W' = W + s·B·A rounded once, until `unmerge` gives every bit back.

        Args:
            which: An adapter, or several with their weights. Default: what acts now.

        Raises:
            InvalidOption: There is no such adapter, or none acts.
            IncompatibleAdapter: A weight is stored as codes.
        """
        self._separate("merge an adapter")
        pairs = self._pairs(which) if which is not None else acting_pairs(self.active)
        if not pairs:
            raise InvalidOption("no adapter acts; name the one to be merged")
        self.state = merge(self, pairs)
        self.active = self.state

    def unmerge(self) -> None:
        """Give the weights their bits back; what acted before the merge acts again."""
        if self.state is None:
            raise LoraToolsError("nothing is merged into the weights")
        unmerge(self, self.state)
        self.active, self.state = self.state.before, None

    @contextmanager
    def merged(self, which: str | Mapping[str, float] | None = None) -> Iterator[None]:
        """Have adapters in the weights while the block runs: no latency, and the base comes back bit for bit."""
        self.merge(which)
        try:
            with self._block():
                yield
        finally:
            self.unmerge()

    def children(self) -> Iterator[tuple[str, Any, str, str]]:
        """Yield (adapter's name, what it has on a module, the module's path, the parameter that it changes)."""
        for path, module in self.sites.items():
            for name in self.entries:
                yield from ((name, piece, path, "weight") for piece in module.lora.pieces.get(name, ()))
                yield from ((name, whole, path, own) for own, whole in module.lora.whole.get(name, {}).items())

    def ready(self, name: str) -> None:
        """Raise unless an adapter of this name can be added now."""
        self._separate("add an adapter")
        if not isinstance(name, str) or not name:
            raise InvalidOption(f"name is {name!r}; it is a string that is not empty")
        if name in self.entries:
            raise InvalidOption(f"there is an adapter {name!r} already; remove it first, or choose another name")

    def path_of(self, site: Any) -> str:
        """Return the path of a site."""
        return next(path for path, module in self.sites.items() if module is site)

    def _unknown(self, names: Sequence[str]) -> InvalidOption:
        there = ", ".join(self.entries) or "none"
        return InvalidOption(f"no adapter {', '.join(map(repr, names))} here; there are: {there}")

    @contextmanager
    def _block(self) -> Iterator[None]:
        """Remember whose the block is that runs."""
        self.blocks.append(who())
        try:
            yield
        finally:
            self.blocks.pop()

    def _separate(self, what: str) -> None:
        """Raise unless the weights are the base's own, and no other thread or task is in a block of this model."""
        if self.blocks and self.blocks[-1] != who():
            raise LoraToolsError(
                f"another thread or task is in a block of `off`, `route` or `merged` here: wait before you {what}",
                hint="What acts is one for the whole model. Hold a lock around each block and its forwards, put rows "
                "of several adapters into one batch with `route`, or give each thread a copy of the model.",
            )
        if self.state is not None:
            raise LoraToolsError(f"{self.state.name} is merged into the weights: unmerge it before you {what}")


def acting_pairs(use: Use | None) -> tuple[tuple[str, float], ...]:
    """Return the adapters that act in every row, each with its weight; none where rows have adapters of their own."""
    return use.acting if isinstance(use, Stacks) else use.pairs if isinstance(use, ByName) else ()
