"""Run the fuzzers; see the folder's docstring."""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("names", nargs="*", help="harnesses (default: all)")
    parser.add_argument("--runs", type=int, default=1_000, help="inputs for each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the inputs (default: the time)")
    parser.add_argument("--atheris", action="store_true", help="guided by coverage; one harness, needs atheris")
    parser.add_argument("--keep", type=Path, help="folder for inputs that are found (default: none are kept)")
    options = parser.parse_args()
    if options.atheris:
        guided(options.names[0], options.runs, options.seed, options.keep)
    from tests.fuzz.harnesses import HARNESSES
    from tests.fuzz.run import Found, execute, finds, inputs

    found = 0
    for name in options.names or HARNESSES:
        start, harness = time.monotonic(), HARNESSES[name]
        known, sentences = [*harness.seeds(), *finds(name)], set()
        for data in (*known, *islice(inputs(name, options.seed), options.runs)):
            try:
                execute(harness, data)
            except Found as error:
                if str(error)[:60] not in sentences:
                    sentences.add(str(error)[:60])
                    print(f"{name}: {error} ({keep(options.keep, name, data)})", flush=True)
                found += 1
        seconds = time.monotonic() - start
        print(f"{name}: {len(known) + options.runs} executions in {seconds:.0f} s, seed {options.seed}", flush=True)
    return int(found > 0)


def keep(folder: Path | None, name: str, data: bytes) -> str:
    if folder is None:
        return repr(data[:80])
    path = folder / name / hashlib.sha256(data).hexdigest()[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def guided(name: str, runs: int, seed: int, folder: Path | None) -> None:
    """Hand the harness to atheris, which ends the process."""
    import atheris

    with atheris.instrument_imports(include=["loratools"]):
        from tests.fuzz.harnesses import HARNESSES
    from tests.fuzz.run import Found, execute, finds

    corpus = Path(tempfile.mkdtemp(prefix="loratools-fuzz-"))
    for number, data in enumerate([*HARNESSES[name].seeds(), *finds(name)]):
        (corpus / str(number)).write_bytes(data)

    def one(data: bytes) -> None:
        try:
            execute(HARNESSES[name], data)
        except Found as error:
            print(f"{name}: {error} ({keep(folder, name, data)})", flush=True)
            if folder is None:
                raise

    arguments = [f"-runs={runs}", f"-seed={seed % 2**31}", "-max_len=100000", "-timeout=60", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
