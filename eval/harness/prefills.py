# SPDX-License-Identifier: Apache-2.0
"""A patch's prefills as JSON and back, for the journal of a run (`eval/harness/journal.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vtc.core.prefill import ImageTokens, Prefill, Sample, Stopwatch

__all__ = ["from_json", "to_json"]

_CLOCKS = ("vision", "heard", "selector", "lm")


def to_json(prefill: Prefill) -> dict[str, Any]:
    """A prefill as JSON, with its clocks' milliseconds so far, without GPU events."""
    return {
        "samples": [asdict(sample) for sample in prefill.samples],
        "bytes_per_value": prefill.bytes_per_value,
        **{name: getattr(prefill, name).__getstate__() for name in _CLOCKS},  # as in a pickle
    }


def from_json(record: Mapping[str, Any]) -> Prefill:
    """The inverse of `to_json`."""
    clocks = {}
    for name in _CLOCKS:
        clocks[name] = Stopwatch()
        vars(clocks[name]).update(record[name])
    samples = []
    for sample in record["samples"]:
        images = tuple(ImageTokens(**_tuples(image)) for image in sample["images"])
        samples.append(Sample(**{**_tuples(sample), "images": images}))
    return Prefill(samples, record["bytes_per_value"], **clocks)


def _tuples(record: Mapping[str, Any]) -> dict[str, Any]:
    """A frozen dataclass's fields, with JSON's lists turned back into tuples."""

    def back(value: Any) -> Any:
        return tuple(map(back, value)) if isinstance(value, (list, tuple)) else value

    return {name: back(value) for name, value in record.items()}
