# SPDX-License-Identifier: Apache-2.0
"""Errors that name the argument at fault, so that programs can name the option it came from."""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "UnsupportedModelError",
    "argument_of",
    "message_of",
    "within",
]


class _OfArgument(Exception):
    """An argument and what is wrong with it."""

    def __init__(self, argument: str, message: str) -> None:
        # Both go to `args`, so that the error survives pickling between processes.
        super().__init__(argument, message)
        self.argument, self.message = argument, message

    def __str__(self) -> str:
        return f"{self.argument}: {self.message}"


class ArgumentError(_OfArgument, ValueError):
    """An argument has an invalid value.

    Attributes:
        argument: its name in the function or the method that refuses it.
        message: what is wrong with it, without the name.
    """


class ArgumentTypeError(_OfArgument, TypeError):
    """An argument has the wrong type, or is not accepted here.

    Attributes:
        argument, message: as in `ArgumentError`.
    """


class UnsupportedModelError(TypeError):
    """The model is not a VLM of a shape that vtc covers."""


def argument_of(error: BaseException) -> str | None:
    """The argument that `error` names, or `None` if it names none."""
    return error.argument if isinstance(error, _OfArgument) else None


def message_of(error: BaseException, *said: str) -> str:
    """The text of `error`, without the name of its argument if that is one of `said`."""
    if isinstance(error, _OfArgument) and error.argument in said:
        return error.message
    return str(error)


def within(argument: str, error: ValueError | TypeError) -> ArgumentError | ArgumentTypeError:
    """`error` as an error of `argument`, whose value caused it; a `TypeError` stays one."""
    kind = ArgumentTypeError if isinstance(error, TypeError) else ArgumentError
    return kind(argument, str(error))
