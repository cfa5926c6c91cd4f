# SPDX-License-Identifier: Apache-2.0
"""Scores with their uncertainty, from the samples of a run."""

from __future__ import annotations

import math
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtc.core.errors import ArgumentError
from vtc.core.settings import check_number

__all__ = [
    "Constant",
    "Paired",
    "agreement",
    "best_constant",
    "bootstrap",
    "holm",
    "interval",
    "is_match",
    "mcnemar",
    "paired",
    "paired_permutation",
    "sample_score",
    "wilson",
]

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson(correct: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927, JASA 22): good for few samples and near 0 and 1.

    Args:
        correct: successes, from 0 to `n`.
        n: trials, at least 1.
    """
    if n < 1:
        raise ArgumentError("n", f"expected at least 1, got {n}")
    if not 0 <= correct <= n:
        raise ArgumentError("correct", f"expected 0 to {n}, got {correct}")
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
        ArgumentError: no scores.
    """
    values = np.asarray(scores, dtype=float)
    if values.size == 0:
        raise ArgumentError("scores", "expected at least one, got none")
    if _binary(values):
        return wilson(float(values.sum()), values.size)
    return bootstrap(values, resamples, seed)


def bootstrap(
    values: Sequence[float] | np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean of `values`: percentiles of the means of `resamples` draws.

    Of equal values it has no width, however few they are.

    Raises:
        ArgumentError: no values.
    """
    given = np.asarray(values, dtype=float)
    if given.size == 0:
        raise ArgumentError("values", "expected at least one, got none")
    rng = np.random.default_rng(seed)
    means = [rng.choice(given, given.size).mean() for _ in range(resamples)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _binary(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


# ---- two methods on the same samples ------------------------------------------------------------
@dataclass(frozen=True)
class Paired:
    """What a comparison of two methods on the same samples says.

    Attributes:
        samples: how many both answered.
        difference: mean score of the first minus that of the second.
        interval: 95 % of the difference: Agresti and Min's for scores of 0 and 1, else a bootstrap
            over the samples.
        wins, losses: samples on which the first scored higher, and lower.
        test: "McNemar" or "permutation".
        p: two-sided.
    """

    samples: int
    difference: float
    interval: tuple[float, float]
    wins: int
    losses: int
    test: str
    p: float


def paired(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Paired:
    """Compare two methods by their scores on the same samples, in the same order.

    Scores of 0 and 1 are tested with McNemar's exact test, others with a permutation test.

    Raises:
        ArgumentError: no scores, or not as many of one as of the other.
    """
    a, b = _pairs(ours, theirs)
    wins, losses = int((a > b).sum()), int((a < b).sum())
    difference = float((a - b).mean())
    if _binary(a) and _binary(b):
        around, test, p = _agresti_min(wins, losses, a.size), "McNemar", mcnemar(wins, losses)
    else:
        around = bootstrap(a - b, seed=seed)
        test, p = "permutation", paired_permutation(ours, theirs, seed=seed)
    return Paired(a.size, difference, around, wins, losses, test, p)


def _pairs(ours: Sequence[float], theirs: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if a.ndim != 1 or a.shape != b.shape or a.size == 0:
        raise ArgumentError(
            "theirs",
            f"expected as many scores as in ours, at least one, got {b.shape} and {a.shape}",
        )
    return a, b


def _agresti_min(wins: int, losses: int, n: int) -> tuple[float, float]:
    """95 % interval of a difference of paired proportions (Agresti and Min 2005, Stat. Med. 24):
    half a sample is added to each of the four outcomes, which keeps it honest for few samples."""
    won, lost, size = wins + 0.5, losses + 0.5, n + 2
    centre = (won - lost) / size
    half = _Z * math.sqrt(won + lost - (won - lost) ** 2 / size) / size
    found = (wins - losses) / n
    # The centre is drawn towards 0; the difference that was found must not fall outside.
    return max(-1.0, min(centre - half, found)), min(1.0, max(centre + half, found))


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided p of McNemar's exact test.

    Args:
        wins, losses: samples that only the first got right, and only the second. The others say
            nothing. Without either, p is 1.
    """
    for name, count in (("wins", wins), ("losses", losses)):
        if count < 0:
            raise ArgumentError(name, f"expected at least 0, got {count}")
    if wins + losses == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses, 0.5).pvalue)


def paired_permutation(
    ours: Sequence[float], theirs: Sequence[float], resamples: int = 9999, seed: int = 0
) -> float:
    """Two-sided p of a paired permutation test of equal means.

    The sign of each sample's difference is drawn at random `resamples` times, or all signs are
    gone through where there are no more than that. Samples without a difference change nothing.

    Raises:
        ArgumentError: no scores, or not as many of one as of the other.
    """
    a, b = _pairs(ours, theirs)
    differences = (a - b)[a != b]
    if differences.size < 2:  # of one difference both signs are equally far out
        return 1.0
    from scipy.stats import permutation_test

    found = permutation_test(
        (differences,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, 2_000_000 // differences.size),  # 16 MB at a time
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979, Scand. J. Stat. 6), in the order given.

    Those of at most 0.05 name differences of which, with 95 % certainty, not one is chance.

    Raises:
        ArgumentError: a value outside of 0 to 1.
    """
    for p in p_values:
        check_number("p_values", p, "[0, 1]")
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


# ---- chance -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Constant:
    """The best answer that needs no picture: one for each type of question.

    Attributes:
        score: share of samples that these answers get right.
        answers: by type: the answer, samples it is right on, samples.
    """

    score: float
    answers: dict[str | None, tuple[str, int, int]]


def best_constant(samples: Iterable[tuple[str | None, str]]) -> Constant:
    """What always giving the most frequent answer of a question's type scores.

    Counted on the samples themselves, so an upper bound: with few samples of a type well above
    what such an answer would get on others. Answers are compared as `is_match` does.

    Args:
        samples: (type, right answer) of each.

    Raises:
        ArgumentError: no samples.
    """
    counts: defaultdict[str | None, Counter[str]] = defaultdict(Counter)
    for kind, target in samples:
        counts[kind][_plain(target)] += 1
    if not counts:
        raise ArgumentError("samples", "expected at least one, got none")
    answers = {}
    for kind, counted in sorted(counts.items(), key=lambda item: item[0] or ""):
        # Of equally frequent ones the first in the alphabet, whatever order the samples have.
        answer, right = min(counted.items(), key=lambda item: (-item[1], item[0]))
        answers[kind] = (answer, right, counted.total())
    right = sum(r for _, r, _ in answers.values())
    return Constant(right / sum(n for _, _, n in answers.values()), answers)


def is_match(answer: str, target: str) -> bool:
    """Whether they are the same text, without case, punctuation and surrounding spaces."""
    return _plain(answer) == _plain(target)


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _plain(text: str) -> str:
    return text.lower().translate(_PUNCTUATION).strip()


# ---- samples as they are logged -----------------------------------------------------------------
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
