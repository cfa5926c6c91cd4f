# SPDX-License-Identifier: Apache-2.0
"""The table that `vtc eval` prints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vtc.core.figures import three_digits

from ..harness.results import grouped, of_this_run

__all__ = ["FULL_WIDTH", "named", "runs", "table"]

FULL_WIDTH = 118
"""Terminal columns that a table with all columns needs."""

_NONE = "–"
_NOTE = """\
blind: with grey images. tokens, mean: vision tokens of an image, averaged over the language \
model's layers; compare methods at equal tokens. prefill: the language model's, without the \
selector; medians. FLOPs: 2 per multiply-add. Intervals are over samples, not over the seeds of \
sampling methods."""


_MORE = """
With --wide: tokens per layer, FLOPs, KV cache and the selector's time. """


def runs(per_layer: Sequence[float]) -> str:
    """Tokens per layer, run-length encoded: [576, 576, 144] is "576×2 144×1"."""
    return " ".join(f"{n}×{len(list(same))}" for n, same in groupby(round(x) for x in per_layer))


def named(label: str, width: int) -> str:
    """A method's label in lines of at most `width`, broken only before settings and parts."""
    lines = [""]
    for piece in re.split(r"(?=[:+|@])", label):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append(" ")
        lines[-1] += piece
    return "\n".join(lines)


def _number(value: float | None, digits: int = 1) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"


def _score(cell: Mapping[str, Any]) -> str:
    score, interval = cell["score"], cell["interval"]
    if score is None:
        return _NONE
    if interval is None:  # not a mean over samples: lmms-eval's own scale
        return f"{score:.4g} ({cell['metric']})"
    low, high = (100 * x for x in interval)
    return f"{100 * score:5.1f} [{low:5.1f}, {high:5.1f}]"


def _unit(cells: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
    """One unit for the FLOPs of all cells."""
    totals = [c["flops"]["lm"] for c in cells if c.get("flops") and c["flops"]["lm"] is not None]
    largest = max(totals, default=0.0)
    return (1e12, "TFLOPs") if largest >= 1e12 else (1e9, "GFLOPs")


def table(results: Mapping[str, Any], width: int | None = None) -> RenderableType:
    """The cells of the latest run and comparable ones, as a table for the terminal.

    One block for each task and setting, a line of explanation, and the errors of failed cells.

    Args:
        results: what `vtc.eval.harness.run.run` returns.
        width: columns of the terminal; below `FULL_WIDTH` the table has fewer columns, to fit 80.
            `None` shows all.
    """
    asked = {id(cell) for cell in of_this_run(results)}
    groups = grouped(results["cells"])
    shown = [(title, rows) for title, rows in groups if any(id(row) in asked for row in rows)]
    cells = [row for _, rows in shown for row in rows]
    scale, unit = _unit(cells)
    narrow = width is not None and width < FULL_WIDTH
    parts: list[RenderableType] = []
    failed = []
    for title, rows in shown:
        model = (rows[0].get("setup") or results["model"])["id"]
        head = title if model in title.split(" · ") else f"{model} · {title}"
        drawn = _block(head, rows, scale, unit, narrow)
        parts.append(drawn)
        for cell in rows:
            if cell["status"] != "done":
                failed.append(f"{title}, {_name(cell)}: {cell['error']}")
    parts.append(Text((_MORE if narrow else "\n") + _NOTE, style="dim"))
    others = len(results["cells"]) - len(cells)
    if others:
        parts.append(Text(f"\n{others} cells of other tasks and settings are in report.html."))
    if results.get("superseded"):
        parts.append(
            Text(
                f"\n{results['superseded']} cells of other code or versions are left out; they are "
                "still in cells/."
            )
        )
    parts += [Text(f"failed: {line}", style="red") for line in failed]
    return Group(*parts)


def _name(cell: Mapping[str, Any]) -> str:
    return cell["label"] if cell["keep"] is None else f"{cell['label']} keep {cell['keep']:g}"


def _block(
    title: str, rows: Sequence[Mapping[str, Any]], scale: float, unit: str, narrow: bool
) -> Table:
    counts = {c["samples"] for c in rows if c["status"] == "done"}
    size = f" · {max(counts)} samples" if counts else ""
    drawn = Table(
        title=title + size, title_justify="left", title_style="bold", box=SIMPLE_HEAD,
        pad_edge=False, show_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    drawn.add_column("\nmethod", overflow="fold", max_width=22)
    drawn.add_column("\nkeep", justify="right", no_wrap=True)
    drawn.add_column("accuracy, %\n[95 % interval]", justify="right", no_wrap=True)
    drawn.add_column("same as\nfull, %", justify="right", no_wrap=True)
    if not narrow:
        drawn.add_column("vision tokens per\nlayer × layers", overflow="fold", max_width=20)
    drawn.add_column("tokens,\nmean", justify="right", no_wrap=True)
    if not narrow:
        drawn.add_column(f"LM,\n{unit}", justify="right")
        drawn.add_column("KV,\nMiB", justify="right")
    drawn.add_column("prefill,\nms", justify="right", no_wrap=True)
    if not narrow:
        drawn.add_column("selector,\nms", justify="right")
    for cell in rows:
        name = named(cell["label"], 22)
        keep = _NONE if cell["keep"] is None else f"{cell['keep']:g}"
        if cell["status"] != "done":
            drawn.add_row(name, keep, Text("failed", style="bold red"))
            continue
        tokens, flops, ms = cell["tokens"], cell["flops"], cell["ms"]
        lm = flops["lm"] if flops else None
        values = {
            "same": _number(None if cell["loyalty"] is None else 100 * cell["loyalty"]),
            "layers": runs(tokens["per_layer"]) if tokens else _NONE,
            "tokens": _number(tokens["equivalent"] if tokens else None),
            "lm": _NONE if lm is None else three_digits(lm / scale),
            "kv": _NONE if cell["kv_bytes"] is None else three_digits(cell["kv_bytes"] / 2**20),
            "prefill": _number(ms["lm"] if ms else None),
            "selector": _number(ms["selector"] if ms else None, 2),
        }
        chosen = ("same", "tokens", "prefill") if narrow else tuple(values)
        drawn.add_row(name, keep, _score(cell), *(values[key] for key in chosen))
    return drawn
