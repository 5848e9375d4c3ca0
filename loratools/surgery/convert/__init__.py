"""Rewrite an adapter in another dialect; sealing it with its base's hash is a conversion into our own.

`as_lora` makes a LoRA of an adapter of another kind first; `finite` tells of NaN and infinity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from loratools import dialects
from loratools.adapter.identity import same_name
from loratools.adapter.input import AdapterInput
from loratools.adapter.model import Adapter, BaseIdentity, Loss, Step
from loratools.adapter.naming.wrappers import Names
from loratools.adapter.placement.codes import refuse_codes
from loratools.adapter.placement.gguf import STATED, resolve_on, under_adapters_names
from loratools.adapter.placement.image import named_for
from loratools.adapter.placement.layers import replicated
from loratools.adapter.placement.resolve import Placement
from loratools.adapter.placement.settle import settle
from loratools.adapter.placement.stacks import as_peft_has_it
from loratools.adapter.placement.tied import onto_stored
from loratools.adapter.placement.whole import resolve_replacements
from loratools.decisions import decided, warned
from loratools.dialects._frame.losses import kept_identity
from loratools.dialects.peft import profiles
from loratools.format import manifest
from loratools.format.digest import adapter_digest, same_tensors
from loratools.format.record import TOOL
from loratools.options import Options, TrainedOn
from loratools.parallel import Progress
from loratools.storage import atomic, sources
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import encodings, logical, stored_names
from loratools.storage.lazy import LazyTensor
from loratools.storage.sources import Location, session
from loratools.surgery.convert.as_lora import LoraError, as_lora
from loratools.surgery.convert.finite import warn_not_finite
from loratools.surgery.folding import carried
from loratools.surgery.hash import hash_checkpoint, hash_tensors
from loratools.surgery.inputs import (
    AdapterSource,
    ModelSource,
    check_model_type,
    is_planning,
    names_of,
    planned,
    read_as,
    typed_model,
)

_OF_NO_TENSOR = frozenset({"base model", "provenance", "alpha", "layer_replication"})
"""What losses are of besides modules and tensors."""

BASE_CONFIG = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
"""Fields of a base's config.json that an adapter keeps as `settings["base_config"]`: GGUF's layout depends on them."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written: dialect, digest of the adapter's tensors, the base identity it carries, and what was lost.

    `output_digest` is that of what was written, as `hash` has it: another one where the dialect has other modules.
    `lora` says how near the LoRA is that was made of it; None where none was.
    """

    output: str
    dialect: str
    digest: str
    modules: int
    base: BaseIdentity | None
    losses: tuple[Loss, ...]
    output_digest: str
    lora: LoraError | None = None


@session()
def convert(
    adapter: AdapterSource,
    output: Location,
    *,
    to: str = "loratools",
    dialect: str | None = None,
    alpha: float | None = None,
    enabled: tuple[bool, ...] | None = None,
    model_type: str | None = None,
    base: ModelSource | None = None,
    onto: ModelSource | None = None,
    original: ModelSource | None = None,
    trained_on: TrainedOn | None = None,
    base_id: str | None = None,
    profile: profiles.Name | None = None,
    to_lora: int | None = None,
    allow_loss: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write an adapter in another dialect; with a base, sealed with its hash where the dialect can record one.

    The bytes of the factors stay as they are wherever the dialect stores them alike.

    Args:
        adapter: A path, an `hf://` reference, an open `Adapter`, or one held in memory.
        output: The file or folder to write; it must not exist, unless `force`. A name that ends as files of tensors do
            (`.safetensors`, …) makes a single file.
        to: The dialect (`loratools.list_dialects()`). Default: `"loratools"`, which PEFT reads too.
        dialect: The dialect to read a path as, one of `list_dialects()`. Default: what is found in the file.
        alpha: The alpha that the adapter was trained with, for files that do not record it; it wins over one that
            it records. Default: the file's.
        enabled: Which of the projections in one weight have factors, in order (loralib's MergedLinear). Default: a file
            with such a weight is refused.
        model_type: What the base is (`"gpt2"`, …), where its config.json does not say it. Default: what that says.
        base: The base model: a path, an `hf://` reference, or an open `Checkpoint`. It tells what some dialects need to
            know, and all of it is read to seal the adapter. Default: the adapter stays sealed as it is, or unsealed.
        onto: A base that is folded, as AWQ and SmoothQuant leave it: an adapter of its original is carried into its
            basis, in float32, to be served beside it, and is sealed with it. It takes the place of `base`. Default: the
            adapter stays in the basis that it was trained in.
        original: With `onto`: the model that it was made from, from whose norms the scales are read. Default: none.
        trained_on: With `onto`: which of the two the adapter saw, `"original"` or `"folded"`, which carries nothing.
            Default: the one that it is sealed with, else the original.
        base_id: The base model's name to record, such as `"org/model"`. Default: the one that the adapter states.
        profile: With `to="peft"`: make the adapter as a consumer of PEFT adapters reads it, `"serving"` (what all of
            them read), `"vllm"` or `"sglang"`. Default: as PEFT reads it.
        to_lora: Make a LoRA of at most this rank of an adapter of any kind: of each ΔW the nearest, by its truncated
            SVD, with its error in the result. Kinds whose change depends on the weight need `base`. Default: every
            module keeps its kind.
        allow_loss: Whether to write it where the dialect cannot say everything; the losses are in the result. Default:
            no, they are an error.
        force: Whether to replace an output that exists. Default: no.
        progress: Called with the bytes of the base hashed since the last call, from any thread. Default: nobody is
            told.

    Returns:
        What was written: dialect, digest of the adapter's tensors, base identity, losses.

    Raises:
        InvalidOption: A word or a switch cannot be.
        UnknownKind: There is no such dialect.
        LossyConversion: The dialect, or the profile's consumer, cannot say something; every loss is listed.
        IncompatibleAdapter: The adapter does not fit the base, or is carried onto one and no original is given.
        UnsupportedAdapter: A module's kind cannot be carried.
        WrongBase: The original is not that of the base, or not the one that the adapter is sealed with.
        OutputRefused: The output exists, is the input, or the dialect writes no such file.

    Example:
        >>> convert("adapter", "sealed", base="base").base.sealed
        True
    """
    atomic.sweep(output)
    options = Options()
    if profile is not None:
        options.word("profile", profile, profiles.Name)
        if to != "peft":
            options.problems.append(f"profile is {profile!r}, which is for to='peft', not {to!r}")
    if onto is not None and base is not None:
        options.problems.append("base and onto are both given; onto seals with its base too")
    for name, value in {"original": original, "trained_on": trained_on}.items():
        if onto is None and value is not None:
            options.problems.append(f"{name} is {value!r}, which is for an adapter that is carried onto a base")
    if trained_on is not None:
        options.word("trained_on", trained_on, TrainedOn)
    options.number("to_lora", to_lora, least=1, optional=True)
    options.flag("allow_loss", allow_loss).flag("force", force).text("base_id", base_id).done()
    dialects.get(to)
    model = base if onto is None else onto
    check_model_type(model_type, model)
    (adapter,) = read_as(adapter, dialect, alpha)
    checkpoint = None if model is None else logical(typed_model(model, model_type))
    converted = dialects.open_adapter(adapter, base=checkpoint, enabled=enabled)
    if checkpoint is not None:
        refuse_codes(converted, checkpoint)
        checkpoint = under_adapters_names(replicated(checkpoint, [converted]), [converted])
    error = None
    if to_lora is not None and not is_planning():
        converted, error = as_lora(converted, to_lora, checkpoint)
    records = _records(to)
    if records:
        parameters = {"from": converted.dialect, "to": to, "sealed": checkpoint is not None}
        step = Step("convert", TOOL, parameters, ({"digest": adapter_digest(converted)},))
        converted = replace(converted, provenance=(*converted.provenance, step))
    if base_id is not None:
        converted = replace(converted, base=replace(converted.base or BaseIdentity(), id=base_id))
    if checkpoint is not None:
        ((settled,), notes) = settle(checkpoint, [AdapterInput(converted, digest=adapter_digest(converted))])
        for note in notes:
            warned("%s", note)
        if onto is not None and not is_planning():
            settled = carried(checkpoint, settled, original, trained_on)
        converted = _with_config(settled.adapter, checkpoint)
        converted = as_peft_has_it(
            converted, Names(checkpoint.specs, checkpoint.config), checkpoint.shapes, checkpoint.config
        )
        in_base = named_for(converted, checkpoint)
        if records and not is_planning():
            converted = seal(in_base, checkpoint, progress)
        else:
            _placed(in_base, checkpoint)  # which raises if it does not fit
            lost_of = dialects.get(to).losses
            if len(lost_of(in_base)) < len(lost_of(converted)):  # the base tells of which family names are
                converted = in_base
    if is_planning():
        atomic.check_output(Path(output), force=force)
        losses = dialects.get(to).losses(converted)
        planned("convert", output, [*names_of([adapter]), *([checkpoint.path] if checkpoint else [])],
                nbytes=sum(lazy.nbytes for lazy in converted.tensors().values()), dialect=to, modules=len(converted),
                losses=[str(loss) for loss in losses], sealed=bool(records and checkpoint),
                **{"from": converted.dialect})  # fmt: skip
    if profile is not None:
        converted = profiles.apply(converted, profile, checkpoint.shapes if checkpoint else None)
    warn_not_finite(converted)
    written, losses = dialects.write_adapter(converted, Path(output), dialect=to, allow_loss=allow_loss, force=force)
    # The digest is that of the modules under their own names, whatever the dialect calls them, unless some are lost.
    digest = adapter_digest(converted if {loss.where for loss in losses} <= _OF_NO_TENSOR else written)
    own = digest if same_tensors(converted, written) else adapter_digest(written)
    kept = kept_identity(converted, losses)
    return Conversion(atomic.spelled(output), to, digest, len(written.updates), kept, tuple(losses), own, error)


