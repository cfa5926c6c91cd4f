# SPDX-License-Identifier: Apache-2.0
"""Scores with their uncertainty, from the samples of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["agreement", "interval", "sample_score", "wilson"]

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson(correct: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927, JASA 22): good for few samples and near 0 and 1.

    Args:
        correct: successes, from 0 to `n`.
        n: trials, at least 1.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"expected 0 <= correct <= n and n >= 1, got correct={correct}, n={n}")
    p, z2 = correct / n, _Z * _Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At 0 and 1 rounding must not put the proportion outside of its interval.
    return max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p))


def interval(scores: Sequence[float], resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `scores`.

    Wilson's where every score is 0 or 1, else the percentiles of a bootstrap over the samples. It
    tells how far another draw of questions could move the score, not what another seed would do.

    Raises:
        ValueError: no scores.
    """
    values = np.asarray(scores, dtype=float)
    if values.size == 0:
        raise ValueError("scores: expected at least one, got none")
    if np.isin(values, (0.0, 1.0)).all():
        return wilson(float(values.sum()), values.size)
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, values.size).mean() for _ in range(resamples)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def sample_score(value: Any) -> float | None:
    """The score of a logged sample: a number, or the "score" in what was logged; else `None`."""
    if isinstance(value, Mapping):
        value = value.get("score")
    if isinstance(value, (bool, int, float, np.number)) and math.isfinite(float(value)):
        return float(value)
    return None


def agreement(answers: Mapping[str, str], reference: Mapping[str, str]) -> float | None:
    """Loyalty: the share of samples with the reference's answer, `None` without samples in common.

    Answers are compared as text, without case and surrounding spaces.
    """
    common = answers.keys() & reference.keys()
    if not common:
        return None
    same = sum(answers[k].strip().lower() == reference[k].strip().lower() for k in common)
    return same / len(common)
