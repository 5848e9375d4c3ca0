"""The main verbs on Windows and macOS, as far as Linux can play them (`elsewhere.py`): the same bytes and words."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loratools.dialects.peft import isolated
from loratools.storage import files
from loratools.storage.atomic import system
from tests.conftest import clean_env
from tests.faults import elsewhere
from tests.faults.killer import hashes
from tests.make import REPOSITORY

PACKAGE = REPOSITORY / "loratools"

COMMANDS = [
    "inspect adapter --modules --json",
    "inspect base",
    "hash base --json",
    "validate sealed --base base",
    "convert adapter -o again --to mlx",
    "convert adapter -o as-gguf.gguf --to gguf --base base",
    "convert adapter -o of-kohya.safetensors --to kohya",
    "convert adapter -o of-torchtune --to torchtune --base base --allow-loss",
    "merge base sealed -o merged-1 --threads 3",
    "merge base sealed other -w 0.5 -w 2 -o merged-1 --force --durable",
    "merge base adapter -o in-f32 --dtype f32 --resume --max-shard-size 100kB",
    "merge base sealed -o kept --keep-residual",
    "unmerge kept adapter -o back",
    "unmerge merged-1 adapter -o nearly",
    "switch kept --out adapter --in other -o switched",
    "extract-svd base tuned -o extracted --rank 4",
    "combine adapter other -o both --rank 2",
    "resize adapter --rank 2 -o small",
    "dequantize quantized -o plain --verify",
    "merge quantized adapter -o coded --quantized requantize",
    "verify kept --base base --adapter adapter --seed 1",
    "edit of-kohya.safetensors --title Travelled --set note=kept",
    "edit adapter --tags a,b -o edited",
    "find both --json",
    "report adapter -o page.html",
    "recipe both",
    "inspect adapter sealed other",
    "convert --each both -o many --to mlx --allow-loss",
    "verify merged-1 --base base --adapter adapter --seed 1",
    "merge base nowhere -o never",
]


Did = tuple[list[dict[str, str]], dict[str, str]]


def run(names: list[str], workplace: Path, folder: Path, commands: list[str]) -> list[Did]:
    """Run commands as on systems; return what each said there, and the hashes of all files that are there then."""
    places = {name: Path(shutil.copytree(workplace, folder / name)) for name in names}
    told = elsewhere.start_all(places, [line.split() for line in commands], **clean_env())
    return [
        ([{key: _plain(str(value)) for key, value in each.items()} for each in said], hashes(place))
        for said, place in zip(told, places.values(), strict=True)
    ]


def _plain(text: str) -> str:
    """Return text as it was before a stream of Windows, which has cp1252, wrote its other characters as codes."""
    return re.sub(r"\\u([0-9a-f]{4})|\\x([0-9a-f]{2})", lambda m: chr(int(m[1] or m[2], 16)), text)


@pytest.mark.slow
@pytest.mark.parametrize(("compiled", "systems"), [("+c", ["windows", "macos"]), ("", ["windows"])])
def test_every_system_writes_the_same_bytes(prepared: Path, tmp_path: Path, compiled: str, systems: list[str]) -> None:
    """Without a compiler too: what torch alone writes is compared with that."""
    names = [f"{name}{compiled}" for name in ("here", *systems)]
    (expected, left), *others = run(names, prepared, tmp_path, COMMANDS)
    assert [int(each["code"]) for each in expected] == [0] * (len(COMMANDS) - 2) + [1, 1]
    assert not [name for name in left if "/." in f"/{name}" and not name.startswith(".gathered.")]
    for said, there_left in others:
        for line, here, there in zip(COMMANDS, expected, said, strict=True):
            assert here == there, line
        assert there_left == left


@pytest.mark.slow
def test_the_tour_is_taken_there(tmp_path: Path) -> None:
    (done,) = elsewhere.start("windows+c", [["demo", "--keep", "tour", "--json"]], tmp_path, **clean_env())
    assert done["code"] == 0, done["err"]
    assert len(json.loads(done["out"])["stops"]) == 11
    assert [path.name for path in tmp_path.iterdir()] == ["tour"]


def test_what_a_killed_run_left_goes_with_the_next(prepared: Path, tmp_path: Path) -> None:
    """Folders that nobody holds, and the files of locks that are nobody's; not the folder that another run holds."""
    import fcntl

    place = Path(shutil.copytree(prepared, tmp_path / "place"))
    for name in (".out.partial-0123abcd", ".out.resume-0123abce", ".out.partial-0123abcf"):
        (place / name).mkdir()
        (place / name / "big").write_text("big")
    for token in ("0123abcd", "0123abce", "0123abcf", "deadbeef"):
        (place / f".out.lock-{token}").touch()
    with (place / ".out.lock-0123abcf").open() as held:  # what `locking` of the other system is made of
        fcntl.flock(held, fcntl.LOCK_EX)
        (done,) = elsewhere.start("windows+c", [["merge", "base", "adapter", "-o", "out"]], place, **clean_env())
    assert done["code"] == 0, done["err"]
    left = sorted(path.name for path in place.iterdir() if path.name not in {each.name for each in prepared.iterdir()})
    assert left == [".out.lock-0123abcf", ".out.partial-0123abcf", "out"]


