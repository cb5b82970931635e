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


class UserError(Exception):
    """Something the user can mend. ``exit_code`` follows sysexits where one fits."""

    exit_code = 64


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
def exit_on_user_error() -> Iterator[None]:
    """Turn a :class:`UserError` into one line on stderr and its exit code."""
    try:
        yield
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None
