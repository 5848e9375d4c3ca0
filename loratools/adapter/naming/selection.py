"""Which modules a command works on: names, globs, or regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from loratools.adapter.naming.compact import suffixes
from loratools.adapter.naming.wrappers import Names
from loratools.errors import LoraToolsError, counted

KINDS = ("linear", "conv", "embedding", "experts")
"""Kinds of modules whose change can be factored."""

_UNET = ("lora_unet_", "lycoris_")
_FLAT: Mapping[str, tuple[str, ...]] = {
    "unet": _UNET,
    "diffusion_model": _UNET,
    "transformer": ("lora_transformer_", *_UNET),
    "prior": ("lora_prior_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_", "lora_prior_te_"),
    "text_encoder_2": ("lora_te2_", "lora_te3_"),  # Flux keeps its T5 there, and sd-scripts calls it te3
    "text_encoder_3": ("lora_te3_",),
}
"""Component of a module -> what stands before its flattened name in files of kohya's trainers, and of LyCORIS."""

_KOHYA = ("lora_", "lycoris_")


@dataclass(frozen=True, slots=True)
class Selection:
    """What is factored, saved whole, or dropped.

    `include` and `exclude` choose among all tensors, `save` names those that are kept whole, `kinds` what is factored
    of the rest, and `drop_whole` leaves out everything that is not factored. Patterns are those of `matches`.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    save: tuple[str, ...] = ()
    kinds: frozenset[str] = frozenset({"linear", "conv", "experts"})
    drop_whole: bool = False

    def dropped(self, path: str) -> str | None:
        """Return why a module or parameter is left out on request, or None."""
        if self.include and not any(matches(pattern, path) for pattern in self.include):
            return "not in --include"
        return next((f"--exclude {pattern}" for pattern in self.exclude if matches(pattern, path)), None)

    def saved(self, path: str) -> str | None:
        """Return which pattern asks to keep it whole, or None."""
        return next((f"--save-module {pattern}" for pattern in self.save if matches(pattern, path)), None)

    def check(self, paths: Iterable[str]) -> None:
        """Raise `LoraToolsError` that lists every pattern which matches none of the paths, with similar names."""
        paths = list(paths)
        names = Names(paths)
        options = (("--include", self.include), ("--exclude", self.exclude), ("--save-module", self.save))
        problems = [
            f"{option} {pattern}: matches nothing" + (f"; nearest: {', '.join(near)}" if near else "")
            for option, patterns in options
            for pattern in patterns
            if not any(matches(pattern, path) for path in paths)
            for near in [names.nearest(pattern)]
        ]
        if problems:
            raise LoraToolsError(
                f"{counted(len(problems), 'pattern names', 'patterns name')} no module of this model", problems
            )


def flattened(module: str) -> list[str]:
    """Return the names that kohya's trainers and LyCORIS may have for a module of an image model; none for others.

    >>> flattened("text_encoder_2.text_model.encoder.layers.0.mlp.fc1")
    ['lora_te2_text_model_encoder_layers_0_mlp_fc1', 'lora_te3_text_model_encoder_layers_0_mlp_fc1']
    """
    component, _, rest = module.removeprefix("model.").partition(".")
    return [prefix + rest.replace(".", "_") for prefix in _FLAT.get(component, ()) if rest]


def matches(pattern: str, path: str) -> bool:
    """Tell whether a pattern names a module or parameter.

    A plain name means the path or what follows one of its dots (`q_proj`, as PEFT's target_modules); a glob is held
    against the same (`layers.*.mlp.*`); `re:` begins a regular expression for the whole path (as PEFT's string). The
    path of a parameter counts with and without `.weight`. A pattern that begins as kohya's flattened names do
    (`lora_`, `lycoris_`) is held against those of an image model's module too.

    >>> matches("q_proj", "model.layers.0.self_attn.q_proj"), matches("re:.*[qv]_proj", "h.0.v_proj")
    (True, True)
    >>> matches("lora_te1_*_fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1")
    True
    """
    names = {path, path.removesuffix(".weight")}
    if pattern.removeprefix("re:").startswith(_KOHYA):
        names |= {flat for name in names for flat in flattened(name)}
    if pattern.startswith("re:"):
        try:
            return any(re.fullmatch(pattern[3:], name) for name in names)
        except re.error as error:
            raise LoraToolsError(f"{pattern!r} is no regular expression: {error}") from None
    return any(fnmatchcase(suffix, pattern) for name in names for suffix in suffixes(name))
