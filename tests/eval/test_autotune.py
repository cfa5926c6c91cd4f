# SPDX-License-Identifier: Apache-2.0
"""`vtc autotune`: who is dropped and when, who wins, and one race on the embedded model."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import vtc
from vtc.core.spec import parse_method

pytest.importorskip("lmms_eval")

from vtc.eval.harness import autotune as tuner
from vtc.eval.harness.autotune import (
    Measured,
    candidates,
    decide,
    frontier,
    paired_interval,
    race,
    rounds,
    winner,
)
from vtc.eval.harness.run import BadInput, Settings

shares = st.floats(0.0, 1.0)


@st.composite
def fields(draw: st.DrawFn) -> list[Measured]:
    """Up to eight measured candidates, with ties in cost and loss."""
    found = []
    for i in range(draw(st.integers(0, 8))):
        loss = draw(st.integers(-5, 20)) / 100
        low, high = loss - draw(shares) / 10, loss + draw(shares) / 10
        cost = float(draw(st.integers(1, 5)))
        found.append(Measured(f"m{i}", cost, 0.9 - loss, loss, low, high, 100))
    return found


# ---- the interval -------------------------------------------------------------------------------
def test_the_interval_is_that_of_agresti_and_min():
    # Their formula on the counts of a two-by-two table, half of one added to each of four cells.
    gains, losses, same = 5, 12, 83
    differences = [-1.0] * gains + [1.0] * losses + [0.0] * same
    n, b, c = 102.0, 12.5, 5.5
    centre = (b - c) / n
    half = 1.959964 * ((b + c) - (b - c) ** 2 / n) ** 0.5 / n
    mean, low, high = paired_interval([differences], 0.95)
    assert mean == pytest.approx(0.07)
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-6)


def test_few_samples_that_agree_are_not_certain():
    _, low, high = paired_interval([[0.0] * 8], 0.95)
    assert low < -0.1
    assert high > 0.1


def test_tasks_count_alike_whatever_their_samples():
    mean, _, _ = paired_interval([[1.0] * 2, [0.0] * 98], 0.95)
    assert mean == pytest.approx(0.5)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60), st.floats(0.5, 0.99))
def test_the_interval_holds_the_mean_and_widens_with_confidence(task, confidence):
    mean, low, high = paired_interval([task], confidence)
    _, wider_low, wider_high = paired_interval([task], (1 + confidence) / 2)
    assert low <= mean <= high
    assert wider_low <= low
    assert wider_high >= high


@pytest.mark.parametrize(
    ("bad", "message"), [([], "got none"), ([[]], "got none"), ([[1.5]], "1]")]
)
def test_no_interval_of_nothing_or_of_other_scales(bad, message):
    with pytest.raises(ValueError, match=message):
        paired_interval(bad, 0.95)


def test_the_interval_covers_what_it_should():
    """Of 600 draws of 64 pairs with a true loss of 8 points, 95 % of the intervals hold it."""
    rng = np.random.default_rng(0)
    draws = rng.choice([1.0, 0.0, -1.0], p=[0.11, 0.86, 0.03], size=(600, 64))
    inside = [
        low <= 0.08 <= high for _, low, high in (paired_interval([d.tolist()], 0.95) for d in draws)
    ]
    assert 0.93 <= np.mean(inside) <= 0.99


# ---- the decisions ------------------------------------------------------------------------------
@given(fields(), st.integers(0, 10))
def test_verdicts_follow_from_intervals_and_costs(measured, points):
    allowed = points / 100
    verdicts = decide(measured, allowed)
    assert set(verdicts) == {m.name for m in measured}
    cheapest = min((m.cost for m in measured if m.high <= allowed), default=float("inf"))
    for m in measured:
        if m.low > allowed:
            assert verdicts[m.name] == "lost"
        elif m.high <= allowed:
            assert verdicts[m.name] == ("held" if m.cost <= cheapest else "costlier")
        else:  # nothing that could still win goes
            assert verdicts[m.name] == ("open" if m.cost <= cheapest else "costlier")


@given(fields(), st.integers(0, 10))
def test_the_winner_keeps_within_the_loss_and_is_cheapest(measured, points):
    allowed = points / 100
    best, certain = winner(measured, allowed)
    if best is None:
        assert all(m.loss > allowed for m in measured)
        return
    assert best.loss <= allowed
    assert certain == any(m.high <= allowed for m in measured)
    rivals = [m for m in measured if (m.high if certain else m.loss) <= allowed]
    assert best.cost == min(m.cost for m in rivals)
    assert decide(measured, allowed)[best.name] in ("held", "open")


@given(fields())
def test_the_frontier_is_what_nobody_beats(measured):
    found = frontier(measured)
    names = {m.name for m in found}
    for m in measured:
        beaten = any(
            o.cost <= m.cost and o.loss <= m.loss and (o.cost, o.loss) != (m.cost, m.loss)
            for o in measured
        )
        if beaten:
            assert m.name not in names
        else:  # of equals one is enough
            assert any((o.cost, o.loss) == (m.cost, m.loss) for o in found)
    assert [m.cost for m in found] == sorted({m.cost for m in found})


@given(st.integers(1, 100), st.integers(0, 2000))
def test_rounds_double_up_to_the_most(start, more):
    sizes = rounds(start, start + more)
    assert (sizes[0], sizes[-1]) == (start, start + more)
    assert all(b == 2 * a for a, b in pairwise(sizes[:-1]))
    assert all(a < b <= 2 * a for a, b in pairwise(sizes))


@pytest.mark.parametrize(("start", "most"), [(0, 5), (6, 5)])
def test_rounds_that_do_not_go_are_refused(start, most):
    with pytest.raises(ValueError, match="start: expected 1 to 5"):
        rounds(start, most)


# ---- the race -----------------------------------------------------------------------------------
class Synthetic:
    """Candidates with a known cost and a known chance to lose or gain a sample."""

    def __init__(self, rates: dict[str, tuple[float, float, float]], seed: int, most: int) -> None:
        rng = np.random.default_rng(seed)
        self.costs = {name: cost for name, (cost, _, _) in rates.items()}
        self.tables = {
            name: rng.choice([1.0, -1.0, 0.0], p=[lost, won, 1 - lost - won], size=most)
            for name, (_, lost, won) in rates.items()
        }
        self.asked: list[tuple[tuple[str, ...], int]] = []
        self.most = most

    def __call__(self, names: Sequence[str], limit: int, confidence: float):
        self.asked.append((tuple(names), limit))
        found = []
        for name in names:
            table = self.tables[name][:limit].tolist()
            loss, low, high = paired_interval([table], confidence)
            found.append(Measured(name, self.costs[name], 0, loss, low, high, len(table)))
        return found, limit <= self.most


CLEAR = {
    "poor": (1.0, 0.30, 0.02),
    "bad": (2.0, 0.20, 0.02),
    "good": (3.0, 0.005, 0.005),
    "fine": (4.0, 0.002, 0.002),
}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_a_race_finds_the_cheapest_that_holds(seed):
    measure = Synthetic(CLEAR, seed, 1024)
    found = race(list(CLEAR), measure, 0.05, rounds(32, 1024))
    assert found.winner is not None
    assert found.winner.name == "good"
    assert found.certain
    # The hopeless are asked less than what is open, and nobody comes back.
    for (before, _), (after, _) in pairwise(measure.asked):
        assert set(after) <= set(before)
    assert sum("poor" in names for names, _ in measure.asked) < len(rounds(32, 1024))


def test_what_is_as_good_as_full_is_hardly_ever_dropped():
    """Looked at six times, 300 candidates without a loss: at most 5 % of them are dropped."""
    dropped = 0
    for seed in range(300):
        found = race(["even"], Synthetic({"even": (1.0, 0.1, 0.1)}, seed, 1024), 0.0,
                     rounds(32, 1024))  # fmt: skip
        dropped += found.rounds[-1].verdicts["even"] == "lost"
    assert dropped <= 0.05 * 300


def test_a_race_without_a_winner_says_so_and_stops():
    rates = {"poor": (1.0, 0.5, 0.0), "bad": (2.0, 0.4, 0.0)}
    measure = Synthetic(rates, 0, 512)
    found = race(list(rates), measure, 0.01, rounds(32, 512))
    assert found.winner is None
    assert not found.certain
    assert len(measure.asked) < len(rounds(32, 512))
    assert set(found.latest) == set(rates)


def test_a_race_ends_where_the_samples_do():
    measure = Synthetic({"even": (1.0, 0.2, 0.2)}, 0, 100)
    found = race(["even"], measure, 0.0, rounds(32, 1024))
    assert [limit for _, limit in measure.asked] == [32, 64, 128]
    assert found.latest["even"].samples == 100


def test_an_uncertain_winner_is_named_as_such():
    rates = {"even": (1.0, 0.2, 0.2), "worse": (0.5, 0.9, 0.0)}
    found = race(list(rates), Synthetic(rates, 1, 64), 0.05, [64])
    assert found.winner is not None
    assert found.winner.name == "even"
    assert not found.certain


def test_one_that_fails_is_out():
    class Failing(Synthetic):
        def __call__(self, names, limit, confidence):
            found, more = super().__call__(names, limit, confidence)
            return [m for m in found if m.name != "good"], more

    found = race(list(CLEAR), Failing(CLEAR, 0, 1024), 0.05, rounds(32, 1024))
    assert found.winner is not None
    assert found.winner.name == "fine"
    assert "good" not in found.latest


# ---- candidates ---------------------------------------------------------------------------------
def test_a_keep_is_written_into_the_method():
    names = candidates(["todre", "todre|fastv:keep=9", "fastv:keep=4"], [0.25, 64])
    assert names == [
        "todre:keep=0.25", "todre:keep=64", "todre:keep=0.25|fastv:keep=9",
        "todre:keep=64|fastv:keep=9", "fastv:keep=4",
    ]  # fmt: skip
    assert parse_method(names[2]) == parse_method("todre|fastv:keep=9", 0.25)
    assert parse_method(names[1]) == vtc.ToDRE(keep=64)


@pytest.mark.parametrize(
    ("methods", "keeps", "option", "message"),
    [
        ((), (0.5,), "--methods", "at least one"),
        (("fastvv",), (0.5,), "--methods", "unknown name"),
        (("todre",), (), "--keep", "for todre, got none"),
        (("todre",), (1.5,), "--keep", "todre"),
    ],
)
def test_what_is_no_candidate_is_named(methods, keeps, option, message):
    with pytest.raises(BadInput, match=message) as error:
        candidates(methods, keeps)
    assert error.value.option == option


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"allowed": 1.0}, "--loss"),
        ({"allowed": -0.1}, "--loss"),
        ({"confidence": 1.0}, "--confidence"),
        ({"start": 0}, "--start"),
        ({"start": 64, "most": 32}, "--start"),
    ],
)
def test_bad_options_are_named_before_any_work(tmp_path, options, option):
    with pytest.raises(BadInput) as error:
        tuner.autotune(Settings(out=tmp_path / "out"), **options)
    assert error.value.option == option
    assert not (tmp_path / "out").exists()


def test_a_limit_is_refused(tmp_path):
    with pytest.raises(BadInput, match="--start and --most"):
        tuner.autotune(Settings(out=tmp_path / "out", limit=8))


# ---- on real tasks ------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_embedded_model_is_tuned_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("vtc.eval.harness.run.hub_answers", lambda: False)
    # A cell's key is of vtc's code too, which somebody may edit while this runs.
    monkeypatch.setattr("vtc.eval.harness.run.shared_code", lambda: "as it is")
    given = Settings(out=tmp_path, methods=("todre:keep=0.5", "random"), keeps=(4,))
    result = tuner.autotune(given, allowed=0.2, start=16, most=32)
    assert json.loads((tmp_path / "autotune.json").read_text()) == json.loads(json.dumps(result))
    assert set(result["latest"]) == {"todre:keep=0.5", "random:keep=4"}
    assert not result["failed"]
    latest = {name: Measured(**m) for name, m in result["latest"].items()}
    # Four of 576 tokens: the questions need the picture.
    last = {k: v for one in result["rounds"] for k, v in one["verdicts"].items()}
    assert last["random:keep=4"] == "lost"
    assert latest["random:keep=4"].samples == 16
    assert latest["random:keep=4"].cost < latest["todre:keep=0.5"].cost < result["full"]["cost"]
    # The loss is that of the scores, since both are means over the same samples.
    first = result["rounds"][0]
    full = _score_of_full(tmp_path, first["limit"])
    for m in first["measured"]:
        assert m["loss"] == pytest.approx(full - m["score"])
    text = _printed(result)
    assert "Cheapest within 20 points" in text or "No candidate was measured" in text
    assert "todre:keep=0.5" in text

    # Again: every cell is there, so that no model is loaded.
    monkeypatch.setattr("vtc.eval.harness.run.load", _not_again)
    again = tuner.autotune(replace(given), allowed=0.2, start=16, most=32)
    assert again["latest"] == result["latest"]
    assert again["winner"] == result["winner"]


def _not_again(*_: object, **__: object) -> None:
    raise AssertionError("the model is loaded again")


def _score_of_full(out, limit: int) -> float:
    for file in (out / "cells").glob("*.json"):
        cell = json.loads(file.read_text())
        if cell["label"] == "full" and cell["samples"] == limit:
            return float(cell["score"])
    raise AssertionError(f"no full cell of {limit} samples")


def _printed(result) -> str:
    console = Console(width=160, file=io.StringIO())
    console.print(tuner.table(result))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_fits_80_columns_without_breaking_numbers():
    one = {"loss": -0.123, "low": -0.2345, "high": 0.1234, "cost": 1.2345e12, "ms": 12345.6}
    one |= {"samples": 512, "score": 0.8765}
    names = ["divprune@tile:thumbnail=64:keep=0.25", "todre:keep=0.1"]
    result = {
        "full": {k: one[k] for k in ("score", "cost", "ms", "samples")},
        "latest": {name: {"name": name, **one} for name in names},
        "rounds": [{"verdicts": {names[0]: "costlier", names[1]: "held"}}],
        "frontier": names, "winner": names[1], "certain": True, "allowed": 0.01,
        "confidence": 0.95, "failed": {},
    }  # fmt: skip
    console = Console(width=80, file=io.StringIO())
    console.print(tuner.table(result, 80))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(len(line.rstrip()) for line in lines) <= 80
    row = next(line for line in lines if line.startswith("todre:keep=0.1"))
    assert row.split()[1:] == ["1.23", "87.6", "-12.3", "[-23.4,", "12.3]", "held", "●"]
    assert any(line.rstrip() == " :thumbnail=64" for line in lines)
