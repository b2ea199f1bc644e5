"""Command line ``scvae-tools``: arguments, messages and exit codes; `_commands` does the work.

Nothing but the standard library is loaded until a command runs, so that ``--help`` is there at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import sys
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

from scvae_tools._cli._options import COMMANDS, SAYING, Command, hint_for_option
from scvae_tools._cli._wording import any_character, in_options

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROGRAM = "scvae-tools"
BAD_INPUT, USAGE, INTERRUPTED = 1, 2, 130


@any_character()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments
        Arguments after the name of the program; None for those of the process.

    Returns
    -------
    0; 1 for bad input, with one line that says why; 130 after Ctrl-C, also if what a training reached by then has been
    written. Wrong usage ends the program with 2.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser, commands = build_parsers()
    if not arguments:
        parser.print_help(sys.stderr)
        return USAGE
    if len(arguments) == 1 and _needs_arguments(arguments[0]) and sys.stderr.isatty():
        commands[arguments[0]].print_help(sys.stderr)
        return USAGE
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse_unknown(unknown, given.command, commands[given.command])
    quiet, as_json = (getattr(given, name, False) for name in ("quiet", "json"))
    try:
        with _messages(quiet=quiet):
            result = _run(given, commands[given.command])
        _print(result, quiet=quiet, as_json=as_json)
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # `| head`; the interpreter would complain once more at its end
        sys.stdout = None
        return BAD_INPUT
    except Exception as error:
        if getattr(given, "traceback", False) or not _is_expected(error):
            raise
        _say(f"error: {in_options(str(error), COMMANDS[given.command])}")
        return BAD_INPUT
    return INTERRUPTED if isinstance(result, dict) and result.get("interrupted") else 0


def build_parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Parser of the program, and parser of each command."""
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Variational auto-encoders that cluster single cells, on raw counts.",
        epilog=f"`{PROGRAM} COMMAND --help` shows the options of a command and examples.",
    )
    parser.add_argument(
        "-V", "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="print the version"
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    return parser, {name: _add_command(subparsers, name, command) for name, command in COMMANDS.items()}


def _add_command(subparsers: Any, name: str, command: Command) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        name,
        help=command.help,
        description=f"{command.help[0].upper()}{command.help[1:]}.",
        epilog="\n  ".join(["examples:", *command.examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=" ".join([PROGRAM, name, *(option.usage for option in command.options if option.usage), "[options]"]),
        allow_abbrev=False,  # else new options would change what old calls mean
    )
    for option in (*command.options, *SAYING):
        option.add_to(parser)
    return parser


def _refuse_unknown(arguments: list[str], name: str, parser: argparse.ArgumentParser) -> NoReturn:
    hints = [hint_for_option(token, COMMANDS[name]) for token in arguments if token.startswith("-")]
    parser.error("; ".join([f"unrecognized arguments: {' '.join(arguments)}", *filter(None, hints)]))


class _Version(argparse.Action):
    """Action of ``--version``: looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from scvae_tools._version import __version__

        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        parser.exit()


def _needs_arguments(name: str) -> bool:
    return name in COMMANDS and name != "datasets"


def _run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> Any:
    """Run the command and return its result; anything that it prints itself goes to standard error."""
    from scvae_tools._cli import _commands

    with contextlib.redirect_stdout(sys.stderr):
        return getattr(_commands, given.command)(given, parser)


def _is_expected(error: Exception) -> bool:
    """Whether an error is due to the input, so that its message is enough: values, files, and errors of our own."""
    return isinstance(error, ValueError | OSError) or type(error).__module__.startswith("scvae_tools")


# -- what is said ------------------------------------------------------------------------------------------------------


def _say(message: str) -> None:
    sys.stderr.write(f"{PROGRAM}: {message}\n")


@contextlib.contextmanager
def _messages(*, quiet: bool) -> Iterator[None]:
    """Context that shows warnings for users in one line, and messages unless ``quiet``, both on standard error."""
    logger, handler = logging.getLogger("scvae_tools"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{PROGRAM}: %(message)s"))
    level, propagate = logger.level, logger.propagate
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: _say(f"warning: {' '.join(str(message).split())}")
        if not quiet:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def _print(result: Any, *, quiet: bool, as_json: bool) -> None:
    """Print a summary (dict) or a table (DataFrame) on the standard output."""
    if as_json:
        json.dump(_plain(result), sys.stdout, indent=1)
        sys.stdout.write("\n")
    elif isinstance(result, dict):
        if not quiet:
            width = max(map(len, result))
            lines = (f"{name.replace('_', ' '):<{width}}  {_short(value)}\n" for name, value in result.items())
            sys.stdout.writelines(lines)
    else:
        from scvae_tools._cli._writing import has_names

        result.to_csv(sys.stdout, sep="\t", index=has_names(result))
    sys.stdout.flush()


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return str(value)
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _plain(value: Any) -> Any:
    """Result in types that JSON can hold: rows of a table as objects, null for missing or infinite numbers."""
    if hasattr(value, "to_dict"):
        from scvae_tools._cli._writing import has_names

        value = (value.reset_index() if has_names(value) else value).to_dict("records")
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    value = value.item() if hasattr(value, "item") else value
    is_missing = isinstance(value, float) and not math.isfinite(value)
    return value if isinstance(value, str | bool | int | float) and not is_missing else None
