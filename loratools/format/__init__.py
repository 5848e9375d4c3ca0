"""The loratools format, the twin of `spec/v1`: manifest, reader, writer, clauses, and the digest of an adapter."""
