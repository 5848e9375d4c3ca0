"""loratools help"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from loratools.cli._group import command as make
from loratools.cli._show import Report
from loratools.cli._spelling import topics_like

TOPICS = Path(__file__).with_name("topics")
_WIDEST = 120  # columns of the topics as they are written
_SHOWN = 4  # topics that have a word, those that have it most


def flowed(lines: Sequence[str], width: int) -> Iterator[str]:
    """Yield Markdown for a terminal of so many columns: paragraphs and lists flow, code and tables are as they stand.

    >>> list(flowed(["- one two", "  three", "", "```", "a  long  line", "```"], 10))
    ['- one two', '  three', '', '```', 'a  long  line', '```']
    """
    text: list[str] = []
    code = False
    for line in [*lines, ""]:
        fence = line.startswith("```")
        if text and (fence or not line or line.startswith(("#", "|", "- "))):
            indent = "  " if text[0].startswith("- ") else ""
            yield from textwrap.wrap(
                " ".join(text), width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
            text = []
        code ^= fence
        if code or fence or not line or line.startswith(("#", "|")):
            yield line
        else:
            text.append(line.strip())


def _completed(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """Return the topics and commands that begin so, for the completion of a shell."""
    root = context.find_root()
    commands = root.command.list_commands(root) if isinstance(root.command, click.Group) else []
    return [name for name in (*sorted(path.stem for path in TOPICS.glob("*.md")), *commands) if name.startswith(begun)]


@make(section="Learn")
@click.argument("topic", required=False, shell_complete=_completed)
def command(topic: str | None) -> Report:
    """Explain a topic at length, or list the topics; of a command print its page.

    \b
    Examples:
      loratools help
      loratools help quantized
      loratools help merge
    """
    topics = {path.stem: path.read_text(encoding="utf-8") for path in sorted(TOPICS.glob("*.md"))}
    titles = {name: text.partition("\n")[0].removeprefix("# ") for name, text in topics.items()}
    if topic is None:
        width = max(map(len, titles))
        lines = [f"{name:{width}}  {title}" for name, title in titles.items()]
        after = [
            "",
            "loratools help TOPIC prints one, loratools help COMMAND or loratools COMMAND --help a command's page.",
        ]
        return Report({"topics": titles}, [*lines, *after])
    if topic in topics:
        lines = topics[topic].rstrip().split("\n")
        if sys.stdout is not None and sys.stdout.isatty():
            lines = list(flowed(lines, min(shutil.get_terminal_size().columns, _WIDEST)))
        return Report({"topic": topic, "text": topics[topic]}, lines)
    root = click.get_current_context().find_root()
    commands = root.command
    assert isinstance(commands, click.Group)
    if topic in commands.list_commands(root) and (found := commands.get_command(root, topic)):
        with click.Context(found, info_name=topic, parent=root) as page:
            text = found.get_help(page)
        leads = [f"loratools help {name}  {titles[name]}" for name in topics if f"loratools {topic} " in topics[name]]
        lines = [*text.split("\n"), *(["", "Topics:", *(f"  {line}" for line in leads)] if leads else [])]
        return Report({"topic": topic, "text": "\n".join(lines)}, lines)
    if like := topics_like(topic, list(topics), commands.list_commands(root)):
        more = f"; did you mean {like}?"
    else:
        word = re.compile(rf"(?<!\w){re.escape(topic)}(?!\w)", re.IGNORECASE)
        counts = {name: count for name, text in topics.items() if (count := len(word.findall(text)))}
        having = sorted(counts, key=lambda name: -counts[name])[:_SHOWN]
        more = f"; topics that have the word: {', '.join(having)}" if having else ""
    raise click.BadParameter(f"{topic!r} is neither a topic nor a command{more}", param_hint="'TOPIC'")
