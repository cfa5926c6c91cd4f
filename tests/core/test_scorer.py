# SPDX-License-Identifier: Apache-2.0
"""`ScorerMethod`, and the example of CONTRIBUTING.md."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.reference.models import collate, samples, shared_model
from vtc.core import LayerState, Positions, ScorerMethod, VisionTokens, registry

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"


class Own(ScorerMethod):
    """Keeps it out of `vtc.methods()`."""


Own.name = "own"


@dataclass(frozen=True)
class First(Own):
    """By the first feature."""

    keep: float | int = 0.5
    positions: Positions = "original"

    def score(self, tokens: VisionTokens) -> Tensor:
        return tokens.features[:, 0]


@dataclass(frozen=True)
class Late(Own):
    """By the first hidden unit, before layers 1 and 3."""

    keep: float | int = 0.5

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        return (1, 3)

    def score_layer(self, state: LayerState) -> Tensor:
        return state.hidden[state.vision, 0]


def tokens(values: list[float]) -> VisionTokens:
    n = len(values)
    return VisionTokens(torch.tensor(values).float()[:, None], torch.zeros(n, 3, dtype=torch.long))


def state(values: list[float], sizes: tuple[int, ...], layer: int = 1) -> LayerState:
    """Vision tokens with these hidden values between two of text."""
    hidden = torch.tensor([9.0, *values, 9.0])[:, None]
    image = torch.tensor([-1, *[0] * len(values), -1])
    grid = torch.zeros(len(hidden), 3, dtype=torch.long)
    text = torch.arange(len(hidden)) == len(hidden) - 1
    return LayerState(layer, 8, hidden, image, text, grid, len(hidden), sizes, {})


def test_it_acts_where_it_scores() -> None:
    assert First().stages == ("sequence",)
    assert Late().stages == ("layers",)
    assert vtc.FastV().stages == ("layers",)
    assert vtc.VScan().stages == ("sequence", "layers")
    assert type("Neither", (Own,), {})().stages == ()


def test_the_best_stay_in_order_and_ties_go_to_the_earlier() -> None:
    assert First(3).select(tokens([1, 5, 1, 7, 1])).indices.tolist() == [0, 1, 3]
    found = Late(0.5).prune(state([1, 5, 1, 7, 1, 2], (6,)))
    assert found is not None
    assert found.indices.tolist() == [1, 3, 5]


def test_nothing_is_scored_where_all_fit() -> None:
    class Never(First):
        def score(self, tokens: VisionTokens) -> Tensor:
            raise AssertionError

    assert Never(5).select(tokens([1, 5, 1])).indices.tolist() == [0, 1, 2]
    assert Never(1.0).select(tokens([])).indices.tolist() == []
    assert Late(0.5).prune(state([1, 2], (4,))) is None
    assert Late(0.5).prune(state([1, 2], (4,), layer=3)) is None


def test_budgets_between_layers_are_shared() -> None:
    found = Late(2).prune(state([1, 5, 1, 7, 1, 2], (3, 3)))
    assert found is not None
    assert found.indices.tolist() == [0, 1, 3, 5]


def test_it_refuses_the_stage_that_it_does_not_score_in() -> None:
    with pytest.raises(TypeError, match="First does not act between layers"):
        First().prune(state([1], (1,)))
    with pytest.raises(TypeError, match="Late does not act in the sequence stage"):
        Late().select(tokens([1]))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="keep"):
        First(0)
    with pytest.raises(ValueError, match="positions"):
        First(positions="reindex")  # type: ignore[arg-type]


# ---- the example --------------------------------------------------------------------------------
@pytest.fixture
def example() -> Iterator[Any]:
    """The first block of Python in the guide, as a module."""
    source = GUIDE.read_text("utf-8").split("```python\n")[1].split("```")[0]
    module = sys.modules["example_norm"] = ModuleType("example_norm")
    try:
        exec(compile(source, str(GUIDE), "exec"), vars(module))
        yield module
    finally:
        del sys.modules["example_norm"]
        registry._REGISTRY.pop("norm", None)


def test_the_example_of_the_guide_runs(example: Any) -> None:
    lines = GUIDE.read_text("utf-8").split("class Norm")[1].split("```")[0].splitlines()
    assert len(lines) <= 25
    found = vtc.make("norm", keep=2).select(tokens([-3, 1, 2]))
    assert found.indices.tolist() == [0, 2]
    with (
        vtc.patch(shared_model("clip+llama", "sdpa"), "norm", keep=0.25) as patch,
        torch.no_grad(),
    ):
        patch.model(**collate(samples("one", "clip")))
    assert patch.report.tokens_per_layer == [9] * 8
    assert vtc.describe(example.Norm(), "llava-1.5").entering == 144


@dataclass(frozen=True)
class Whole(Late):
    """Scores all of the sample, text included."""

    def score_layer(self, state: LayerState) -> Tensor:
        return state.hidden[:, 0]


def test_scores_are_one_for_each_token() -> None:
    given = state([3.0, 1.0, 2.0, 0.0], (4,))
    assert len(given.hidden) != len(given.vision)
    with pytest.raises(ValueError, match=r"one score for each of the 4 tokens, of shape \(4,\)"):
        Whole(keep=2).prune(given)
