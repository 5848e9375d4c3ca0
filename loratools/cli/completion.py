"""loratools completion"""

from __future__ import annotations

import click

from loratools.cli._group import command as make
from loratools.cli._show import Report


@make(section="Learn")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> Report:
    """Print the completion script for a shell.

    Write it once to where your shell looks for completions, or evaluate it at its start.

    \b
    Examples:
      loratools completion bash > loratools.bash
      eval "$(loratools completion bash)"
      loratools completion fish > loratools.fish
    """
    from click.shell_completion import get_completion_class

    from loratools.cli._run import group

    completion = get_completion_class(shell)
    assert completion is not None, shell
    script = completion(group(), {}, "loratools", "_LORATOOLS_COMPLETE").source().strip()
    return Report({"shell": shell, "script": script}, script.split("\n"), verbatim=True)
