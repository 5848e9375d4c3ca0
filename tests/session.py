"""What a run of the tests is: which of them run, what they may skip, and where their files go."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from loratools.errors import MissingExtra
from loratools.parallel import cores

SAMPLED = ("sweep", "paper", "fuzz", "kills")
"""Markers of tests of which a sample runs, unless all are asked for with --whole."""

NOT_QUICK = ("interop", "real", "slow")

PEERS = ("peft", "transformers")
"""What every test marked `interop` needs; where it needs more, it asks with `pytest.importorskip`."""

EXTRAS = ("gguf",)
"""What loratools reads files with where it is installed."""

PREFIX = "loratools-tests-"
TEMPORARY = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("loratools")
    group.addoption("--whole", action="store_true", help=f"run all of {', '.join(SAMPLED)}, not a sample")
    group.addoption("--seed", type=int, default=0, help="draw another sample (default: %(default)s)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give this run, and every process that it starts, a temporary folder that goes when the run ends."""
    if hasattr(config, "workerinput"):
        return  # it has inherited all this
    remove_leftovers(Path(tempfile.gettempdir()))
    folder = config.stash[TEMPORARY] = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    config.option.basetemp = config.option.basetemp or folder / "tests"
    for name, place in {"TMPDIR": "other", "XDG_CACHE_HOME": "cache", "HF_HOME": "hf-home"}.items():
        (folder / place).mkdir()
        os.environ[name] = str(folder / place)
    tempfile.tempdir = None  # it was found before


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes `-n auto` starts: one per core, at most four, each of which may need two gigabytes."""
    return min(cores(), 4)


def remove_leftovers(folder: Path) -> None:
    """Remove what runs left that were killed themselves."""
    for left in folder.glob(f"{PREFIX}*"):
        process = left.name.removeprefix(PREFIX).partition("-")[0]
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (ValueError, OSError):
            continue  # not ours


def pytest_unconfigure(config: pytest.Config) -> None:
    if folder := config.stash.get(TEMPORARY, None):
        shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by what they use, skip what cannot run here, and leave out what the sample does not have."""
    for item in items:
        if "real_models" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.real)
        if not any(item.get_closest_marker(name) for name in NOT_QUICK):
            item.add_marker(pytest.mark.quick)
    skip_without_packages(items)
    skip_without_gpu(items)
    if not config.option.whole:
        kept = sample(items, config.option.seed)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def skip_without_packages(items: list[pytest.Item]) -> None:
    """Skip tests whose peers are not installed, by name. In CI ($CI is set) they are, or the tests fail."""
    if os.environ.get("CI"):
        return
    for item in items:
        if not item.get_closest_marker("interop"):
            continue
        if missing := [name for name in PEERS if find_spec(name) is None]:
            reason = f"needs {' and '.join(missing)}: pip install -e '.[interop]'"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip a test in which loratools itself asked for a package that is not installed."""
    try:
        yield
    except MissingExtra as error:
        if os.environ.get("CI") or all(map(find_spec, EXTRAS)):
            raise
        pytest.skip(f"{error.message}: {error.hint}")


def skip_without_gpu(items: list[pytest.Item]) -> None:
    if with_gpu := [item for item in items if item.get_closest_marker("gpu")]:
        import torch

        if not torch.cuda.is_available():
            for item in with_gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def sample(items: list[pytest.Item], seed: int) -> set[pytest.Item]:
    """Return the tests that run: of each function marked `sweep(count)` or so, that many of its cases."""
    kept, cases = set(items), defaultdict(list)
    for item in items:
        for marker in SAMPLED:
            if (found := item.get_closest_marker(marker)) and found.args:
                cases[item.nodeid.partition("[")[0], found.args[0]].append(item)
    for (function, count), of_function in cases.items():
        if count < len(of_function):
            chosen = random.Random(f"{seed} {function}").sample(of_function, count)
            kept -= {item for item in of_function if item not in chosen}
    return kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.option.whole:
        line = f"{', '.join(SAMPLED)}: a sample, drawn with --seed {config.option.seed}; --whole runs all cases"
        terminalreporter.write_line(line)