def seal(adapter: Adapter, base: Checkpoint, progress: Progress | None = None) -> Adapter:
    """Return the adapter bound to a base: all three tiers of its hash, its model type, and for each module the base
    tensor and how that is stored.

    The `tensors` tier holds the tensors that the adapter touches. Raises `IncompatibleAdapter` if it does not fit.
    """
    untied, placements, whole = _placed(adapter, base)
    replacements = {name: tensor for name, tensor in whole.items() if name in base.specs}
    touched = {*(placement.site.tensor for placement in placements), *replacements} & base.specs.keys()
    stored = {name: stored_names(name, base) for name in touched}
    hashes = hash_checkpoint(base.stored or base, progress=progress)
    coded = {base.origin(name): base.specs[name] for name in touched if base.specs[name].encoding}
    stated = adapter.base or BaseIdentity()
    name, commit = sources.origin(base.path)
    if commit and (stated.id is None or same_name(stated.id, name) is not False):
        stated = replace(stated, id=name, revision=commit)
    digests = {name: hashes.tensors[name] for name in sorted(set().union(*stored.values()))}
    identity = BaseIdentity(
        stated.id, stated.revision, hashes.schema, digests, hashes.root, base.model_type,
        hashes.logical if encodings(base) else None, hash_tensors(coded),
    )  # fmt: skip
    first = {placement.module: placement.site for placement in reversed(placements)}  # the first one counts
    tensor_of = {module: stored[site.tensor][0] for module, site in first.items() if site.tensor in stored}
    name_of = {id(tensor): stored[name][0] for name, tensor in replacements.items()}
    tensor_of |= {path: name_of[id(lazy)] for path, lazy in untied.replacements.items() if id(lazy) in name_of}
    decided("sealed with %s: the digests of %d of its %d tensors", base.path, len(digests), len(base.specs))
    # Where the format's writer looks for base tensors; the file is made anew, so its version is that of this format.
    origin = dict(adapter.settings.get(manifest.ORIGIN, {}))
    if "meaning" not in origin:
        origin.pop("format_version", None)
    for group, paths in (("modules", adapter.updates), ("replacements", adapter.replacements)):
        old = origin.get(group, {})
        entries = {path: {**old.get(path, {}), "tensor": tensor_of[path]} for path in paths if path in tensor_of}
        if entries:
            origin[group] = {**old, **entries}
    orientation = {module: site.transposed for module, site in first.items() if module in adapter.updates}
    settings = {**adapter.settings, manifest.ORIGIN: origin}
    return replace(adapter, base=identity, settings=settings, orientation=orientation)


