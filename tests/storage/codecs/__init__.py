"""Tests of the encodings of numbers."""
