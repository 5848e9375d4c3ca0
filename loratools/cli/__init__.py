"""The command line. One file per command, found by file name: `extract_svd.py` is `loratools extract-svd`.

A command file has one function named `command`, made with `@command(section=...)` of `_group`. It imports only click
and its neighbours here at the top, so that `--help` stays instant, and the library inside the function. It parses,
calls the library once, and returns a `Report`; the frame prints it as text or, with --json, as data.

    _group     commands by file name, and what every command has in common
    _options   options that several commands share
    _show      the result on stdout: `Report`, tables, sizes, JSON
    _talk      everything else, on stderr: notes, warnings, progress, errors
    _faults    what is said of an exception
    _batch     what a command line with several paths, or with --each FOLDER, is about
    _each      a command on each of several paths
    _pool      the same in several processes, in the order of the paths
    _signals   SIGINT, SIGTERM and SIGHUP end a run in one way
    _run       one run from arguments to exit code
"""
