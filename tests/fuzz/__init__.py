"""Fuzzers: every reader of a stranger's bytes returns, or raises a `LoraToolsError`, in bounded time and memory.

python -m tests.fuzz                          each harness: its seeds, and 1,000 inputs made of them
python -m tests.fuzz pickle gguf --runs 50000 --seed 7
python -m tests.fuzz header --atheris --runs 50000    guided by coverage, where atheris is installed

harnesses    what each fuzzer reads, and the sound inputs that it begins with
run          executes an input, and finds foreign exceptions, more than a second, and more than 200 MB
seeds        what was found: NAME/anything is read first by the harness NAME
"""
