"""The running S3 server for every test of this folder."""

from tests.storage.stores.fixtures import s3, s3_server

__all__ = ["s3", "s3_server"]
