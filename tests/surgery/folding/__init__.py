"""Adapters carried into folded bases."""
