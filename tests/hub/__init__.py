"""A small, faithful model Hub on the loopback interface, for tests that drive the real huggingface_hub client.

`server.LocalHub` is the Hub, `fixtures` the pytest fixtures and `client` the helpers that point a client at it.
"""
