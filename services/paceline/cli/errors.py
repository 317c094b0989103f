"""The one error of the command line: a message for a person, and an exit code."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer


class CommandError(Exception):
    """The command cannot go on; the message says what to do about it."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


def leave(command: str, error: CommandError) -> NoReturn:
    """Print the message on stderr and exit."""
    print(f"paceline {command}: {error.message}", file=sys.stderr, flush=True)
    raise typer.Exit(error.exit_code) from error
