"""Tests of the C beside a running model; those of a merge are in tests/linalg/test_native.py."""
