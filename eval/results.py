# SPDX-License-Identifier: Apache-2.0
"""What came out of a cell, and how it is written."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import parallel, stats

__all__ = [
    "as_json",
    "compare",
    "figures_of",
    "hard",
    "logged",
    "samples_of",
    "scores_of",
    "write",
    "write_results",
]


def _first_metric(found: Mapping[str, Any], task: str) -> str:
    """The first metric of a task's configuration; of a group's, that of its first task."""
    configs = found["configs"]
    config = configs.get(task) or next(iter(configs.values()))
    return str(config["metric_list"][0]["metric"])


def samples_of(found: Mapping[str, Any], task: str) -> Iterator[dict[str, Any]]:
    """What is kept of each sample: enough for loyalty, paired tests and scores by type."""
    metric = _first_metric(found, task)
    for name, logged in found["samples"].items():
        # Several processes hand over theirs one after the other.
        for sample in sorted(logged, key=lambda s: s["doc_id"]):
            doc = sample.get("doc", {})
            kinds = (doc.get(k) for k in ("type", "category", "question_type"))
            answer = sample["filtered_resps"]
            while isinstance(answer, (list, tuple)) and len(answer) == 1:
                answer = answer[0]
            yield {
                "id": f"{name}/{sample['doc_id']}",
                "type": next((k for k in kinds if isinstance(k, str)), None),
                "target": as_json(sample["target"]),
                "answer": answer if isinstance(answer, str) else json.dumps(as_json(answer)),
                "score": stats.sample_score(sample.get(metric)),
            }


def scores_of(
    found: Mapping[str, Any], task: str, samples: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    metric = _first_metric(found, task)
    figures = found["results"].get(task, {})
    scores = [s["score"] for s in samples if s["score"] is not None]
    named = {k: v for k, v in figures.items() if k.split(",")[0] == metric}
    score = stats.sample_score(next(iter(named.values()), None))
    if score is None and scores:  # a group without an aggregate of its own
        score = sum(scores) / len(scores)
    # Only of a mean over samples do the samples tell the interval.
    is_mean = score is not None and scores and math.isclose(score, sum(scores) / len(scores))
    by_type: dict[str, Any] = {}
    for kind in sorted({s["type"] for s in samples if s["type"] is not None}):
        part = [s["score"] for s in samples if s["type"] == kind and s["score"] is not None]
        if part and is_mean:
            by_type[kind] = {
                "score": sum(part) / len(part),
                "interval": list(stats.interval(part)),
                "samples": len(part),
            }
    return {
        "metric": metric,
        "score": score,
        "interval": list(stats.interval(scores)) if is_mean else None,
        "samples": len(samples),
        "by_type": by_type,
        "lmms_eval": as_json(figures),
    }


def figures_of(report: Any) -> dict[str, Any]:
    """Tokens, FLOPs and times of a cell from its patch's report.

    Times are medians: the first prefills are slow for reasons that are not the method's.
    """
    if not report.prefills:
        return {"tokens": None, "flops": None, "kv_bytes": None, "ms": None}
    flops = dict(report.flops)
    flops["total"] = sum(flops.values())
    times = {
        name: statistics.median(getattr(prefill, f"{name}_ms") for prefill in report.prefills)
        for name in ("vision", "selector", "lm")
    }
    tokens = {
        "in": report.tokens_in,
        "out": report.tokens_out,
        "per_layer": report.tokens_per_layer,
        "equivalent": report.equivalent_tokens,
    }
    figures: dict[str, Any] = as_json(
        {"tokens": tokens, "flops": flops, "kv_bytes": report.kv_bytes, "ms": times}
    )
    return figures


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


def as_json(value: Any) -> Any:
    """`value` as strict JSON can hold it: `nan` becomes `null`, what is unknown its text."""
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if hasattr(value, "item"):
        return as_json(value.item())
    return str(value)


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
