# SPDX-License-Identifier: Apache-2.0
"""`vtc models`: the supported model families."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import output, stacked, wide_table
from .options import Wide


def models(
    markdown: Annotated[bool, typer.Option(help="Print MODELS.md.")] = False,
    wide: Wide = False,
) -> None:
    """List the supported model families."""
    import vtc
    from vtc.models.page import COLUMNS, page, row

    if markdown:
        from .support import table

        print(page(table()), end="")
        return
    rows = [row(family) for family in vtc.models()]
    if wide:
        wide_table(COLUMNS, rows)
        return
    console = output()
    for name, *facts in rows:
        labels = zip(COLUMNS[1:], facts, strict=True)
        stacked(console, name, ["; ".join(f"{label}: {fact}" for label, fact in labels)])
