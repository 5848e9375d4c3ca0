"""Kill every verb that writes at random moments, and tell what was left and what the next run made of it.

    python -m tests.faults.kill_verbs FOLDER SEED KILLS

Each trial has a folder of its own, with the output `out` and the folder for temporary files. A run is killed at a
moment as `tests.faults.killer` has them, network traffic included. Then, half of the time, the same command fails on a
missing input; then it runs to its end. The Hub is the local one of tests/hub, in a process of its own. One JSON
document goes to stdout: a list of trials, which `judge` looks through.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from io import StringIO
from itertools import cycle
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import loratools
from loratools.storage import atomic
from tests.faults.killer import count_events, ended, fork, hashes, stop


@dataclass(frozen=True)
class Verb:
    """A command line; `{out}` stands for its output, `{repo}` for a repository of its own.

    `breaks` says which word becomes one that is not there, so that the command fails; None where there is none.
    """

    name: str
    words: str
    breaks: int | None = 1

    @property
    def replaces(self) -> bool:
        return "--force" in self.words

    def arguments(self, room: Path, *, broken: bool = False) -> list[str]:
        words = self.words.format(out=room / "out", repo=f"tester/{room.name}").split()
        if broken and self.breaks is not None:
            words[self.breaks : self.breaks + 1] = ["tester/missing"]
        return [*words, "--quiet"]


VERBS = (
    Verb("merge", "merge base adapter -o {out} --threads 2"),
    Verb("merge --force", "merge base adapter -o {out} --force"),
    Verb("merge --resume", "merge base adapter -o {out} --resume --max-shard-size 40KB"),
    Verb("merge --resume --force", "merge base adapter -o {out} --resume --force"),
    Verb("merge --keep-residual --durable", "merge base adapter -o {out} --keep-residual --durable"),
    Verb("merge --push --no-local", "merge base adapter --push {repo} --no-local"),
    Verb("unmerge", "unmerge kept adapter -o {out}"),
    Verb("unmerge --base --force", "unmerge kept adapter -o {out} --base base --force"),
    Verb("switch", "switch kept --take adapter --put other -o {out}"),
    Verb("switch --force", "switch plain --take adapter --put other -o {out} --force"),
    Verb("combine", "combine adapter other -o {out}"),
    Verb("combine --force", "combine adapter other -w 0.5 -w -1 --rank 2 -o {out} --force"),
    Verb("resize", "resize adapter --rank 2 -o {out}"),
    Verb("extract-svd", "extract-svd base tuned --rank 2 --threads 1 -o {out}"),
    Verb("extract-svd --force", "extract-svd base tuned --rank 2 --threads 1 -o {out} --force"),
    Verb("convert", "convert adapter -o {out} --base base"),
    Verb("convert, one file", "convert adapter -o {out}.safetensors"),
    Verb("convert, one file --force", "convert adapter -o {out}.safetensors --force"),
    Verb("merge, one file", "merge one/model.safetensors adapter -o {out}.safetensors"),
    Verb("merge, one file --force", "merge one/model.safetensors other -o {out}.safetensors --keep-residual --force"),
    Verb("unmerge, one file", "unmerge kept.safetensors adapter -o {out}.safetensors"),
    Verb("switch, one file", "switch kept.safetensors --take adapter --put other -o {out}.safetensors"),
    Verb(
        "extract-svd, one file",
        "extract-svd one/model.safetensors tuned.safetensors --rank 2 --threads 1 -o {out}.safetensors",
    ),
    Verb("pull", "pull tester/sent -o {out}"),
    Verb("pull --force", "pull tester/model -o {out} --force"),
    Verb("push", "push sealed {repo}"),
    Verb("demo", "demo --keep {out}", None),
    Verb("demo, nothing kept", "demo", None),
)


class Hub:
    """The local Hub in another process, for a forked process should have no threads; asked through two pipes."""

    def __init__(self, root: Path, seeded: dict[str, Path]) -> None:
        ask, self._questions = os.pipe()
        self._answers, answer = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            os.close(self._questions)
            _serve(root, seeded, ask, answer)
            os._exit(0)
        os.close(ask)
        os.close(answer)
        self._replies = os.fdopen(self._answers)
        self.endpoint = str(json.loads(self._replies.readline()))

    def files(self, repo: str) -> dict[str, str] | None:
        """Return path -> sha256 of a repository, its own name left out of the texts; None where there is none."""
        os.write(self._questions, f"{repo}\n".encode())
        listed: dict[str, str] | None = json.loads(self._replies.readline())
        return listed

    def close(self) -> int:
        os.close(self._questions)
        return ended(self.process)


def _serve(root: Path, seeded: dict[str, Path], ask: int, answer: int) -> None:
    from tests.hub.server import LocalHub

    with LocalHub(root) as hub, os.fdopen(ask) as questions, os.fdopen(answer, "w", buffering=1) as answers:
        for repo, folder in seeded.items():
            hub.seed(repo, {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
        print(json.dumps(hub.endpoint), file=answers)
        for line in questions:
            repo = line.strip()
            listed = None
            if repo in hub.store.repos:
                listed = {
                    path: hashlib.sha256(data.replace(repo.partition("/")[2].encode(), b"")).hexdigest()
                    for path, data in hub.files(repo).items()
                }
            print(json.dumps(listed), file=answers)
        os._exit(len(hub.crashes))


@dataclass(frozen=True)
class Bench:
    """Where the trials are made: the inputs lie in the current folder."""

    folder: Path
    hub: Hub

    @contextmanager
    def room(self, name: str) -> Iterator[Path]:
        """Make an empty folder with one for temporary files, and remove both afterwards."""
        room = self.folder / name
        (room / "tmp").mkdir(parents=True)
        tempfile.tempdir = str(room / "tmp")
        yield room
        shutil.rmtree(room)

    def old(self, verb: Verb, room: Path) -> None:
        """Put an older output where the new one will be."""
        if verb.replaces and ".safetensors" in verb.words:
            (room / "out.safetensors").write_text("old")
            if "--keep-residual" in verb.words:
                (room / "out.residual").write_text("old")
        elif verb.replaces:
            shutil.copytree("old", room / "out")

    def state(self, verb: Verb, room: Path) -> Any:
        """Return what there is: the hashes of the output, or of the repository; None for nothing."""
        if "{repo}" in verb.words:
            return self.hub.files(f"tester/{room.name}") or None
        if (file := room / "out.safetensors").is_file():
            if (room / "out.residual").is_file():
                atomic.sweep(file)  # as `unmerge` does before it looks at the residual
            files = [path for path in (file, room / "out.residual") if path.is_file()]
            return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
        return hashes(room / "out") if (room / "out").is_dir() else None


def _left(room: Path) -> list[str]:
    known = ("out", "out.safetensors", "tmp", *(["out.residual"] if (room / "out.safetensors").exists() else []))
    names = [path.name for path in room.iterdir() if path.name not in known]
    return sorted([*names, *(f"tmp/{path.name}" for path in (room / "tmp").iterdir())])


def _inputs() -> None:
    from loratools.cli._run import run
    from tests.make import tiny

    here = Path.cwd()
    tiny.save_llama(here / "base", tiny.llama_weights())
    tiny.save_peft(here / "adapter", tiny.lora_factors())
    tiny.save_peft(here / "other", tiny.lora_factors(rank=2, seed=2), alpha=2)
    tiny.save_llama(here / "tuned", tiny.tuned_weights(tiny.llama_weights()))
    tiny.save_llama(here / "one", tiny.llama_weights(), shards=1)
    tiny.save_llama(here / "two", tiny.tuned_weights(tiny.llama_weights()), shards=1)
    (here / "two" / "model.safetensors").rename(here / "tuned.safetensors")
    (here / "old" / "older").mkdir(parents=True)
    (here / "old" / "adapter_config.json").write_text("{}")
    (here / "old" / "older" / "weights").write_bytes(bytes(100_000))
    with redirect_stdout(StringIO()):
        assert run(["convert", "adapter", "-o", "sealed", "--base", "base", "-q"]) == 0
        assert run(["merge", "base", "adapter", "-o", "kept", "--keep-residual", "-q"]) == 0
        assert run(["merge", "base", "adapter", "-o", "plain", "-q"]) == 0
        one = ["merge", "one/model.safetensors", "adapter", "-o", "kept.safetensors", "--keep-residual", "-q"]
        assert run(one) == 0


def prepare(folder: Path) -> Hub:
    """Make all inputs in the current folder, and start the Hub: in processes of their own, for they have threads."""

    if (process := os.fork()) == 0:
        _inputs()
        os._exit(0)
    assert ended(process) == 0
    here = Path.cwd()
    hub = Hub(folder / "hub", {"tester/sent": here / "sealed", "tester/model": here / "base"})
    os.environ |= {
        "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home"), "HF_TOKEN": "hf_owner-of-the-repos",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return hub


def trials(bench: Bench, seed: int, kills: int, verbs: Sequence[Verb] = VERBS) -> Iterator[dict[str, Any]]:
    """Yield what came of each trial, verb by verb in turn, until so many runs have been killed."""
    chance = random.Random(seed)
    known: dict[str, tuple[Any, int]] = {}
    killed = 0
    for number, verb in enumerate(cycle(verbs)):
        if killed >= kills:
            return
        if verb.name not in known:
            known[verb.name] = _reference(bench, verb, number)
        right, events = known[verb.name]

        with bench.room(f"r{number}") as room:
            bench.old(verb, room)
            old = bench.state(verb, room)
            moment, way = chance.randint(1, events), chance.choice(("exact", "exact", "late"))
            trial: dict[str, Any] = {"verb": verb.name, "way": way, "moment": moment, "of": events}
            trial["code"] = stop(verb.arguments(room), moment, way)
            trial["before"], trial["left"] = _said(bench.state(verb, room), right, old), _left(room)
            if verb.breaks and chance.random() < 0.5:
                trial["failed"] = ended(fork(verb.arguments(room, broken=True), lambda: None))
                trial["meanwhile"], trial["left_then"] = _said(bench.state(verb, room), right, old), _left(room)
            trial["rerun"] = ended(fork(verb.arguments(room), lambda: None))
            trial["after"], trial["left_last"] = _said(bench.state(verb, room), right, old), _left(room)
        killed += trial["code"] == -9
        yield trial


def _said(state: Any, right: Any, old: Any) -> str:
    return "absent" if state is None else "new" if state == right else "old" if state == old else "BROKEN"


def _reference(bench: Bench, verb: Verb, number: int) -> tuple[Any, int]:
    """Run a verb to its end, twice: return what it makes, and how many events that has."""
    made = []
    for turn in ("a", "b"):
        with bench.room(f"reference{number}{turn}") as room:
            bench.old(verb, room)
            code, events = count_events(verb.arguments(room))
            assert code == 0, f"{verb.name}: exit code {code}"
            assert _left(room) == [], f"{verb.name}: {_left(room)}"
            made.append((bench.state(verb, room), events))
    assert made[0][0] == made[1][0], f"{verb.name}: two runs differ"
    return made[1]


def judge(trial: dict[str, Any]) -> list[str]:
    """Return what is wrong with a trial; nothing, where old or new was there whole and the next run went well."""
    replaces, writes = "--force" in trial["verb"], trial["verb"] != "demo, nothing kept"
    pushes = "push" in trial["verb"]
    wrong = []

    def check(good: bool, what: str) -> None:
        if not good:
            wrong.append(f"{what}: {trial}")

    check(trial["code"] in (-9, 0), "the run failed by itself")
    check(trial["before"] in ("old" if replaces else "absent", "new"), "the output was half there")
    if "failed" in trial:
        check(trial["failed"] not in (0, -9), "the broken command did not fail")
        check(trial["meanwhile"] == trial["before"], "a command that failed changed the output")
        swept = [name for name in trial["left_then"] if ".partial-" in name or ".replaced-" in name]
        check(not swept, "a command that failed did not sweep")
    refused = trial["before"] == "new" and not replaces and not pushes and writes
    check(trial["rerun"] == (1 if refused else 0), "the next run did not go well")
    check(trial["after"] == ("new" if writes else "absent"), "the output is not right")
    check(not trial["left_last"], "something was left behind")
    return wrong


def main(
    place: str, seed: int, kills: int, verbs: Sequence[Verb] = VERBS, report: Callable[[str], object] = print
) -> None:
    """Make the trials and print them."""
    folder = Path(place).resolve()
    inputs = folder / "inputs"
    inputs.mkdir(parents=True)
    os.chdir(inputs)
    hub = prepare(folder)
    for module in walk_packages(loratools.__path__, "loratools."):  # so that no child has to import them
        if not module.name.startswith(("loratools.__main__", "loratools.linalg.native.")):
            import_module(module.name)
    done = list(trials(Bench(folder / "rooms", hub), seed, kills, verbs))
    crashes = hub.close()
    report(json.dumps({"trials": done, "crashes": crashes}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]))
