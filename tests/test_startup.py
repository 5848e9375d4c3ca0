"""What a command imports: a matter of modules, not of time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools.linalg.native import delta, tiles
from tests.conftest import clean_env

PROGRAM = """
import sys
before = set(sys.modules)
from loratools.__main__ import main
sys.argv = ["loratools", *sys.argv[1:]]
code = main()
import json
added = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(json.dumps([code, sorted(added)]), file=sys.stderr)
"""


def imported(arguments: list[str], folder: Path, program: str = PROGRAM) -> set[str]:
    """Run a command line in a fresh interpreter and return the top-level packages it imported, outside the stdlib."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env=clean_env(),
        capture_output=True,
        text=True,
        check=True,
    )
    code, added = json.loads(done.stderr.splitlines()[-1])
    assert code in (0, 1), done.stderr
    return set(added)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["inspect", "--help"], ["merge", "--help"], ["completion", "bash"]]
)
def test_help_imports_only_click(arguments: list[str], prepared: Path) -> None:
    added = imported(arguments, prepared)
    assert added == {"click", "loratools"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "adapter"],
        ["inspect", "sealed", "--modules"],
        ["inspect", "base", "--json"],
        ["validate", "sealed"],
        ["validate", "adapter"],
        ["validate", "sealed", "--base", "base"],
        ["hash", "base"],
        ["dialects"],
    ],
)
def test_header_only_commands_import_neither_torch_nor_numpy(arguments: list[str], prepared: Path) -> None:
    assert imported(arguments, prepared) <= {"click", "loratools", "blake3"}


NEVER = frozenset({
    "bz2", "decimal", "difflib", "hashlib", "hmac", "logging", "lzma", "multiprocessing", "pickle", "pickletools",
    "pkgutil", "secrets", "shutil", "socket", "subprocess", "tempfile", "zipfile",
    "loratools.storage.checkpoint", "loratools.storage.gguf.container", "loratools.storage.pickles.archive",
    "loratools.surgery.base", "loratools.surgery.inputs", "loratools.adapter.placement", "loratools.adapter.weights",
    "loratools.adapter.naming.image", "loratools.adapter.naming.wrappers", "loratools.adapter.naming.llama_cpp",
    "loratools.dialects.comfy", "loratools.dialects.kohya.files", "loratools.dialects.diffusers.files",
    "loratools.dialects.gguf.files", "loratools.dialects.megatron.files", "loratools.dialects.torchtune",
    "loratools.dialects.loralib", "loratools.dialects.peft.typed", "loratools.cli._batch", "loratools.cli._each",
    "loratools.cli._faults", "loratools.cli._hints", "loratools.adapter.naming.loaded",
})  # fmt: skip
"""What neither an adapter of PEFT nor a sealed one needs to be told or checked: other layouts, models, other tools."""

ALSO = {
    "inspect adapter": {"loratools.format.validate", "loratools.adapter.kinds.dora", "loratools.adapter.kinds.conv"},
    "inspect sealed": {"loratools.dialects.peft", "loratools.dialects.kohya", "loratools.dialects.mlx"},
    "validate sealed": {"loratools.dialects", "loratools.surgery.inspect"},
}
"""And what one of them does not need."""


WHOLE = PROGRAM.replace('added = {name.split(".")[0] for', "added = {name for").replace(
    " - set(sys.stdlib_module_names)", ""
)
"""The program that tells every module by its whole name."""


@pytest.mark.parametrize("arguments", sorted(ALSO))
def test_what_a_small_command_leaves_alone(arguments: str, prepared: Path) -> None:
    added = imported(arguments.split(), prepared, WHOLE)
    assert "loratools.cli._run" in added
    assert added & (NEVER | ALSO[arguments]) == set()


NEVER_IN_A_MERGE = frozenset({
    "decimal", "hashlib", "hmac", "multiprocessing", "numbers", "pickle", "pickletools", "random", "secrets",
    "subprocess", "tempfile", "unicodedata", "zipfile",
    "loratools.adapter.converted", "loratools.adapter.fusing", "loratools.adapter.weights",
    "loratools.adapter.kinds._bias", "loratools.adapter.kinds._rowwise", "loratools.adapter.kinds.dora",
    "loratools.adapter.kinds.locon",
    "loratools.adapter.naming.conversions", "loratools.adapter.naming.loaded", "loratools.adapter.naming.llama_cpp",
    "loratools.adapter.naming.image.families", "loratools.adapter.naming.image.readings",
    "loratools.adapter.naming.selection",
    "loratools.adapter.placement.classes", "loratools.adapter.placement.experts", "loratools.adapter.placement.image",
    "loratools.dialects.comfy", "loratools.dialects.diffusers.files", "loratools.dialects.gguf.files",
    "loratools.dialects.kohya.files", "loratools.dialects.loralib", "loratools.dialects.megatron.files",
    "loratools.dialects.peft.held", "loratools.dialects.peft.typed", "loratools.dialects.torchtune",
    "loratools.engine.arithmetic.torch", "loratools.engine.coded", "loratools.engine.lane",
    "loratools.engine.stochastic",
    "loratools.parallel.shared", "loratools.recipe.catalog",
    "loratools.storage.codecs.encoding", "loratools.storage.gguf.container", "loratools.storage.pickles.archive",
    "loratools.surgery.folding.scales", "loratools.surgery.folding.table", "loratools.surgery.inputs.planning",
    "loratools.surgery.merge.gguf", "loratools.surgery.merge.resume", "loratools.surgery.merge.siblings",
    "loratools.cli._batch", "loratools.cli._each", "loratools.cli._faults", "loratools.cli._hints",
})  # fmt: skip
"""What a merge of a LoRA into a model in safetensors does without: other kinds, layouts, schemes and verbs."""


@pytest.mark.skipif(not tiles.available(), reason="no C code that reads files")
@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["written", "planned"])
def test_a_merge_leaves_alone_what_it_does_not_use(more: tuple[str, ...], prepared: Path) -> None:
    added = imported(["merge", "base", "adapter", "-o", f"alone{len(more)}", *more], prepared, WHOLE)
    assert "loratools.engine.run" in added
    assert added & NEVER_IN_A_MERGE == set()


def test_help_needs_the_command_line_only(prepared: Path) -> None:
    ours = {name.split(".")[1] for name in imported(["--help"], prepared, WHOLE) if name.startswith("loratools.")}
    assert ours == {"__main__", "cli", "decisions", "errors", "options", "storage", "version"}


@pytest.mark.skipif(not tiles.available(), reason="no C code that reads files")
def test_a_merge_in_c_imports_neither_torch_nor_numpy(prepared: Path) -> None:
    assert imported(["merge", "base", "adapter", "-o", "in_c"], prepared) == {"click", "loratools", "blake3"}


def test_products_are_compared_without_torch(prepared: Path) -> None:
    assert "torch" not in imported(["compare", "adapter", "sealed"], prepared)


def test_a_rank_is_extracted_without_torch(tmp_path: Path) -> None:
    if not delta.available():
        pytest.skip("the C code is not compiled, or does not serve here")
    for name, seed in (("base", 1), ("tuned", 2)):
        torch.manual_seed(seed)
        weights = {f"layers.{i}.up_proj.weight": torch.randn(640, 300 * i).bfloat16() for i in (1, 2)}
        save_file({**weights, "norm.weight": torch.randn(64)}, tmp_path / f"{name}.safetensors")
    line = ["extract-svd", "base.safetensors", "tuned.safetensors", "-o", "out", "--rank", "8"]
    assert "torch" not in imported(line, tmp_path)
