"""Speed and memory, as ratios in one run: `python -m tests.benchmarks --help`. Of `gpu` a small run is tested."""
