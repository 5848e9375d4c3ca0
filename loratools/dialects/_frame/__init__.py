"""What dialects are made of: the listing of a source's files, building an adapter, naming losses, reading pickles."""