def test_what_is_open_elsewhere_is_a_sentence(prepared: Path, tmp_path: Path) -> None:
    """The play refuses what Windows refuses; if it did not, the other tests would prove nothing."""
    place = Path(shutil.copytree(prepared, tmp_path / "place"))
    code = (
        "import os, sys; from tests.faults import elsewhere; elsewhere.become('windows', compiled=True);"
        "from loratools.cli._run import run; held = open('merged/config.json');"
        "sys.exit(run(['merge', 'base', 'adapter', '-o', 'merged', '--force']))"
    )
    before = hashes(place)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=clean_env(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "merged/config.json: the file is in use by a process" in done.stderr
    assert hashes(place) == before


def test_positions_in_a_file_are_kept_apart_where_there_is_no_pread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that share a descriptor: its place in the file is one for all of them there."""
    import os
    from concurrent.futures import ThreadPoolExecutor

    for name in ("preadv", "pwrite"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(sys, "getswitchinterval", sys.getswitchinterval)
    sys.setswitchinterval(1e-6)
    size, count = 1000, 300
    try:
        with files.descriptor(tmp_path / "file", os.O_RDWR | os.O_CREAT) as both:

            def work(i: int) -> bool:
                files.write_from(both, memoryview(bytes([i % 251]) * size), i * size)
                back = bytearray(size)
                files.read_into(both, memoryview(back), i * size)
                return bytes(back) == bytes([i % 251]) * size

            with ThreadPoolExecutor(8) as pool:
                assert all(pool.map(work, range(count)))
    finally:
        sys.setswitchinterval(0.005)
    assert (tmp_path / "file").read_bytes() == b"".join(bytes([i % 251]) * size for i in range(count))


def test_expressions_of_strangers_where_nothing_limits_a_process() -> None:
    """As on Windows, which has no `resource`: the matcher answers all the same."""
    code = (
        f"import runpy, sys; sys.modules['resource'] = None; runpy.run_path({str(isolated.__file__)!r}, "
        "run_name='__main__')"
    )
    questions = [["a(?P<b>.)c", 0, "abc", True, 1.0], [None, 0, "xyz", True, 1.0], ["(", 1, None, True, 1.0]]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], input="\n".join(map(json.dumps, questions)), capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each.get("groups") for each in answers] == [{"b": "b"}, None, None]
    assert "error" in answers[2]


def test_nothing_else_asks_for_calls_that_some_systems_lack() -> None:
    """Nor for a text file without saying its encoding and its ends of lines, which Windows has of its own."""
    calls = "|".join(name for name in elsewhere.ABSENT["windows"].split() if len(name) > 4)
    modules = "|".join(elsewhere.MODULES["windows"])
    wrong = re.compile(
        rf"\bos\.({calls})\b|^\s*(import|from) ({modules})\b|write_text\((?!.*newline=)|"
        r"read_text\((?!.*encoding=)|open\([^)]*\"[wax][t+]?\"(?!.*newline=)|NamedTemporaryFile|"
        r"str\([\w.]+\.relative_to\("
    )
    allowed = {
        "storage/files.py", "storage/atomic/system.py", "storage/atomic/locks.py", "storage/atomic/sync.py",
        "storage/atomic/fleeting.py", "parallel/__init__.py", "surgery/extract/read.py", "dialects/peft/isolated.py",
        "storage/rewrite/__init__.py", "storage/rewrite/apply.py",
    }  # fmt: skip
    lines = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).as_posix() not in allowed
        for line in path.read_text(encoding="utf-8").splitlines()
        if wrong.search(line)
    ]
    assert not lines, lines


def test_those_that_may_ask_do_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is not there everywhere is asked for by `hasattr`, in the one place that has another way."""
    import os

    from loratools.parallel import cores

    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == os.cpu_count()
    assert system.module("no_such_module_anywhere") is None
