# SPDX-License-Identifier: Apache-2.0
"""The results of a folder's cells, and writing them."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..analysis import stats
from . import parallel
from .identity import digest
from .plan import BASELINES
from .scoring import as_json

__all__ = ["compare", "gather", "group_of", "grouped", "hard", "logged", "of_this_run"]
__all__ += ["write", "write_results"]


# ---- writing ------------------------------------------------------------------------------------
def write(path: Path, text: str) -> None:
    """Write a file atomically: readers see the old or the new one. Only the first of several
    processes writes."""
    if parallel.rank() != 0:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or a power loss could leave an empty file
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a partial file on a full disk
        raise


# ---- all cells of a folder ----------------------------------------------------------------------
def group_of(cell: Mapping[str, Any]) -> str:
    """A hash of what comparable cells have in common: the task and its setup."""
    return digest([cell["task"], cell.get("setup") or {}])


def grouped(cells: Sequence[Any]) -> list[tuple[str, list[Any]]]:
    """Groups of comparable cells, each with a title: the task, and how its setup differs from other
    groups of the same task."""
    groups: dict[str, list[Any]] = {}
    for cell in cells:
        groups.setdefault(group_of(cell), []).append(cell)
    titles = []
    for rows in groups.values():
        task, own = rows[0]["task"], rows[0].get("setup") or {}
        others = [g[0].get("setup") or {} for g in groups.values() if g[0]["task"] == task]
        differs = [k for k in own if any(other.get(k) != own[k] for other in others)]
        if len(differs) > 1 and "data" in differs:  # a consequence of the limit or seed
            differs.remove("data")
        if "id" in differs and "fingerprint" in differs:
            differs.remove("fingerprint")
        titles.append(" · ".join([task, *(_setting(k, own[k]) for k in differs)]))
    return list(zip(titles, groups.values(), strict=True))


def _setting(name: str, value: Any) -> str:
    if name == "id":
        return str(value)
    if name == "limit":
        return "all samples" if value is None else f"limit {value}"
    if isinstance(value, Mapping):
        value = ", ".join(f"{k}={v}" for k, v in value.items()) or "none"
    return f"{name.replace('_', ' ')} {value}"


def of_this_run(results: Mapping[str, Any]) -> list[Any]:
    """The cells of a folder's latest run, without those of earlier runs."""
    if "run" not in results:
        return list(results["cells"])
    keys = set(results["run"])
    return [cell for cell in results["cells"] if cell["key"] in keys]


def gather(out: Path, rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The cells of a run and of earlier runs in its folder; and how many were left out because
    a newer one has the same name and setup but other code or versions.

    Earlier failed cells are only in results.json.
    """
    found = list(rows)
    names = {_name(row) for row in rows}
    keys = {row["key"] for row in rows}
    superseded = 0
    files = (out / "cells").glob("*.json")
    for file in sorted(files, key=lambda f: (-f.stat().st_mtime_ns, f.name)):
        row = _read(file)
        if row is None or row.get("key") in keys or not file.with_suffix(".jsonl").is_file():
            continue
        if "setup" not in row or _name(row) in names:
            superseded += 1
            continue
        names.add(_name(row))
        found.append(row)
    before = _read(out / "results.json") or {}
    for row in before.get("cells", ()):
        if row.get("status") == "failed" and "setup" in row and _name(row) not in names:
            names.add(_name(row))
            found.append(row)
    # Groups in order of appearance; in a group the run's own order, then the baselines first.
    order = {group: i for i, group in reversed(list(enumerate(map(group_of, found))))}
    place = {id(row): (0, 0) for row in rows}
    for row in found[len(rows) :]:
        label = row["label"]
        place[id(row)] = (1, BASELINES.index(label) if label in BASELINES else len(BASELINES))
    found.sort(key=lambda row: (order[group_of(row)], place[id(row)]))
    return found, superseded


def _name(row: Mapping[str, Any]) -> tuple[str, str, Any]:
    return group_of(row), row["label"], row["keep"]


def _read(file: Path) -> dict[str, Any] | None:
    try:
        row = json.loads(file.read_text("utf-8"))
        return row if isinstance(row, dict) else None
    except (OSError, ValueError):
        return None


# ---- comparisons --------------------------------------------------------------------------------
def logged(out: Path, key: str) -> dict[str, dict[str, Any]]:
    """The samples of a finished cell by id."""
    lines = (out / "cells" / f"{key}.jsonl").read_text("utf-8").splitlines()
    return {sample["id"]: sample for sample in map(json.loads, lines)}


def compare(out: Path, cells: Sequence[dict[str, Any]]) -> None:
    """Add what needs other cells: loyalty (agreement), and the score on hard samples."""
    for _, group in grouped(cells):
        done = [c for c in group if c["status"] == "done"]
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
    "model": ("setup", "id"),
    "fingerprint": ("setup", "fingerprint"),
    "limit": ("setup", "limit"),
    "batch_size": ("setup", "batch_size"),
    "seed": ("setup", "seed"),
    "dtype": ("setup", "dtype"),
    "device": ("setup", "device"),
}


def _at(cell: Any, path: Sequence[Any]) -> Any:
    for step in path:
        try:
            cell = cell[step]
        except (KeyError, IndexError, TypeError):
            return None
    return cell


def write_results(out: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Write results.json and results.csv of a folder; returns `results` with all its cells.

    Args:
        out: the folder.
        results: results of a run, with only its cells.
    """
    if parallel.rank() != 0:
        return results
    rows = results["cells"]
    cells, superseded = gather(out, rows)
    results = {
        **results,
        "run": list(dict.fromkeys(row["key"] for row in rows)),
        "superseded": superseded,
        "cells": cells,
    }
    compare(out, results["cells"])
    write(out / "results.json", json.dumps(as_json(results), indent=1, ensure_ascii=False))
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(_COLUMNS)
    for cell in results["cells"]:
        writer.writerow([_at(cell, path) for path in _COLUMNS.values()])
    write(out / "results.csv", table.getvalue())
    return results
