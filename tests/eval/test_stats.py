# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests of scores: against hand values, scipy, and properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from vtc.eval.analysis import stats

BITS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)
P_VALUES = st.lists(st.floats(0, 1), max_size=20)


# ---- intervals ----------------------------------------------------------------------------------
def test_bootstrap_agrees_with_scipys():
    values = np.random.default_rng(0).gamma(2.0, size=80)
    ours = stats.bootstrap(values, resamples=8000)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=8000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours == pytest.approx(theirs, abs=0.03)
    assert ours[0] < values.mean() < ours[1]


def test_bootstrap_is_what_interval_gives_for_shares_and_needs_values():
    values = [0.2, 0.9, 0.4, 1.0, 0.0]
    assert stats.interval(values, seed=3) == stats.bootstrap(values, seed=3)
    assert stats.bootstrap(values, seed=3) != stats.bootstrap(values, seed=4)
    assert stats.interval([0, 1, 1]) == stats.wilson(2, 3)
    with pytest.raises(ValueError, match="values: expected at least one"):
        stats.bootstrap([])


# ---- McNemar ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (9, 1, 22 / 1024), (4, 4, 1.0), (2, 5, 58 / 128)],
)
def test_mcnemar_by_hand(wins, losses, p):
    """Twice the tail of a fair coin, at most 1."""
    assert stats.mcnemar(wins, losses) == pytest.approx(p)
    assert stats.mcnemar(losses, wins) == pytest.approx(p)


def test_mcnemar_refuses_negative_counts():
    with pytest.raises(ValueError, match="wins: expected at least 0, got -1"):
        stats.mcnemar(-1, 2)


# ---- permutation --------------------------------------------------------------------------------
def test_permutation_goes_through_all_signs_of_few_samples():
    ours, theirs = [0.9, 0.5, 0.8, 0.3, 0.7], [0.1, 0.6, 0.2, 0.2, 0.4]
    d = np.subtract(ours, theirs)
    sums = [abs(np.dot(signs, d)) for signs in itertools.product((1, -1), repeat=5)]
    expected = np.mean([s >= abs(d.sum()) - 1e-12 for s in sums])
    assert stats.paired_permutation(ours, theirs) == pytest.approx(expected)


@given(BITS)
def test_permutation_of_bits_is_mcnemar(pairs):
    """The signs of differences of 1 are fair coins, so both tests count the same tail."""
    ours, theirs = zip(*pairs, strict=True)
    wins = sum(a > b for a, b in pairs)
    losses = sum(a < b for a, b in pairs)
    if wins + losses > 10:  # beyond that it draws signs
        return
    found = stats.paired_permutation(ours, theirs, resamples=1024)
    assert found == pytest.approx(stats.mcnemar(wins, losses))


def test_permutation_is_seeded_two_sided_and_finds_what_is_there():
    rng = np.random.default_rng(0)
    a = rng.random(60)
    b = a + 0.2 + 0.1 * rng.standard_normal(60)
    p = stats.paired_permutation(a, b)
    assert p == pytest.approx(2 / 10_000)  # the least that 9999 draws can give
    c = a + 0.1 * rng.standard_normal(60)
    q = stats.paired_permutation(a, c, seed=1)
    assert q == stats.paired_permutation(a, c, seed=1)
    assert q == pytest.approx(stats.paired_permutation(c, a, seed=2), abs=0.03)
    assert q == pytest.approx(scipy.stats.ttest_rel(a, c).pvalue, abs=0.05)
    assert stats.paired_permutation(a, a) == 1.0


# ---- the comparison -----------------------------------------------------------------------------
@given(BITS)
def test_comparison_of_bits(pairs):
    ours, theirs = ([float(x) for x in column] for column in zip(*pairs, strict=True))
    found = stats.paired(ours, theirs)
    assert found.samples == len(pairs)
    assert found.difference == pytest.approx((found.wins - found.losses) / len(pairs))
    low, high = found.interval
    assert -1 <= low <= found.difference + 1e-12
    assert found.difference - 1e-12 <= high <= 1
    assert low < high
    assert found.test == "McNemar"
    assert found.p == stats.mcnemar(found.wins, found.losses)
    other = stats.paired(theirs, ours)
    assert (other.wins, other.losses, other.p) == (found.losses, found.wins, found.p)
    assert other.interval == pytest.approx((-high, -low))


