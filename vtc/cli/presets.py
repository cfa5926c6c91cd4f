# SPDX-License-Identifier: Apache-2.0
"""`vtc presets`: published token targets and their cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from .console import explain, output, stacked, wide_table
from .options import Wide, fail_of

_LEGEND = (
    "which is: what the target counts, of an image's vision tokens",
    "  exact: those that enter the language model",
    "  average: those that a decoder layer processes, mean over the layers",
    "  kept: those left after a cut between layers; the layers before it process more",
    "  counted: what the authors' own counter reports, less than is processed",
    "enter, mean, last: tokens of the first decoder layer, mean over the layers, of the last layer",
    "KV MiB, TFLOPs: of the language model's prefill with one image and no text",
)


def presets(
    method: Annotated[str | None, typer.Argument(help="One method only.")] = None,
    target: Annotated[str | None, typer.Option(help="llava-1.5, llava-next, qwen2.5-vl.")] = None,
    wide: Wide = False,
) -> None:
    """List published token targets and their actual cost in the language model.

    The column "which is" says what the target counts. exact: vision tokens that enter the
    language model. average: those that a decoder layer processes, mean over the layers. kept:
    those left after a cut between layers; the layers before it process more. counted: what the
    authors' own counter reports, less than is processed. On Qwen2.5-VL, where image sizes
    differ, a target is a fraction.

    enter, mean and last are the vision tokens of the first decoder layer, their mean over the
    layers, and those of the last layer. KV MiB and TFLOPs are for the prefill with one image and no
    text, 2 bytes per value and 2 FLOPs per multiply-add.
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
        explain(*_LEGEND)
        return
    console = output()
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        sized = zip(cells, widths, strict=True)
        return "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(sized))

    console.print(line(headers), style="dim", markup=False, soft_wrap=True)
    for row, note in zip(rows, notes, strict=True):
        stacked(console, line(row), ["; ".join(filter(None, note))])
    explain(*_LEGEND)
