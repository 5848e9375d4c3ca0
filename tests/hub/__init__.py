"""Tests of loratools.hub, against the Hub of `tests/hub/server`; `fixtures` starts one for a test."""
