"""A small, faithful model Hub on the loopback interface, which the real huggingface_hub client talks to.

    hub         `LocalHub`: its repositories, tokens, faults and request log; `listener` puts it on two ports
    routes/     one file for each group of addresses: repositories, files, uploads, xet tokens
    store       repositories as git has them; `objects` and `xet` hold the large files; `accounts` says who may do what
    card        the Hub's checks of a model card
    faults      what goes wrong, on which requests, how often; `log` has every request
    client      points the client of this process, or of another one, at a Hub; `sample` is an adapter to send

The files `test_*` are the tests of this Hub itself; those of loratools.hub lie one folder up.
"""

from tests.hub.server.hub import LocalHub

__all__ = ["LocalHub"]
