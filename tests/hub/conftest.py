"""The local Hub for every test of this folder."""

from tests.hub.fixtures import hub, hub_home, naps, pytest_collection_modifyitems, xet_hub

__all__ = ["hub", "hub_home", "naps", "pytest_collection_modifyitems", "xet_hub"]
