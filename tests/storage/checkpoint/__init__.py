"""Tests of the files beside weights."""
