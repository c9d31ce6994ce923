"""Errors that are meant for the person at the terminal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the command line prints the message alone and exits with code 2.

    The message says what is wrong, where it stands (file and line, or flag), and how to mend it.
    """


class PluginError(UserError):
    """What a plugin names does not load. Its `__cause__`, if any, is what the plugin raised: the command line prints
    the message and that traceback, because the mend lies in the plugin.
    """


class RunError(RuntimeError):
    """A run that had started could not go on: the command line prints the message and exits with code 1.

    `cause` is the traceback of the process that failed, as text, where there is one.
    """

    def __init__(self, message: str, cause: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause

    def __reduce__(self) -> tuple[type[RunError], tuple[str, str | None]]:
        return (type(self), (self.message, self.cause))


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence with the closest known names, or all of them when none is close."""
    names = sorted(known)
    if not names:
        return "There are none."
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(repr(match) for match in close)}?"
    return f"Known: {', '.join(names)}."
