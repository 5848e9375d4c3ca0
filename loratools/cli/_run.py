"""One run, from arguments to exit code: 0 done, 1 failed or differs, 2 usage, 128 + n ended by a signal n."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

import click

from loratools.cli._group import Commands, common_options
from loratools.cli._signals import code_of
from loratools.cli._spelling import giver, is_on, long_name, meant, options_like
from loratools.cli._talk import Talk
from loratools.cli._words import REFUSED
from loratools.version import __version__

HELP = """The toolkit for LoRA adapter files: read every layout, tell the truth about it, and operate on it exactly.

A LoRA adapter is a low-rank change of a model, W' = W + s·B·A. loratools inspects, checks and merges adapters in
constant memory and exactly, and refuses an adapter that does not fit the base model. A PATH is a
safetensors file or a folder that holds one, or several with an index.

\b
Examples:
  loratools inspect adapter                    what is in it? (header only)
  loratools merge base adapter -o merged       W' = W + s·B·A, exactly
  loratools verify merged --base base --adapter adapter
  loratools hash base                          which model exactly is it?
"""

EPILOG = """\b
Exit codes:
  0    done, and the answer is yes
  1    failed, or the answer is no: not valid, not equal
  2    wrong use of the command line
  129, 130, 143  ended by SIGHUP, Ctrl-C, SIGTERM, and tidied up
  141  the reader of the output went away

\b
Environment:
  LORATOOLS_<OPTION>            default of an option, in every command that
                                has it: LORATOOLS_THREADS, LORATOOLS_JSON
  LORATOOLS_<COMMAND>_<OPTION>  in one command, and before the other:
                                LORATOOLS_EXTRACT_SVD_MAX_RANK
  LORATOOLS_DEBUG=1             show a traceback with an error
  NO_COLOR, FORCE_COLOR         never, or always, use colours on stderr

The result goes to stdout, all talk to stderr; with --json the result, or the error, is one JSON document on stdout,
with sizes in bytes, as `loratools COMMAND --json-schema` describes it.
`loratools COMMAND --help` explains a command; `loratools completion SHELL` prints completion for your shell.
"""


def group() -> Commands:
    """Return the root of all commands."""
    return Commands(
        "loratools.cli",
        name="loratools",
        help=HELP,
        epilog=EPILOG,
        params=[_version_option(), *common_options()],
        context_settings={"help_option_names": ["-h", "--help"]},
        subcommand_metavar="COMMAND ...",
    )


def run(arguments: Sequence[str] | None = None, root: Commands | None = None) -> int:
    """Run one command line (by default the process's own) and return its exit code; never raise."""
    root = root or group()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot show
    # --json must already hold while the rest of the command line is found to be wrong.
    talk = Talk(json="--json" in arguments or is_on("LORATOOLS_JSON"), color=_color())
    explained = False
    try:
        try:
            code = _invoke(root, arguments, talk)
        except (BrokenPipeError, click.Abort):
            raise
        except Exception as error:
            code, explained = _explain(error, talk), True
        talk.release()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except (KeyboardInterrupt, click.Abort) as stopped:
        with suppress(OSError):
            talk.error("Interrupted", "interrupted; nothing half-written was left")
        return code_of(stopped)
    except BrokenPipeError:
        _drop(sys.stdout)
        return 141
    except OSError as error:
        _drop(sys.stdout)
        if explained:
            return code  # what could not be written is still in the buffer, and fails again
        with suppress(OSError):
            talk.error("OSError", f"stdout: {(error.strerror or str(error)).lower()}", lost=True)
        return 1


def _invoke(root: Commands, arguments: list[str], talk: Talk) -> int:
    if instruction := os.environ.get("_LORATOOLS_COMPLETE"):
        from click.shell_completion import shell_complete

        return shell_complete(root, {}, "loratools", "_LORATOOLS_COMPLETE", instruction)
    try:
        # An empty command line is a question, not an error to be explained.
        with root.make_context("loratools", arguments or ["--help"], obj=talk, color=talk.color) as context:
            context.command.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    return 0


def _explain(error: Exception, talk: Talk) -> int:
    """Say what went wrong in a sentence, never a traceback unless it was asked for; return the exit code."""
    from loratools.cli._faults import fault_of, sentence

    if isinstance(error, click.BadParameter) and error.ctx and error.param and (name := giver(error.ctx, error.param)):
        error.param_hint = f"{name} in the environment ({long_name(error.param)})"
    if isinstance(error, click.NoSuchOption) and error.ctx:
        options = [name for option in error.ctx.command.get_params(error.ctx) for name in option.opts]
        owned = "" if meant(error.option_name) in options else _owners(error.option_name, error.ctx)
        like = "" if owned else options_like(error.option_name, options)
        message = error.message.rstrip(".") + (f"; did you mean {like}?" if like else "")
        if error.ctx.parent and (why := REFUSED.get(error.option_name)):
            message, owned = f"{error.ctx.command.name} {why}: {owned.rstrip('. ')}", ""
        fault = fault_of(error)._replace(message=sentence(message), hint=f"{owned}{fault_of(error).hint}")
    else:
        fault = fault_of(error)
    talk.error(fault.kind, fault.message, fault.problems, fault.hint)
    return fault.code


def _owners(option: str, context: click.Context) -> str:
    """Return whose an option is that the running command has not, or nothing."""
    from loratools.cli._hints import owners

    root = context.find_root().command
    return owners(option, root.options(context)) if isinstance(root, Commands) else ""


def _version_option() -> click.Option:
    def show(context: click.Context, option: click.Parameter, value: bool) -> None:
        if value and not context.resilient_parsing:
            from loratools.format.manifest import VERSION

            click.echo(f"loratools {__version__} (format {VERSION})")
            context.exit()

    return click.Option(
        ["--version"], help="Print the versions of the package and of the format.", is_flag=True, is_eager=True,
        expose_value=False, callback=show,
    )  # fmt: skip


def _color() -> bool | None:
    """Return True or False where the environment decides, None where the terminal does."""
    if os.environ.get("NO_COLOR"):
        return False
    return True if os.environ.get("FORCE_COLOR") else None


def _drop(stream: object) -> None:
    """Point a stream nobody reads at nothing, or Python would try to flush it once more and complain."""
    with suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[attr-defined]
