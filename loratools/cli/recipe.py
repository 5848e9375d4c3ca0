"""loratools recipe"""

from __future__ import annotations

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make
from loratools.cli._talk import Talk, pass_talk


@make(section="Look")
@click.argument("output", type=options.INPUT)
@options.option("--last", is_flag=True, more="[default: all steps]")
@pass_talk
def command(talk: Talk, /, output: str, last: bool) -> show.Report:
    """Print how an output was made, as a recipe that makes it again, byte for byte.

    Models, and adapters in safetensors and GGUF files, that loratools wrote say which command made them, with which
    options, and of what: adapters by the digests of their tensors, models by those of their names and shapes, and of
    their numbers where the output tells them. Where an input said it too, its steps come first. There is no path in it:
    `loratools run` takes the inputs by --input NAME=PATH, or finds them by digest with --search FOLDER.

    \b
    Examples:
      loratools recipe blend
      loratools recipe blend > again.yaml
    """
    from loratools.cli._recipes import recipe_of

    found = recipe_of(output, last=last)
    if found.unknown:
        talk.warn(f"the record names options that this loratools has not: {'; '.join(found.unknown)}")
    document = {"output": found.output, "command": found.command, "tool": found.tool, "recipe": found.recipe}
    return show.Report(document, [] if talk.json else found.yaml.splitlines(), verbatim=True)
