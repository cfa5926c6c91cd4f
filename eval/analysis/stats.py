# SPDX-License-Identifier: Apache-2.0
"""Uncertainty of scores, from the samples of a run."""

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
    """95 % interval of a proportion (Wilson 1927, JASA 22), accurate for few samples and near 0 and
    1.

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
    # At 0 and 1, rounding must not exclude the proportion.
    return max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p))


def interval(scores: Sequence[float], resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `scores`.

    Wilson's interval if all scores are 0 or 1, otherwise percentiles of a bootstrap over the
    samples. It covers the choice of questions, not the seed.

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

    Equal values have an interval of width 0, however few they are.

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
    """A comparison of two methods on the same samples.

    Attributes:
        samples: number of samples that both answered.
        difference: mean score of the first minus that of the second.
        interval: 95 % interval of the difference: Agresti and Min's for scores of 0 and 1,
            otherwise a bootstrap over the samples.
        wins, losses: number of samples on which the first scored higher, and lower.
        test: "McNemar" or "permutation".
        p: two-sided p value.
    """

    samples: int
    difference: float
    interval: tuple[float, float]
    wins: int
    losses: int
    test: str
    p: float


def paired(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Paired:
    """Compare two methods by their scores on the same samples.

    McNemar's exact test for scores of 0 and 1, otherwise a permutation test.

    Args:
        ours, theirs: scores of the two methods, in the same order of samples.
        seed: seed of bootstrap and permutations.

    Raises:
        ArgumentError: no scores, or different numbers of them.
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
    adds half a sample to each of the four outcomes, so that it holds for few samples."""
    won, lost, size = wins + 0.5, losses + 0.5, n + 2
    centre = (won - lost) / size
    half = _Z * math.sqrt(won + lost - (won - lost) ** 2 / size) / size
    found = (wins - losses) / n
    # The centre is shrunk towards 0; the interval must include the observed difference.
    return max(-1.0, min(centre - half, found)), min(1.0, max(centre + half, found))


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided p value of McNemar's exact test.

    Args:
        wins, losses: number of samples that only the first, and only the second, got right. If both
            are 0, p is 1.
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
    """Two-sided p value of a paired permutation test of equal means.

    Draws the signs of the samples' differences `resamples` times, or enumerates them if they are no
    more than that. Samples without a difference do not matter.

    Args:
        ours, theirs: scores, in the same order of samples.
        resamples: maximum number of permutations.
        seed: seed of the draws.

    Raises:
        ArgumentError: no scores, or different numbers of them.
    """
    a, b = _pairs(ours, theirs)
    differences = (a - b)[a != b]
    if differences.size < 2:  # for one difference both signs are equally extreme
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
    """p values corrected for multiple tests (Holm 1979, Scand. J. Stat. 6), in the given order.

    With 95 % confidence, none of the differences with a corrected value of at most 0.05 is chance.

    Raises:
        ArgumentError: a value outside [0, 1].
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
    """The best constant answers: one for each type of question, without the picture.

    Attributes:
        score: fraction of samples on which they are right.
        answers: by type, (answer, number of samples on which it is right, number of samples).
    """

    score: float
    answers: dict[str | None, tuple[str, int, int]]


def best_constant(samples: Iterable[tuple[str | None, str]]) -> Constant:
    """The score of always giving the most frequent answer of a question's type.

    An upper bound, as it is counted on the same samples: with few samples of a type, well above the
    score on others. Answers are compared by `is_match`.

    Args:
        samples: (type, right answer) of each sample.

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
        # Ties go to the first in the alphabet, whatever the order of the samples.
        answer, right = min(counted.items(), key=lambda item: (-item[1], item[0]))
        answers[kind] = (answer, right, counted.total())
    right = sum(r for _, r, _ in answers.values())
    return Constant(right / sum(n for _, _, n in answers.values()), answers)


def is_match(answer: str, target: str) -> bool:
    """Whether two answers are equal, ignoring case, punctuation and surrounding spaces."""
    return _plain(answer) == _plain(target)


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _plain(text: str) -> str:
    return text.lower().translate(_PUNCTUATION).strip()


# ---- logged samples -----------------------------------------------------------------------------
def sample_score(value: Any) -> float | None:
    """The score of a logged sample: a number, or the entry "score" of a mapping; otherwise
    `None`."""
    if isinstance(value, Mapping):
        value = value.get("score")
    if isinstance(value, (bool, int, float, np.number)) and math.isfinite(float(value)):
        return float(value)
    return None


def agreement(answers: Mapping[str, str], reference: Mapping[str, str]) -> float | None:
    """Agreement ("loyalty"): the fraction of samples with the same answer as the reference.

    Answers are compared as text, ignoring case and surrounding spaces.

    Args:
        answers: answers by sample id.
        reference: those of the reference.

    Returns:
        A fraction, or `None` without common samples.
    """
    common = answers.keys() & reference.keys()
    if not common:
        return None
    same = sum(answers[k].strip().lower() == reference[k].strip().lower() for k in common)
    return same / len(common)