def _placed(adapter: Adapter, base: Checkpoint) -> tuple[Adapter, list[Placement], dict[str, LazyTensor]]:
    """Return the adapter as it is placed, its placements, and base tensor -> what replaces it.

    Raises `IncompatibleAdapter` unless the adapter fits the base.
    """
    untied = onto_stored(adapter, base.specs, base.config)
    whole = resolve_replacements(untied, base.shapes, base.config)
    after = base.shapes | {name: tensor.shape for name, tensor in whole.items()}
    return untied, resolve_on(base, untied, after), whole


def _records(dialect: str) -> bool:
    """Tell whether a dialect can record a base's hash and the provenance: ask it about an adapter of nothing else."""
    probe = Adapter({}, base=BaseIdentity(root=manifest.NO_DIGEST), provenance=(Step("convert", TOOL),))
    lost = {loss.where for loss in dialects.get(dialect).losses(probe)}
    return not lost & {"base model", "provenance"}


def _with_config(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return the adapter with what the base's config.json says of its architecture and heads."""
    inner = base.config.get("text_config")
    config = {**base.config, **inner} if isinstance(inner, Mapping) else base.config
    kept = {name: config[name] for name in BASE_CONFIG if isinstance(config.get(name), str | int)}
    kept |= {STATED: config[STATED]} if STATED in config else {}
    return replace(adapter, settings={**adapter.settings, "base_config": kept}) if kept else adapter
