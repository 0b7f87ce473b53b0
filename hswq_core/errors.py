"""Errors a user can act on: what is wrong, what was received, what was expected, what to do about it."""

from __future__ import annotations


class HSWQError(Exception):
    """Base of all errors this pack raises deliberately.

    Args:
        what: name of the offending thing (a layer, a key, a file, an input).
        got: the actual value or state.
        expected: the valid value or state.
        remedy: one sentence telling the user what to do.
    """

    def __init__(self, what: str, *, got: object, expected: object, remedy: str) -> None:
        super().__init__(f"{what}: got {got}, expected {expected}. {remedy}")
        self.what = what


class SettingError(HSWQError):
    """A setting (name, ratio, format, method) is out of its range."""


class SessionError(HSWQError):
    """A statistics session is missing, unreadable, empty, or belongs to another model."""


class LayerError(HSWQError):
    """One layer cannot be observed or quantized as asked."""


class FileError(HSWQError):
    """A checkpoint cannot be read or written."""
