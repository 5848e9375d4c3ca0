"""The toolkit for LoRA adapter files: read every layout, tell the truth about it, and operate on it exactly.

A LoRA adapter is a low-rank change of a model, W' = W + s·B·A. A first example:

    import loratools

    print(loratools.inspect("adapter").groups)               # ranks, scalings, target modules: from headers alone
    loratools.convert("adapter", "sealed", base="base")      # now it knows which base model it belongs to
    report = loratools.merge("base", "sealed", "merged")     # exact, streamed; a wrong base is refused
    assert loratools.verify("merged", "base", "sealed").ok   # proved by another path than the one that made it

Every function is a command of `loratools` under the same name. An input is a path, a reference such as
`hf://org/name` or `s3://bucket/key`, or an opened value (`Adapter`, `Checkpoint`); where several adapters are expected,
one may stand alone. An error is a `LoraToolsError`: one sentence, every problem, and what to do. `import loratools` is
light: torch is imported by what computes.

Look
    inspect          what is in this file? An adapter or a model, from headers alone
    spectrum         the singular values of every ΔW = s·B·A, and the rank that they need
    compare          how alike two adapters are: angles between their changes, and their subspaces
    compare_all      how alike every two of the adapters below a folder are
    find             the adapters below a folder: which are the same, by what they do, and which nearly
    hash             which model, or which adapter, exactly is this? Its hash, in tiers
    report           a page of figures about adapters or a merge: one HTML file
    estimate         what a LoRA would cost: parameters, bytes, optimizer state; the rank for a budget
Check
    verify           how far is a model from base + adapters? A proof that shares no arithmetic with merge
    validate         an adapter against the specification, clause by clause
    certify          how much of a fine-tune an adapter holds, layer by layer
Change
    merge            W' = W + Σ w·s·B·A in float32, rounded once
    gather           make the output of a merge whose parts several processes wrote
    unmerge          take adapters out of a merged model again, bit for bit where the merge kept what that takes
    switch           take one adapter out and put another in, in one pass
    combine          one adapter of several: weighted sums, TIES, DARE, KnOTS and more
    dequantize       a quantized model in 16 bit
    resize           other ranks, with the least error there is
    extract_svd      the low-rank change of a full fine-tune, near the optimum
    convert          another dialect; or seal an adapter with its base's hash
    edit             trigger words, tags, base, thumbnail, any entry, or nothing private: no tensor is touched
Again
    run_recipe       several commands from one file of YAML, and only what is not up to date
    recipe_of        how an output was made, by its own record: the recipe that makes it again, byte for byte
Share
    push, pull       an adapter or a model to the Hub in one commit, and back, every file checked
Open and save
    open_adapter     any dialect -> `Adapter`: updates by module, their factors unread
    save_adapter     an `Adapter` -> any dialect, with the losses that this means
    Checkpoint.open  a model -> `Checkpoint`: tensors by name, unread
    MergeOptions     the options of a merge as one value, checked when it is built
    BaseIdentity     which base model an adapter belongs to
Learn
    list_dialects    the layouts that can be read and written
    run_demo         a guided tour on a small trained model inside the package

`from loratools import live` is LoRA in a model that runs: attach, train, load, switch, take away; see `help(live)`.
`help(loratools.merge)` explains every parameter. On the command line: `loratools --help`. The README shows all of it at
work; the format is specified in spec/.
"""

from __future__ import annotations

from loratools.storage import resolvers
from loratools.version import __version__

