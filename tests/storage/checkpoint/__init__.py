"""Tests of models on disk and the views of them."""
