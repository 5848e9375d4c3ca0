"""Whether a base stores the weight of a linear layer [in, out], as transformers' Conv1D does, or [out, in].

Known model types are known by name. Remote code is told by evidence: a bias counts outputs, so that an unsquare weight
with one shows its own orientation, and that of square ones of its name or of the whole model; and PEFT writes
`fan_in_fan_out` where it wrapped a Conv1D, and takes it back where it wrapped an nn.Linear.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loratools.adapter.kinds import Update
from loratools.adapter.naming.wrappers import LINEAR
from loratools.adapter.site import NoPlace
from loratools.storage.codecs.turned import CONV1D

Shapes = Mapping[str, tuple[int, ...]]

_NAMES = CONV1D["gpt2"]


def fitted(update: Update, shapes: Sequence[tuple[int, ...]]) -> Update:
    """Return an update that knows the shape of its weight, the first that fits; its parts may leave it open.

    Raises `NoPlace` with why the likeliest does not fit.
    """
    problems = []
    for shape in shapes:
        try:
            return update.fitted(shape)
        except ValueError as error:
            problems.append(str(error))
    raise NoPlace(problems[0])


@dataclass(frozen=True, slots=True, eq=False)
class Conv1D:
    """What a base's names, shapes and model type say of its linear layers.

    `own` maps a layer to whether its bias shows that it is stored [in, out]; layers that show nothing are not in it.
    `by_name` has the same of all layers of one name, None where they differ.
    """

    shapes: Shapes
    model_type: str
    own: Mapping[str, bool]
    by_name: Mapping[str, bool | None]
    of_names: bool | None  # of layers of GPT-2's names; None where they show nothing, or different things
    of_all: bool | None

    @classmethod
    def of(cls, shapes: Shapes, model_type: str) -> Conv1D:
        """Read the biases of all layers."""
        own, votes = {}, defaultdict(list)
        for name, shape in shapes.items():
            layer = name.removesuffix(".weight")
            bias = shapes.get(f"{layer}.bias") if layer != name else None
            if len(shape) == 2 and shape[0] != shape[1] and bias in (shape[:1], shape[1:]):
                own[layer] = bias == shape[1:]
                votes[_last(layer)].append(own[layer])
        of_names = _same(turned for name in _NAMES for turned in votes[name])
        return cls(shapes, model_type, own, {n: _same(v) for n, v in votes.items()}, of_names, _same(own.values()))

    def stored_in_out(self, tensor: str, wanted: tuple[int, ...], region: tuple[int, ...], swapped: bool) -> bool:
        """Tell whether `region` of a tensor is stored [in, out], for an update of shape `wanted`, (out, in).

        `swapped` is the adapter's `fan_in_fan_out`. Raises `ValueError` with why it is ambiguous.
        """
        layer = tensor.removesuffix(".weight")
        last, square = _last(layer), wanted[0] == wanted[1]
        if (known := self._known(last)) is not None:
            return known
        if last not in _NAMES:
            return self._other(layer, wanted == region[::-1], square, swapped)
        if not square:
            return wanted == region[::-1]
        if self.of_names is False and swapped:
            raise ValueError("the adapter says fan_in_fan_out, and the biases say that the base stores it [out, in]")
        if self.of_names is None and not swapped:
            raise ValueError(f"square, and {self._says} whether the base stores it [in, out]")
        return self.of_names is not False

    def likely(self, layer: str) -> bool:
        """Tell whether a layer is stored [in, out], without an adapter's word; False where nothing says so."""
        last = _last(layer)
        if (known := self._known(last)) is not None:
            return known
        if (shown := self._shown(layer)) is not None:
            return shown
        return self.of_names is True if last in _NAMES else self.of_all is True and self._has_bias(layer)

    def of_weight(self, tensor: str, swapped: bool, stated: bool | None = None) -> tuple[tuple[int, ...], ...]:
        """Return the shapes (out, in, …) that the weight of a module may have by that of its tensor, likelier first.

        `stated` is whether it is stored [in, out], where that is known.
        """
        shape = self.shapes[tensor]
        if stated is None:
            layer = tensor.removesuffix(".weight")
            turned = swapped and self._known(_last(layer)) is not False  # fan_in_fan_out is no word on embeddings
            stated = len(shape) == 2 and (self.likely(layer) or turned)
        return (shape[::-1], shape) if stated else (shape,)

    def _known(self, last: str) -> bool | None:
        if self.model_type in CONV1D:
            return last in CONV1D[self.model_type]
        return False if self.model_type in LINEAR else None

    def _other(self, layer: str, fits_turned: bool, square: bool, swapped: bool) -> bool:
        if (shown := self._shown(layer)) is not None:
            return shown
        if not square:
            return fits_turned and (swapped or self.of_all is True)
        if self.of_all is True and not swapped and self._has_bias(layer):
            raise ValueError(
                "square, and the base stores other layers with a bias [in, out], while the adapter does not say "
                "fan_in_fan_out"
            )
        # Every Conv1D has a bias.
        return swapped and (self.of_all is True or (self.of_all is None and self._has_bias(layer)))

    def _shown(self, layer: str) -> bool | None:
        """Return what the bias of a layer shows, or those of the layers of its name in other blocks."""
        return self.own[layer] if layer in self.own else self.by_name.get(_last(layer))

    def _has_bias(self, layer: str) -> bool:
        return f"{layer}.bias" in self.shapes

    @property
    def _says(self) -> str:
        return f"model_type {self.model_type!r} does not tell" if self.model_type else "no config.json tells"


def _last(layer: str) -> str:
    return layer.rpartition(".")[2]


def _same(turned: Iterable[bool]) -> bool | None:
    votes = set(turned)
    return votes.pop() if len(votes) == 1 else None
