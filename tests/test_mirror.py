"""tests/ mirrors the package: where a module's test is, is said by its path, or by the table here.

The test of loratools/x/y.py is tests/x/test_y.py. Of a folder that is one thing, a verb or a dialect, the test is named
after the folder, inside it or beside it, and covers what only that thing needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.make import REPOSITORY

PACKAGE, TESTS = REPOSITORY / "loratools", REPOSITORY / "tests"

ELSEWHERE = {
    "adapter/fusing/test_products": "adapter/fusing: rows",
    "adapter/test_model": "adapter: input shown",
    "adapter/kinds/test_parts": "adapter: parts",
    "adapter/naming/image/test_readings": "adapter/naming/image: components patterns",
    "adapter/placement/test_image": "adapter/naming/image: groups models rename translate",
    "adapter/placement/test_resolve": "adapter/placement: settle whole",
    "adapter/placement/test_tied": "adapter/placement: apart shared spread",
    "cli/test_unsealed": "cli: convert validate",
    "cli/test_examples": "cli: combine compare completion convert demo dequantize dialects edit estimate gather hash "
    "inspect merge pull push report resize switch unmerge validate verify _facts _options _ranks",
    "cli/test_each": "cli: _batch _pool",
    "cli/test_run": ".: __main__ decisions errors; cli: _faults _group _talk",
    "cli/test_words": "cli: _spelling",
    "cli/test_show": "cli: _certificate _pieces",
    "dialects/kohya/test_kohya": "storage: save",
    "demo/test_llama": "demo: quantized stop tour trained",
    "format/test_manifest": "format: canonical",
    "format/test_writer": "format: keys peft_config record",
    "interop/test_live_slices": "adapter/placement: slices",
    "hub/test_card": "storage/beside: front",
    "hub/test_pull_faults": "hub: pull client faults",
    "hub/test_round_trip": "hub: push section subject",
    "recipe/test_recipe": "cli: recipe _account _catalog _recipes; storage/beside: making",
    "spec/test_vectors": "format: digest meaning registry shapes; "
    "format/clauses: container integrity layout manifest tensors",
    "interop/test_live_hooks": "live/below: checkpoints",
    "live/below/test_meta": "live/below: silent",
    "storage/pickles/test_archive": "storage/pickles: unpickle",
    "storage/codecs/test_awq": "storage/codecs: _transposed auto_round",
    "storage/codecs/test_schemes": "storage/codecs: encoding unread",
    "storage/codecs/test_compressed_tensors": "storage/codecs: _blocks _groups _integers",
    "storage/codecs/test_comfy": "storage/codecs: _tiled comfy_scaled fp8_cast",
    "storage/codecs/test_fp8": "storage/codecs: state tables",
    "storage/codecs/test_modelopt": "storage/codecs: _symmetric",
    "storage/codecs/test_mxfp4": "storage/codecs: _powers",
    "storage/test_header": "storage: dtypes",
    "storage/test_sources": "storage: resolvers",
    "storage/stores/test_client": "storage/stores: faults",
    "dialects/gguf/test_gguf": "adapter/naming: llama_cpp llama_cpp_table",
    "surgery/extract/test_extract": "adapter/naming: selection; adapter/placement: owners; linalg/ranks: allocate",
    "surgery/test_options": ".: options; surgery/inputs: opened",
    "surgery/folding/test_carry": "surgery/folding: choice original scales table",
    "surgery/unmerge/test_unmerge": "engine/residual: keep restore; storage: companions",
    "surgery/merge/test_gguf": "adapter/placement: gguf; storage/codecs: gguf; storage/gguf: container types",
    "surgery/merge/test_quantized": "engine: coded",
    "surgery/merge/test_sealed": "engine: sealed",
    "engine/residual/test_codes": "storage/codecs: floats",
}
"""Test -> the modules that it proves besides its own: "folder: module module; folder: ..."."""

OF_THE_WHOLE = {"benchmarks", "faults", "fuzz", "hub/server", "interop", "make", "spec"}
"""Folders of tests/ that have no folder in the package."""


def modules(package: Path) -> Iterator[Path]:
    """Yield every module that has code of its own, relative to the package."""
    for path in sorted(package.rglob("*.py")):
        if path.stem != "__init__":  # a folder's sign; the test of a verb there has the folder's name
            yield path.relative_to(package)


def places(module: Path) -> list[str]:
    """Return where the test of a module may be, relative to tests/ and without its suffix."""
    folder = module.parent
    own = [f"{folder}/test_{module.stem.lstrip('_')}"]
    if folder.name:
        own += [f"{folder}/test_{folder.name.lstrip('_')}", f"{folder.parent}/test_{folder.name.lstrip('_')}"]
    return [place.removeprefix("./") for place in own]


def table() -> dict[Path, str]:
    """Return ELSEWHERE by module."""
    return {
        Path(folder.strip()) / f"{name}.py": test
        for test, listed in ELSEWHERE.items()
        for folder, _, names in (part.partition(":") for part in listed.split(";"))
        for name in names.split()
    }


def test_every_module_has_a_test_that_can_be_found() -> None:
    elsewhere = table()
    there = {str(path.relative_to(TESTS).with_suffix("")) for path in TESTS.rglob("test_*.py")}
    found = {module: [place for place in places(module) if place in there] for module in modules(PACKAGE)}
    lost = [module for module in found if not found[module] and elsewhere.get(module) not in there]
    assert not lost, f"write a test in {places(lost[0])[0]}.py, or name one in ELSEWHERE: {', '.join(map(str, lost))}"
    stale = [str(module) for module in elsewhere if found.get(module, ["no such module"])]
    assert not stale, f"not needed in ELSEWHERE: {', '.join(stale)}"


@pytest.mark.parametrize("folder", sorted({path.parent.relative_to(TESTS) for path in TESTS.rglob("*.py")}), ids=str)
def test_every_folder_of_tests_is_one_of_the_package(folder: Path) -> None:
    besides = any(str(folder) == name or str(folder).startswith(f"{name}/") for name in OF_THE_WHOLE)
    assert besides or (PACKAGE / folder).is_dir()
