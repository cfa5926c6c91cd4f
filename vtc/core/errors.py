# SPDX-License-Identifier: Apache-2.0
"""Errors that name the argument at fault, for programs that have to say which option that was."""

from __future__ import annotations

__all__ = ["ArgumentError", "ArgumentTypeError", "argument_of", "message_of", "within"]


class _OfArgument(Exception):
    """An argument and what is wrong with it."""

    def __init__(self, argument: str, message: str) -> None:
        # Both go to `args`, so that the error passes from process to process as it is.
        super().__init__(argument, message)
        self.argument, self.message = argument, message

    def __str__(self) -> str:
        return f"{self.argument}: {self.message}"


class ArgumentError(_OfArgument, ValueError):
    """An argument has a value that it cannot have.

    Attributes:
        argument: its name, as the function or the method that refuses it has it.
        message: what is wrong with it, without the name.
    """


class ArgumentTypeError(_OfArgument, TypeError):
    """An argument is of a kind that it cannot be, or has no place here.

    Attributes:
        argument, message: as of `ArgumentError`.
    """


def argument_of(error: BaseException) -> str | None:
    """The argument that `error` names, or `None` if it names none."""
    return error.argument if isinstance(error, _OfArgument) else None


def message_of(error: BaseException, *said: str) -> str:
    """What `error` says, without the name of its argument where that is one of `said` already."""
    if isinstance(error, _OfArgument) and error.argument in said:
        return error.message
    return str(error)


def within(argument: str, error: ValueError | TypeError) -> ArgumentError | ArgumentTypeError:
    """`error` as one of `argument`, in whose value it arose: a `TypeError` stays one."""
    kind = ArgumentTypeError if isinstance(error, TypeError) else ArgumentError
    return kind(argument, str(error))
