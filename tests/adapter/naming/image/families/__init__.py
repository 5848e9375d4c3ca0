"""Families of image and video models."""
