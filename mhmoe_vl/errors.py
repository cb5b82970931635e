"""Errors that are the user's to mend, and the exit codes that go with them.

A user error is one line that names the path, the value, the constraint and the remedy. Entry points run
inside :func:`exit_on_user_error`, which prints that line without a traceback. Anything else is a bug and keeps its
traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

#: Exit code of a process that Ctrl-C ended, as shells have it: 128 and the number of the signal.
INTERRUPTED = 130


class UserError(Exception):
    """Something the user can mend. ``exit_code`` follows sysexits where one fits.

    Attributes:
        is_shared: all ranks raise it with the same message, so that one of them may print it for all.
    """

    exit_code = 64
    is_shared = False


class ConfigError(UserError):
    """A configuration that cannot be run: unknown key, wrong type, impossible combination."""


class DataError(UserError):
    """Input data that is missing, broken or does not fit together."""

    exit_code = 65


class OutputError(UserError):
    """A result that cannot be written, or must not be overwritten."""

    exit_code = 73


class CheckpointError(UserError):
    """A checkpoint that is damaged or does not belong to this model."""

    exit_code = 74


class NonFiniteError(UserError):
    """Training diverged: too many steps in a row had a loss or gradient that is not finite."""

    exit_code = 76


def suggest(word: str, known: list[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known word, else an empty string."""
    nearest = get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""


@contextmanager
def exit_on_user_error(*, rank: int = 0, is_shared: bool = False) -> Iterator[None]:
    """Turn a :class:`UserError` into one line on stderr and its exit code.

    Args:
        rank: of this process; what all ranks raise is printed by rank 0 alone.
        is_shared: whatever the body raises, it raises on all ranks.
    """
    try:
        yield
    except UserError as error:
        if rank == 0 or not (is_shared or error.is_shared):
            sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        if rank == 0:
            sys.stderr.write("interrupted\n")
        raise SystemExit(INTERRUPTED) from None
