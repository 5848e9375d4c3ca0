"""The only place that touches the network; nothing here is imported before a Hub is asked for.

    refs      hf://org/name[@revision][/file]
    client    `Hub`: reads that are retried and checked, refusals in the user's words
    faults    which failures pass, how long to wait, and what to say of those that stay
    files     which files of a repository an adapter, or a model, is made of
    headers   a folder of headers alone, fetched by range requests
    pull      a repository becomes a folder, whole or not at all; a reference becomes a local path
    stream    a model is sent while it is being made
    upload    files become one commit, whatever gets lost on the way
    subject   what is pushed, opened and checked
    push      an adapter or a model becomes a repository, with its card
    card      the model card: front matter and one section of our own in a person's text
    section   what that section says

Only huggingface_hub's own public functions are used (1.0 to 2.x), never its HTTP library, which changed twice.
"""
