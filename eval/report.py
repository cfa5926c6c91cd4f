# SPDX-License-Identifier: Apache-2.0
"""What `vtc eval` prints: one table of the cells of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["runs", "table"]

_NONE = "–"
_NOTE = """
blind: the same images in grey. tokens, mean: vision tokens of an image averaged over the language \
model's layers; compare methods at equal ones. prefill: the language model's, without the \
selector; medians. FLOPs: 2 per multiply-add. Intervals are over the samples, not over the seeds \
of methods that sample."""


def runs(per_layer: Sequence[float]) -> str:
    """Tokens per layer, equal neighbours together: [576, 576, 144] is "576×2 144×1"."""
    return " ".join(f"{n}×{len(list(same))}" for n, same in groupby(round(x) for x in per_layer))


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


def table(results: Mapping[str, Any]) -> RenderableType:
    """The cells of `results` (what `vtc.eval.run.run` returns), 120 columns wide at most.

    One block for each task, a line of explanation, and the errors of failed cells.
    """
    cells = results["cells"]
    scale, unit = _unit(cells)
    parts: list[RenderableType] = []
    failed = []
    for task, group in groupby(cells, key=lambda c: c["task"]):
        rows = list(group)
        drawn = _block(f"{results['model']['id']} · {task}", rows, scale, unit)
        parts.append(drawn)
        for cell in rows:
            if cell["status"] != "done":
                failed.append(f"{task}, {_name(cell)}: {cell['error']}")
    parts.append(Text(_NOTE, style="dim"))
    parts += [Text(f"failed: {line}", style="red") for line in failed]
    return Group(*parts)


def _name(cell: Mapping[str, Any]) -> str:
    return cell["label"] if cell["keep"] is None else f"{cell['label']} keep {cell['keep']:g}"


def _block(title: str, rows: Sequence[Mapping[str, Any]], scale: float, unit: str) -> Table:
    counts = {c["samples"] for c in rows if c["status"] == "done"}
    size = f" · {max(counts)} samples" if counts else ""
    drawn = Table(
        title=title + size, title_justify="left", title_style="bold", box=SIMPLE_HEAD,
        pad_edge=False, show_edge=False,
    )  # fmt: skip
    drawn.add_column("\nmethod", overflow="fold", max_width=22)
    drawn.add_column("\nkeep", justify="right")
    drawn.add_column("accuracy, %\n[95 % interval]", justify="right", no_wrap=True)
    drawn.add_column("same as\nfull, %", justify="right")
    drawn.add_column("vision tokens per\nlayer × layers", overflow="fold", max_width=20)
    drawn.add_column("tokens,\nmean", justify="right")
    drawn.add_column(f"LM,\n{unit}", justify="right")
    drawn.add_column("KV,\nMiB", justify="right")
    drawn.add_column("prefill,\nms", justify="right")
    drawn.add_column("selector,\nms", justify="right")
    for cell in rows:
        keep = _NONE if cell["keep"] is None else f"{cell['keep']:g}"
        if cell["status"] != "done":
            drawn.add_row(cell["label"], keep, Text("failed", style="bold red"))
            continue
        tokens, flops, ms = cell["tokens"], cell["flops"], cell["ms"]
        lm = flops["lm"] if flops else None
        drawn.add_row(
            cell["label"],
            keep,
            _score(cell),
            _number(None if cell["loyalty"] is None else 100 * cell["loyalty"]),
            runs(tokens["per_layer"]) if tokens else _NONE,
            _number(tokens["equivalent"] if tokens else None),
            _NONE if lm is None else f"{lm / scale:.3g}",
            _NONE if cell["kv_bytes"] is None else f"{cell['kv_bytes'] / 2**20:.3g}",
            _number(ms["lm"] if ms else None),
            _number(ms["selector"] if ms else None, 2),
        )
    return drawn
