# SPDX-License-Identifier: Apache-2.0
"""Pictures: accuracy against tokens, and the tokens kept."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from PIL import Image

from vtc.viz import plots


def _drawn_cell(label, keep, tokens, score):
    return {
        "task": "t", "label": label, "keep": keep, "status": "done", "metric": "exact_match",
        "score": score, "interval": [score - 0.1, score + 0.1], "tokens": {"equivalent": tokens},
    }  # fmt: skip


def test_the_tradeoff_has_a_line_for_each_method():
    cells = [
        _drawn_cell("full", None, 576, 0.8), _drawn_cell("blind", None, 576, 0.3),
        _drawn_cell("todre", 0.25, 144, 0.7), _drawn_cell("todre", 0.1, 58, 0.6),
        _drawn_cell("random", 0.1, 58, 0.5),
        {"task": "t", "label": "fastv", "keep": 0.1, "status": "failed", "error": "no"},
    ]  # fmt: skip
    figure = plots.tradeoff({"cells": cells})
    (axes,) = figure.axes
    lines = {c.get_label(): c for c in axes.containers}
    assert set(lines) == {"todre", "random"}
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["todre", "random"]
    x, y = lines["todre"][0].get_data()
    assert list(y) == pytest.approx([60, 70])
    assert list(x) == pytest.approx([58, 144], rel=0.08)  # nudged apart, but not far
    levels = {line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1}
    assert {80.0, 30.0} <= levels
    colours = {lines[label][0].get_color() for label in lines}
    assert len(colours) == 2
    with pytest.raises(ValueError, match="no finished cell"):
        plots.tradeoff({"cells": cells[-1:]})


@pytest.mark.parametrize(
    "tokens", [[56, 56, 58, 58, 144, 144], [10, 300], [100] * 12, [10, 20, 20.5, 21, 400], []]
)
def test_neighbours_stand_side_by_side(tokens):
    """Bars of neighbours are apart, near their place and in their order; others stay."""
    found = plots.side_by_side(tokens, 576)
    assert found == sorted(found)
    assert found == pytest.approx(tokens, rel=0.12)
    steps = [math.log2(b / a) for a, b in itertools.pairwise(found)]
    span = math.log2(576 / min(tokens, default=1)) + 0.5
    least = 0.024 * span if len(tokens) < 5 else 0.3 / 11
    assert all(step >= min(least, 0.3 / max(len(tokens) - 1, 1)) - 1e-9 for step in steps)
    if tokens == [10, 300]:
        assert found == pytest.approx(tokens)


def test_kept_cells_are_drawn_as_they_are_and_others_darkened():
    image = Image.new("RGB", (60, 60), (200, 100, 50))
    figure = plots.kept_tokens(image, (3, 3), {"a": [0, 4], "b": []})
    shown = [np.asarray(ax.images[0].get_array()) for ax in figure.axes if ax.images]
    assert len(shown) == 3
    assert (shown[0] == (200, 100, 50)).all()
    first = shown[1].reshape(3, 20, 3, 20, 3).mean((1, 3))
    kept = (first == (200, 100, 50)).all(-1)
    assert kept.tolist() == [[True, False, False], [False, True, False], [False, False, False]]
    assert shown[2].max() < 100
    with pytest.raises(ValueError, match="0 to 8, got 0 to 9"):
        plots.kept_tokens(image, (3, 3), [0, 9])
    with pytest.raises(ValueError, match="at least one"):
        plots.kept_tokens(image, (3, 3), {})
