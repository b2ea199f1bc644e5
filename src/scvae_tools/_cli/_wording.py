"""Messages of the package in the words of the command line, and characters that a terminal may lack."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scvae_tools._cli._options import Command

#: Python code in remedies, and the option that does the same.
CODE = {"adata.raw.to_adata()": "--raw"}


def in_options(message: str, command: Command) -> str:
    """Message in one line, with the options of a command that stand for the arguments named in it.

    Options that are called as the argument is, such as ``--batch-key`` for ``batch_key``, need no word.
    """
    message = " ".join(message.split())
    flags = {option.name: option.flags.split()[-1] for option in command.options}
    named = [name for found in re.findall(r"`(\w+)`|\b(\w+)=", message) for name in found if name]
    meant = {f"`{name}`": flags[name] for name in named if flags.get(name, "").startswith("--")}
    meant = {name: flag for name, flag in meant.items() if flag != f"--{name.strip('`').replace('_', '-')}"}
    meant |= {code: flag for code, flag in CODE.items() if code in message and flag in flags.values()}
    if not meant:
        return message
    return f"{message} On the command line, {' and '.join(f'{name} is {flag}' for name, flag in meant.items())}."


@contextlib.contextmanager
def any_character() -> Iterator[None]:
    r"""Context in which characters that the output cannot encode, such as λ in ASCII, are written as ``\u03bb``."""
    streams = [each for each in (sys.stdout, sys.stderr) if hasattr(each, "reconfigure")]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            if not stream.closed:
                stream.reconfigure(errors=errors)
