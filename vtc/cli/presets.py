# SPDX-License-Identifier: Apache-2.0
"""`vtc presets`: published token targets, and what meeting them costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from .console import output, stacked, wide_table
from .options import Wide, fail_of


def presets(
    method: Annotated[str | None, typer.Argument(help="One method only.")] = None,
    target: Annotated[str | None, typer.Option(help="llava-1.5, llava-next, qwen2.5-vl.")] = None,
    wide: Wide = False,
) -> None:
    """List published token targets, and what meeting them really costs the language model.

    KV MiB and TFLOPs are those of its prefill with one image and no text, 2 bytes a value and 2
    FLOPs a multiply-add.
    """
    import vtc
    from vtc.cli.catalogue import short
    from vtc.core.errors import ArgumentError

    try:
        found = vtc.presets(method, target)
    except ArgumentError as error:
        option = "METHOD" if error.argument == "method" else "--target"
        raise fail_of(option, error) from None
    headers = ("method", "model", "which is", "target", "enter", "mean", "last", "KV MiB", "TFLOPs")
    rows, notes = [], []
    for each in found:
        seen = each.schedule()
        tokens = str(each.tokens) if isinstance(each.tokens, int) else f"{each.tokens:.4g}"
        counts = (str(seen.entering), f"{seen.average:.1f}", str(seen.kept))
        settings = ", ".join(f"{name}={short(value)}" for name, value in each.settings.items())
        if each.scope == "tile":
            settings += "; for each tile"
        cache = f"{seen.kv_bytes / 2**20:.1f}"
        flops = f"{seen.flops / 1e12:.2f}"  # of the language model's prefill, by vtc.cost
        rows.append((each.method, each.target, each.convention, tokens, *counts, cache, flops))
        notes.append((settings, each.source))
    if wide:
        every = [row + note for row, note in zip(rows, notes, strict=True)]
        wide_table((*headers, "settings", "source"), every, right=6)
        return
    console = output()
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        sized = zip(cells, widths, strict=True)
        return "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(sized))

    console.print(line(headers), style="dim", markup=False, soft_wrap=True)
    for row, note in zip(rows, notes, strict=True):
        stacked(console, line(row), ["; ".join(filter(None, note))])
