# SPDX-License-Identifier: Apache-2.0
"""Output of commands: consoles, wide tables and narrow lists."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["error_console", "explain", "output", "stacked", "wide_table"]

_WIDE = 160


def output(wide: bool = False) -> Console:
    """Console on the current standard output; 120 columns if it is not a terminal and COLUMNS is
    not set. `wide` allows long lines."""
    console = Console(highlight=False)
    if wide:
        return Console(highlight=False, width=max(console.width, _WIDE))
    known = console.is_terminal or "COLUMNS" in os.environ
    return console if known else Console(highlight=False, width=120)


def error_console() -> Console:
    """Console on the error stream, for progress and everything that is not a result."""
    return Console(file=sys.stderr, highlight=False)


def wide_table(headers: Sequence[str], rows: Iterable[Sequence[str]], right: int = 0) -> None:
    """Print a table at full width, for wide terminals and pipes; `right` columns from the fourth on
    are right-aligned."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, header in enumerate(headers):
        table.add_column(header, no_wrap=True, justify="right" if 3 <= i < 3 + right else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    wide = Console(highlight=False, width=10_000)
    console = Console(highlight=False, width=max(80, wide.measure(table).maximum))
    console.print(table)


def explain(*notes: str) -> None:
    """Print notes on how to read the output above, wrapped at 100 columns."""
    console = output()
    console.print()
    for note in notes:
        lines = textwrap.wrap(
            note, min(console.width, 100), subsequent_indent="    ", break_on_hyphens=False
        )
        console.print("\n".join(lines), style="dim", markup=False, soft_wrap=True)


def stacked(console: Console, name: str, facts: Iterable[str]) -> None:
    """Print a name and facts about it below; lines break only between words."""
    width = min(console.width, 100)
    console.print(name, style="bold", markup=False, soft_wrap=True)
    for fact in facts:
        lines = textwrap.wrap(
            fact, width, initial_indent="  ", subsequent_indent="    ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        for line in lines:
            console.print(line, markup=False, soft_wrap=True)