def test_interval_of_paired_proportions_by_hand_and_its_coverage():
    """12 wins, 4 losses of 50: (12.5 - 4.5) / 52 +- 1.96 sqrt(17 - 64 / 52) / 52."""
    ours, theirs = [1] * 12 + [0] * 4 + [1] * 34, [0] * 12 + [1] * 4 + [1] * 34
    half = 1.959964 * math.sqrt(17 - 64 / 52) / 52
    found = stats.paired(ours, theirs).interval
    assert found == pytest.approx((8 / 52 - half, 8 / 52 + half), abs=1e-6)

    rng = np.random.default_rng(0)
    outcomes = rng.multinomial(25, (0.25, 0.1, 0.65), size=2000)  # won, lost, same
    covered = 0
    for won, lost, same in outcomes:
        ours = [1] * won + [0] * lost + [1] * same
        theirs = [0] * won + [1] * lost + [1] * same
        low, high = stats.paired(ours, theirs).interval
        covered += low <= 0.15 <= high
    assert 0.93 < covered / 2000 < 0.985


def test_comparison_of_shares():
    rng = np.random.default_rng(0)
    a, b = rng.random(30), rng.random(30)
    found = stats.paired(a, b)
    assert found.test == "permutation"
    assert found.p == stats.paired_permutation(a, b)
    assert found.interval == stats.bootstrap(a - b)
    assert found.wins + found.losses == 30


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 0.0])])
def test_comparison_refuses_what_is_not_paired(ours, theirs):
    for compare in (stats.paired, stats.paired_permutation):
        with pytest.raises(ValueError, match="theirs: expected as many scores as in ours"):
            compare(ours, theirs)


# ---- Holm ---------------------------------------------------------------------------------------
def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert stats.holm([]) == []


@given(P_VALUES)
def test_holm_properties(p_values):
    found = stats.holm(p_values)
    n = len(p_values)
    for p, q in zip(p_values, found, strict=True):
        assert p <= q <= min(1.0, n * p) + 1e-12  # no more than Bonferroni's
    order = sorted(range(n), key=lambda i: p_values[i])
    assert [found[i] for i in order] == sorted(found)
    if n:
        assert min(found) == pytest.approx(min(1.0, n * min(p_values)))
    assert stats.holm(p_values[::-1]) == pytest.approx(found[::-1])


@given(P_VALUES, st.floats(0.001, 0.999))
def test_holm_rejects_as_the_procedure_step_by_step(p_values, level):
    """From the smallest on, reject while p * (those left) <= level."""
    rejected = set()
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        if p_values[i] * (len(p_values) - rank) > level:
            break
        rejected.add(i)
    assert {i for i, q in enumerate(stats.holm(p_values)) if q <= level} == rejected


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_holm_refuses_what_is_no_p_value(p):
    with pytest.raises(ValueError, match=r"p_values: expected a number in \[0, 1\]"):
        stats.holm([0.5, p])


# ---- chance -------------------------------------------------------------------------------------
def test_best_constant_by_hand():
    samples = [("colour", "red"), ("colour", "Red."), ("colour", "blue"), (None, "yes")]
    found = stats.best_constant(samples)
    assert found.score == 3 / 4
    assert found.answers == {"colour": ("red", 2, 3), None: ("yes", 1, 1)}
    assert stats.best_constant([("a", "x"), ("a", "b")]).answers["a"] == ("b", 1, 2)
    with pytest.raises(ValueError, match="samples: expected at least one"):
        stats.best_constant([])


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz")), min_size=1))
def test_no_constant_answer_beats_it(samples):
    found = stats.best_constant(samples)
    for one, two in itertools.product("xyz", repeat=2):
        given_answers = {"a": one, "b": two}
        right = sum(given_answers[kind] == target for kind, target in samples)
        assert right / len(samples) <= found.score


def test_match_ignores_case_punctuation_and_spaces_around():
    assert stats.is_match(" Yes.", "yes")
    assert not stats.is_match("yes", "no")
    assert not stats.is_match("top left", "topleft")
