"""Errors that are meant for the person at the terminal."""

from __future__ import annotations

import difflib
import errno
import traceback
from collections.abc import Iterable

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
"""What a disk refuses with; the traceback of such an error helps nobody."""


class UserError(ValueError):
    """Bad input: the command line prints the message alone and exits with code 2.

    The message says what is wrong, where it stands (file and line, or flag), and how to mend it.
    """

    def placed(self, where: str) -> UserError:
        """The same error, with the place that it stands at before its message."""
        return UserError(f"{where}: {self}")


class PluginError(UserError):
    """A plugin, or what it names, does not load: the command line prints the message and the plugin's traceback,
    because the mend lies in the plugin.

    trace: that traceback, as text; without it, it is that of `__cause__`, if there is one.
    """

    def __init__(self, message: str, trace: str | None = None) -> None:
        super().__init__(message)
        self.trace = trace

    def placed(self, where: str) -> PluginError:
        """The same error, with the place that it stands at before its message."""
        error = PluginError(f"{where}: {self}", self.trace)
        error.__cause__ = self.__cause__
        return error


class MissingExtraError(UserError):
    """A component needs a package that its plugin only declares as an extra; the message says which extra to install.

    Contract tests skip what raises it.
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


def explained(error: Exception, who: str, where: str) -> UserError | RunError:
    """An exception as an error for people, which says that `who` failed, `where`, and carries the traceback.

    One that is meant for people already stays as it is.
    """
    if isinstance(error, UserError | RunError):
        return error
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return RunError(f"{who} cannot write {error.filename or 'a file'}: {error.strerror}")
    trace = "".join(traceback.format_exception(error))
    return RunError(f"{who} failed {where}: {type(error).__name__}: {error}", cause=trace)


def close(name: str, known: Iterable[str]) -> list[str]:
    """Known names that `name` may be a misspelling of, the likeliest first."""
    return difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence with the closest known names, or all of them when none is close."""
    names = sorted(set(known))
    if not names:
        return "There are none."
    if matches := close(name, names):
        return f"Did you mean {' or '.join(repr(match) for match in matches)}?"
    return f"Known: {', '.join(names)}."
