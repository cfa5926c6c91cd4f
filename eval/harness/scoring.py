# SPDX-License-Identifier: Apache-2.0
"""What is recorded of a cell: samples, scores, tokens, FLOPs and times."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..analysis import stats

__all__ = ["as_json", "figures_of", "samples_of", "scores_of"]


def _first_metric(found: Mapping[str, Any], task: str) -> str:
    """The first metric of a task's configuration, or of a group's first task."""
    configs = found["configs"]
    config = configs.get(task) or next(iter(configs.values()))
    return str(config["metric_list"][0]["metric"])


def samples_of(found: Mapping[str, Any], task: str) -> Iterator[dict[str, Any]]:
    """What is recorded of each sample, for loyalty, paired tests and scores by type."""
    metric = _first_metric(found, task)
    for name, logged in found["samples"].items():
        # Several processes deliver their samples one after the other.
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
    if score is None and scores:  # a group without its own aggregate
        score = sum(scores) / len(scores)
    # Samples give an interval only for a mean over samples.
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

    Times are medians, as the first prefills are slow for reasons unrelated to the method.
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


def as_json(value: Any) -> Any:
    """`value` as strict JSON: `nan` becomes `null`, other objects their text."""
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
