"""Speed and memory, as ratios in one run. Never part of the tests: `python -m tests.benchmarks --help`."""
