# SPDX-License-Identifier: Apache-2.0
"""What came out of the cells of a folder, and how it is written."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import parallel, stats
from .scoring import as_json

__all__ = ["compare", "hard", "logged", "write", "write_results"]


# ---- writing ------------------------------------------------------------------------------------
def write(path: Path, text: str) -> None:
    """Write a file at once: readers see the old one or the new one. Of several processes the first
    writes."""
    if parallel.rank() != 0:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or a loss of power could leave the name without the text
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # what half fitted on a full disk
        raise


def logged(out: Path, key: str) -> dict[str, dict[str, Any]]:
    """The samples of a finished cell by their id."""
    lines = (out / "cells" / f"{key}.jsonl").read_text("utf-8").splitlines()
    return {sample["id"]: sample for sample in map(json.loads, lines)}


def compare(out: Path, cells: Sequence[dict[str, Any]]) -> None:
    """Add what a cell can only be told beside others: loyalty, and the score on hard samples."""
    for task in {cell["task"] for cell in cells}:
        done = [c for c in cells if c["task"] == task and c["status"] == "done"]
        samples = {c["key"]: logged(out, c["key"]) for c in done}
        full = next((samples[c["key"]] for c in done if c["label"] == "full"), None)
        small = {c["keep"]: samples[c["key"]] for c in done if c["label"] == "downsample"}
        for cell in done:
            mine, smaller = samples[cell["key"]], small.get(cell["keep"])
            cell["loyalty"] = cell["hard"] = None
            if full is None:
                continue
            answers = ({k: s["answer"] for k, s in x.items()} for x in (mine, full))
            cell["loyalty"] = stats.agreement(*answers)
            if smaller is not None and cell["interval"] is not None:
                cell["hard"] = hard(mine, full, smaller)


def hard(
    mine: Mapping[str, Any], full: Mapping[str, Any], smaller: Mapping[str, Any]
) -> dict[str, Any]:
    """The score on samples that need the tokens: right with all, wrong with a smaller image."""
    needed = [k for k in mine if full[k]["score"] == 1 and smaller[k]["score"] == 0]
    scores = [mine[k]["score"] for k in needed]
    return {"samples": len(scores), "score": sum(scores) / len(scores) if scores else None}


_COLUMNS = {
    "task": ("task",),
    "label": ("label",),
    "keep": ("keep",),
    "status": ("status",),
    "metric": ("metric",),
    "score": ("score",),
    "low": ("interval", 0),
    "high": ("interval", 1),
    "samples": ("samples",),
    "loyalty": ("loyalty",),
    "hard_score": ("hard", "score"),
    "hard_samples": ("hard", "samples"),
    "tokens_in": ("tokens", "in"),
    "tokens_out": ("tokens", "out"),
    "equivalent_tokens": ("tokens", "equivalent"),
    "vision_flops": ("flops", "vision"),
    "projector_flops": ("flops", "projector"),
    "lm_flops": ("flops", "lm"),
    "kv_bytes": ("kv_bytes",),
    "vision_ms": ("ms", "vision"),
    "selector_ms": ("ms", "selector"),
    "lm_ms": ("ms", "lm"),
    "error": ("error",),
}


def _at(cell: Any, path: Sequence[Any]) -> Any:
    for step in path:
        try:
            cell = cell[step]
        except (KeyError, IndexError, TypeError):
            return None
    return cell


def write_results(out: Path, results: dict[str, Any]) -> None:
    if parallel.rank() != 0:
        return
    compare(out, results["cells"])
    write(out / "results.json", json.dumps(as_json(results), indent=1, ensure_ascii=False))
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(_COLUMNS)
    for cell in results["cells"]:
        writer.writerow([_at(cell, path) for path in _COLUMNS.values()])
    write(out / "results.csv", table.getvalue())
