# SPDX-License-Identifier: Apache-2.0
"""Options shared by several commands, and errors for invalid values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vtc.core.spec import Keep

__all__ = ["Import", "Wide", "WideTable", "budgets", "fail", "fail_of", "listed"]


def fail(option: str, message: str) -> typer.BadParameter:
    """The exception to raise for an invalid `option`."""
    return typer.BadParameter(message, param_hint=option)


def fail_of(option: str, error: Exception, *said: str) -> typer.BadParameter:
    """The exception to raise for an `error` caused by `option`.

    Args:
        option: as the user writes it.
        error: the error that its value caused.
        said: arguments that the option stands for; the message does not repeat their names.
    """
    from vtc.core.errors import message_of

    return fail(option, message_of(error, option.strip("-").lower(), *said))


def listed(option: str, text: str) -> tuple[str, ...]:
    """The parts of a comma-separated list."""
    from vtc.core.spec import split_list

    try:
        return tuple(split_list(text))
    except ValueError as error:
        raise fail_of(option, error, "text") from None


def budgets(text: str) -> tuple[Keep, ...]:
    """The parts of `--keep`."""
    from vtc.core.spec import parse_keep

    parts = listed("--keep", text)
    try:
        return tuple(map(parse_keep, parts))
    except ValueError as error:
        raise fail_of("--keep", error) from None


def _imported(modules: list[str]) -> list[str]:
    from vtc.core.plugins import import_modules

    try:
        import_modules(modules)
    except ValueError as error:
        raise fail_of("--import", error) from None
    return modules


Import = Annotated[
    list[str],
    typer.Option(
        "--import",
        metavar="MODULE",
        callback=_imported,
        is_eager=True,
        help="Module with your own methods, a name or a .py file; repeatable.",
    ),
]

Wide = Annotated[bool, typer.Option("--wide", help="Print a table with one line per row.")]
"""For commands that print a list."""

WideTable = Annotated[
    bool, typer.Option("--wide", help="Print all columns, however long the lines.")
]
"""For commands that print a table."""
