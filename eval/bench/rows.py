# SPDX-License-Identifier: Apache-2.0
"""Rows of the results, and their CSV table."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..report.table import runs as run_lengths
from .settings import Variant
from .subject import Subject


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    if not values:
        return None
    if len(values) == 1:
        low = middle = high = values[0]
    else:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high, "runs": list(values)}


def _ratio(mine: Sequence[float], other: Sequence[float]) -> dict[str, Any] | None:
    """Median, quartiles and the median's 95 % interval of the ratios within rounds."""
    if not mine or len(mine) != len(other) or not all(y > 0 for y in other):
        return None
    ratios = [x / y for x, y in zip(mine, other, strict=True)]
    found = _spread(ratios)
    return None if found is None else {**found, "interval": median_interval(ratios)}


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """A distribution-free confidence interval of the median, between two order statistics.

    Args:
        values: the sample.
        level: confidence level, in (0, 1).

    Returns:
        (low, high), or `None` if the values are too few for this level.
    """
    n, ordered = len(values), sorted(values)
    outside, rank = 2 * 0.5**n, 0
    if outside > 1 - level:
        return None
    while outside + 2 * math.comb(n, rank + 1) * 0.5**n <= 1 - level:
        rank += 1
        outside += 2 * math.comb(n, rank) * 0.5**n
    return ordered[rank], ordered[n - 1 - rank]


def _steps(variant: Variant) -> list[float]:
    """All timed decoding steps, in order."""
    named = sorted(name for name in variant.runs if name.startswith("step "))
    return [ms for name in named for ms in variant.runs[name]]


def _flops(config: Any, seen: Sequence[tuple[int, ...]]) -> dict[str, float]:
    """FLOPs of the language model for the whole batch: prefill and one decoding step."""
    from vtc.cost import decode_flops, prefill_flops

    return {
        "prefill": sum(prefill_flops(config, lengths).lm for lengths in seen),
        "decode": sum(decode_flops(config, lengths) for lengths in seen),
    }


PARTS = ("total", "vision", "selector", "lm", "prefill", "decode")


def row_of(subject: Subject, variant: Variant, plain: Variant) -> dict[str, Any]:
    """One row of the results (see `run`)."""
    from vtc.cost import equivalent_tokens, kv_bytes

    row: dict[str, Any] = {
        "dtype": str(subject.dtype).removeprefix("torch."),
        "batch": subject.batch,
        "label": variant.label,
        "keep": variant.keep if variant.label != "short" else None,
        "method": None if variant.method is None else variant.method.to_dict(),
        "status": "done" if variant.error is None else "failed",
        "error": variant.error,
    }
    row |= dict.fromkeys(("tokens", "ms", "ratio", "flops", "kv_bytes", "peak_bytes"))
    if variant.error is not None:
        return row
    count, text = len(variant.seen), subject.settings.text
    mean = [sum(column) / count - text for column in zip(*variant.seen, strict=True)]
    row["tokens"] = {
        "in": subject.tokens,
        "text": text,
        "per_layer": mean,
        "equivalent": equivalent_tokens(mean),
    }
    row["ms"] = {name: _spread(variant.runs.get(name, [])) for name in (*PARTS, "after")}
    row["flops"] = _flops(subject.config, variant.seen)
    size = subject.dtype.itemsize
    row["kv_bytes"] = sum(kv_bytes(subject.config, lengths, size) for lengths in variant.seen)
    row["peak_bytes"] = variant.peak
    compared = ("prefill", "total", "decode")
    row["ratio"] = dict.fromkeys(("unpatched", "short", "ideal"))
    if plain.error is None:
        row["ratio"]["unpatched"] = {
            name: _ratio(variant.runs[name], plain.runs[name]) for name in compared
        }
        all_of_it = _flops(subject.config, plain.seen)
        row["ratio"]["ideal"] = {
            name: _ratio(
                variant.runs[name],
                [x * row["flops"][name] / all_of_it[name] for x in plain.runs[name]],
            )
            for name in ("prefill", "decode")
        }
    other = variant.reference
    if other is not None and other.error is None:
        against = {name: _ratio(variant.runs[name], other.runs[name]) for name in compared}
        # Steps are short but many: compare all pairs.
        against["decode"] = _ratio(_steps(variant), _steps(other))
        ends = [each.runs.get("after", []) for each in (variant, other)]
        row["ratio"]["short"] = {**against, "beyond": _ratio(*ends)}
    return row


def at(row: Mapping[str, Any], *path: str) -> Any:
    found: Any = row
    for step in path:
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per row, with the median and quartiles of each figure."""
    columns: dict[str, tuple[str, ...]] = {
        name: (name,) for name in ("dtype", "batch", "label", "keep", "status", "error")
    }
    columns |= {"tokens": ("tokens", "equivalent"), "first": ("tokens", "per_layer")}
    figures: dict[str, tuple[str, ...]] = {f"{name}_ms": ("ms", name) for name in PARTS}
    for other, names in {
        "unpatched": ("prefill", "total", "decode"),
        "short": ("prefill", "total", "decode", "beyond"),
        "ideal": ("prefill", "decode"),
    }.items():
        figures |= {f"{name}_to_{other}": ("ratio", other, name) for name in names}
    for name, path in figures.items():
        columns |= {name: (*path, "median"), f"{name}_q1": (*path, "q1")}
        columns |= {f"{name}_q3": (*path, "q3")}
    columns |= {"lm_flops": ("flops", "prefill"), "kv_bytes": ("kv_bytes",)}
    columns |= {"peak_bytes": ("peak_bytes",)}
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([name if name != "first" else "tokens_per_layer" for name in columns])
    for row in rows:
        values = {name: at(row, *path) for name, path in columns.items()}
        values["first"] = None if values["first"] is None else run_lengths(values["first"])
        writer.writerow(values.values())
    return text.getvalue()