TYPE_CHECKING = False  # as checkers know it; typing itself takes longer to import than all of this
if TYPE_CHECKING:
    from loratools.adapter.model import Adapter, BaseIdentity
    from loratools.cli._recipes import recipe_of, run_recipe
    from loratools.demo.tour import run_demo
    from loratools.dialects import list_dialects, open_adapter, save_adapter
    from loratools.errors import LoraToolsError
    from loratools.hub.pull import pull
    from loratools.hub.push import push
    from loratools.live.cost import estimate
    from loratools.reports import report
    from loratools.storage.checkpoint import Checkpoint
    from loratools.surgery.combine import combine
    from loratools.surgery.compare import compare
    from loratools.surgery.convert import convert
    from loratools.surgery.dequantize import dequantize
    from loratools.surgery.edit import edit
    from loratools.surgery.extract import extract
    from loratools.surgery.extract import extract as extract_svd
    from loratools.surgery.extract.certify import certify
    from loratools.surgery.find import compare_all, find
    from loratools.surgery.hash import hash_checkpoint
    from loratools.surgery.hash import hash_checkpoint as hash
    from loratools.surgery.inspect import inspect
    from loratools.surgery.merge import merge
    from loratools.surgery.merge.options import MergeOptions
    from loratools.surgery.resize import resize
    from loratools.surgery.sharing.parts import gather
    from loratools.surgery.spectrum import spectrum
    from loratools.surgery.switch import switch
    from loratools.surgery.unmerge import unmerge
    from loratools.surgery.validate import validate
    from loratools.surgery.verify import verify
else:
    # Checkers read the imports above; at run time a name is imported when it is asked for (PEP 562).
    _HOME = {
        "Adapter": "loratools.adapter.model:Adapter",
        "BaseIdentity": "loratools.adapter.model:BaseIdentity",
        "Checkpoint": "loratools.storage.checkpoint:Checkpoint",
        "LoraToolsError": "loratools.errors:LoraToolsError",
        "MergeOptions": "loratools.surgery.merge.options:MergeOptions",
        "certify": "loratools.surgery.extract.certify:certify",
        "combine": "loratools.surgery.combine:combine",
        "compare": "loratools.surgery.compare:compare",
        "compare_all": "loratools.surgery.find:compare_all",
        "convert": "loratools.surgery.convert:convert",
        "dequantize": "loratools.surgery.dequantize:dequantize",
        "edit": "loratools.surgery.edit:edit",
        "estimate": "loratools.live.cost:estimate",
        "extract": "loratools.surgery.extract:extract",
        "extract_svd": "loratools.surgery.extract:extract",
        "find": "loratools.surgery.find:find",
        "gather": "loratools.surgery.sharing.parts:gather",
        "hash": "loratools.surgery.hash:hash_checkpoint",
        "hash_checkpoint": "loratools.surgery.hash:hash_checkpoint",
        "inspect": "loratools.surgery.inspect:inspect",
        "list_dialects": "loratools.dialects:list_dialects",
        "merge": "loratools.surgery.merge:merge",
        "open_adapter": "loratools.dialects:open_adapter",
        "pull": "loratools.hub.pull:pull",
        "push": "loratools.hub.push:push",
        "recipe_of": "loratools.cli._recipes:recipe_of",
        "report": "loratools.reports:report",
        "resize": "loratools.surgery.resize:resize",
        "run_demo": "loratools.demo.tour:run_demo",
        "run_recipe": "loratools.cli._recipes:run_recipe",
        "save_adapter": "loratools.dialects:save_adapter",
        "spectrum": "loratools.surgery.spectrum:spectrum",
        "switch": "loratools.surgery.switch:switch",
        "unmerge": "loratools.surgery.unmerge:unmerge",
        "validate": "loratools.surgery.validate:validate",
        "verify": "loratools.surgery.verify:verify",
    }

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module 'loratools' has no attribute {name!r}")
        from importlib import import_module

        module, _, attribute = _HOME[name].partition(":")
        return getattr(import_module(module), attribute)

    def __dir__():
        return list(__all__)


__all__ = [
    "Adapter", "BaseIdentity", "Checkpoint", "LoraToolsError", "MergeOptions", "__version__", "certify", "combine",
    "compare", "compare_all", "convert", "dequantize", "edit", "estimate", "extract", "extract_svd", "find", "gather",
    "hash", "hash_checkpoint", "inspect", "list_dialects", "merge", "open_adapter", "pull", "push", "recipe_of",
    "report", "resize", "run_demo", "run_recipe", "save_adapter", "spectrum", "switch", "unmerge", "validate",
    "verify",
]  # fmt: skip

resolvers.install("hf://", "loratools.hub.pull", "resolve")
for _scheme in ("s3://", "gs://", "az://", "https://", "http://"):
    resolvers.install(_scheme, "loratools.storage.stores.skeleton", "resolve")
    resolvers.install_output(_scheme, "loratools.storage.stores.landing", "Landing")
