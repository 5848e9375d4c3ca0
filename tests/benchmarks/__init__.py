"""Speed and memory, as ratios in one run: `python -m tests.benchmarks --help`. Only `gpu` has a test, of a small run."""
