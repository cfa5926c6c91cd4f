# SPDX-License-Identifier: Apache-2.0
"""ATP-LLaVA: scores, nested grids, thresholds, and heads that are loaded from a folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vtc
from tests.reference.models import collate, samples, shared_model
from vtc.core import LayerState, make
from vtc.methods import atp
from vtc.methods.atp import ATP, ATPHeads

SETTINGS = {"normalise": "minmax", "sampling": 3.0, "layers": [1, 4, 6], "num_layers": 8}


def rand(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def heads_of(seed: int = 0, cuts: int = 3, width: int = 8) -> ATPHeads:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = ATPHeads(cuts, width)
    with torch.no_grad():
        heads.centre.copy_(rand(*heads.centre.shape, seed=seed))
        heads.spread.copy_(1 + rand(*heads.spread.shape, seed=seed + 1))
    return heads


def grid_of(rows: int, columns: int) -> Tensor:
    return torch.tensor([(0, r, c) for r in range(rows) for c in range(columns)])


LAYOUT = "tt" + "a" * 20 + "qqq" + "b" * 12 + "qq"
"""Two of the system, an image of 4 x 5, text, an image of 3 x 4, text."""


def state_of(layer: int = 4, seed: int = 0, layout: str = LAYOUT, **more: Any) -> LayerState:
    s = len(layout)
    image = torch.tensor([{"a": 0, "b": 1}.get(c, -1) for c in layout])
    text = torch.tensor([c == "q" for c in layout])
    grid = torch.full((s, 3), -1)
    grid[image == 0], grid[image == 1] = grid_of(4, 5), grid_of(3, 4)
    place = ((image >= 0) | text).nonzero().squeeze(1)
    logits = 6 * rand(len(place), s, seed=seed)
    causal = torch.arange(s)[None] <= place[:, None]
    fields: dict[str, Any] = {
        "layer": layer,
        "num_layers": 8,
        "hidden": rand(s, 4, seed=seed + 1),
        "image": image,
        "text": text,
        "grid": grid,
        "prompt_length": s,
        "original": (20, 12),
        "attention": {layer - 1: logits.masked_fill(~causal, -math.inf).softmax(1)},
    }
    return LayerState(**{**fields, **more})


def kept(method: ATP, state: LayerState) -> list[int]:
    selection = method.prune(state)
    return list(range(len(state.vision))) if selection is None else selection.indices.tolist()


# ---- the rule -----------------------------------------------------------------------------------
def naive_rate(row: int, column: int) -> float:
    """Written without bit tricks: how often both can be halved, and on which of four places."""
    rate, unit = 0.0, 0.25
    while row or column:
        place = {(0, 0): 0, (1, 1): 1, (0, 1): 2, (1, 0): 3}[row % 2, column % 2]
        rate += place * unit
        row, column, unit = row // 2, column // 2, unit / 4
    return rate


def naive_rule(state: LayerState, theta_r: float, theta_s: float, sampling: float) -> list[int]:
    """Plain loops over queries and keys."""
    (rows,) = state.attention.values()
    place = [i for i in range(len(state.image)) if state.image[i] >= 0 or state.text[i]]
    chosen: list[int] = []
    seen = 0
    for ordinal in range(len(state.original)):
        mine = [i for i in range(len(state.image)) if int(state.image[i]) == ordinal]
        scores = []
        for key in mine:
            own = [float(rows[r, key]) for r, i in enumerate(place) if i in mine]
            cross = [
                float(rows[r, key])
                for r, i in enumerate(place)
                if bool(state.text[i]) and i > mine[-1]
            ]
            both = sum(own) / len(own) + (sum(cross) / len(cross) if cross else 0.0)
            scores.append(both / 2)
        low, high = min(scores), max(scores)
        for k, key in enumerate(mine):
            _, row, column = state.grid[key].tolist()
            by_score = (scores[k] - low) / (high - low) > theta_r
            by_place = 1 - sampling * naive_rate(row, column) > theta_s
            if by_score or by_place:
                chosen.append(seen + k)
        seen += len(mine)
    return chosen


@pytest.mark.parametrize("theta_r", [0.05, 0.31, 0.72, 0.9])
@pytest.mark.parametrize("theta_s", [0.0, 0.4, 0.9, 1.0])
def test_the_hard_rule_is_the_union_of_two_thresholds(theta_r: float, theta_s: float) -> None:
    for seed in range(3):
        state = state_of(seed=seed)
        for sampling in (3.0, 1.5):
            method = ATP(theta_r=theta_r, theta_s=theta_s, sampling=sampling)
            assert kept(method, state) == naive_rule(state, theta_r, theta_s, sampling)


def test_thresholds_are_of_each_image_and_its_own_text() -> None:
    """Text before an image, and what the other image pays, must not count."""
    state, method = state_of(), ATP(theta_r=0.4, theta_s=1.0)
    (layer,) = state.attention
    rows = state.attention[layer].clone()
    held = torch.tensor([i for i, c in enumerate(LAYOUT) if c in "abq"])
    second = torch.tensor([c == "b" for c in LAYOUT])[held]
    between = (held > 21) & (held < 25)
    first_columns = torch.arange(2, 22)
    rows[second.nonzero(), first_columns] = rand(12, 20, seed=9)
    changed = state_of(attention={layer: rows})
    assert kept(method, changed) == kept(method, state)
    rows = state.attention[layer].clone()
    rows[between.nonzero(), torch.arange(25, 37)] = rand(3, 12, seed=9)
    assert kept(method, state_of(attention={layer: rows})) == kept(method, state)


def test_a_score_equal_to_its_threshold_is_not_above_it() -> None:
    score, low = torch.tensor([0.5, 0.25, 0.75]), torch.tensor([-1.0, -1.0, -1.0])
    assert atp.hard_mask(score, low, 0.5, 0.5).tolist() == [False, False, True]
    assert atp.hard_mask(low, score, 0.5, 0.5).tolist() == [False, False, True]


def test_an_image_keeps_at_least_one_token_the_first_of_the_best() -> None:
    score = torch.tensor([0.1, 0.9, 0.9])
    assert atp.hard_mask(score, score, 1.0, 1.0).tolist() == [False, True, False]
    state = state_of()
    found = kept(ATP(theta_r=1.0, theta_s=1.0), state)
    assert len([k for k in found if k < 20]) == len([k for k in found if k >= 20]) == 1


@pytest.mark.parametrize("normalise", ["minmax", "log", "rank"])
def test_a_soft_mask_above_one_half_is_the_hard_mask(normalise: Any) -> None:
    for seed in range(5):
        own, cross = rand(50, seed=seed), rand(50, seed=seed + 50)
        redundant = atp.redundant_score(own, cross, torch.ones(50).bool(), normalise)
        spatial = atp.spatial_score(grid_of(5, 10), 3.0)
        theta_r, theta_s = torch.tensor(0.4), torch.tensor(0.6)
        soft = atp.soft_mask(redundant, spatial, theta_r, theta_s, 1e5)
        hard = atp.hard_mask(redundant, spatial, theta_r, theta_s)
        assert (soft > 0.5).tolist() == hard.tolist()
        assert ((soft < 1e-3) | (soft > 1 - 1e-3)).all()


below_one = st.floats(0, 0.999)
"""At 1 the guard against an empty image steps in, which is not nested."""


@given(below_one, below_one, st.floats(0, 1), st.floats(0, 1), st.integers(0, 5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_higher_thresholds_keep_a_part_of_what_lower_ones_keep(
    r1: float, r2: float, s1: float, s2: float, seed: int
) -> None:
    state = state_of(seed=seed)
    more = kept(ATP(theta_r=min(r1, r2), theta_s=min(s1, s2)), state)
    fewer = kept(ATP(theta_r=max(r1, r2), theta_s=max(s1, s2)), state)
    assert set(fewer) <= set(more)


@pytest.mark.parametrize("normalise", ["minmax", "log", "rank"])
def test_scores_lie_between_0_and_1_and_keep_their_order(normalise: Any) -> None:
    own, cross = rand(30, seed=1) / 600, rand(30, seed=2) / 600
    everyone = torch.ones(30).bool()
    found = atp.redundant_score(own, cross, everyone, normalise)
    assert float(found.min()) == 0
    assert float(found.max()) == 1
    assert found.argsort().tolist() == (own + cross).argsort().tolist()
    if normalise == "rank":
        below = [sum(float(o) < float(x) for o in own + cross) for x in own + cross]
        torch.testing.assert_close(found, torch.tensor(below) / 29)
    if normalise == "log":
        logs = ((own + cross) / 2).log()
        torch.testing.assert_close(found, (logs - logs.min()) / (logs.max() - logs.min()))
    assert atp.redundant_score(own * 0 + 0.1, cross * 0, everyone, normalise).tolist() == [0] * 30


def test_only_held_tokens_set_the_range() -> None:
    own = torch.tensor([0.0, 0.2, 0.4, 0.3, 0.9])
    held = torch.tensor([False, True, True, True, False])
    found = atp.redundant_score(own, own, held, "minmax")
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 1.0, 0.5, 1.0]))


# ---- nested grids -------------------------------------------------------------------------------
@given(st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_rates_are_those_of_plain_loops(rows: int, columns: int) -> None:
    found = atp.grid_rate(grid_of(rows, columns)).tolist()
    wanted = [naive_rate(r, c) for r in range(rows) for c in range(columns)]
    assert found == wanted


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 0.999), st.floats(0, 0.999))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_grid_is_nested_even_and_of_the_size_asked_for(
    rows: int, columns: int, one: float, two: float
) -> None:
    grid, n = grid_of(rows, columns), rows * columns

    def taken(theta: float) -> Tensor:
        return atp.spatial_score(grid, 3.0) > theta

    low, high = sorted((one, two))
    assert not bool((taken(high) & ~taken(low)).any())
    rate = (1 - low) / 3
    # the strides of the levels below and above the rate bound the size
    coarse = 2 ** math.ceil(-math.log(rate, 4) - 1e-12)
    fine = max(coarse // 2, 1)
    at_least = math.ceil(rows / coarse) * math.ceil(columns / coarse)
    at_most = math.ceil(rows / fine) * math.ceil(columns / fine)
    count = int(taken(low).sum())
    assert at_least <= count <= at_most
    # every cell of the stride that is active holds a token
    for r in range(0, rows, coarse):
        for c in range(0, columns, coarse):
            cell = (grid[:, 1] // coarse == r // coarse) & (grid[:, 2] // coarse == c // coarse)
            assert bool((taken(low) & cell).any())
    if n >= 1:
        assert bool(taken(low)[0])


@pytest.mark.parametrize("theta", [0.1, 0.25, 0.5, 0.8125, 0.9])
def test_a_grid_of_whole_cells_has_the_exact_size(theta: float) -> None:
    """On 32 x 32 any rate is met up to rounding."""
    count = int((atp.spatial_score(grid_of(32, 32), 3.0) > theta).sum())
    assert abs(count - 1024 * (1 - theta) / 3) <= 1


def test_a_token_keeps_its_rate_when_others_are_gone() -> None:
    grid = grid_of(9, 7)
    left = torch.arange(0, 63, 3)
    assert torch.equal(atp.grid_rate(grid)[left], atp.grid_rate(grid[left]))


# ---- statistics and heads -----------------------------------------------------------------------
def test_statistics_know_neither_order_nor_size() -> None:
    own, cross = rand(40, seed=3) / 40, rand(40, seed=4) / 40
    redundant = atp.redundant_score(own, cross, torch.ones(40).bool(), "minmax")
    numbers = atp.statistics(own, cross, redundant, 40)
    assert numbers.shape == (atp.STATISTICS,)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    again = atp.statistics(own[order], cross[order], redundant[order], 40)
    torch.testing.assert_close(again, numbers)
    mean, deviation = (40 * own).mean(), (40 * own).std(unbiased=False)
    torch.testing.assert_close(numbers[0], (mean + 1e-4).log())
    torch.testing.assert_close(numbers[1], (deviation + 1e-4).log())
    assert float(numbers[-1]) == 0
    assert float(atp.statistics(own, cross, redundant, 80)[-1]) == pytest.approx(math.log(0.5))
    # every token twice, with half the probability: quantiles interpolate, the rest is the same
    twice = atp.statistics(own.repeat(2) / 2, cross.repeat(2) / 2, redundant.repeat(2), 80)
    torch.testing.assert_close(twice, numbers, atol=0.1, rtol=0.1)
    one = atp.statistics(own[:1], cross[:1], redundant[:1], 40)
    assert bool(torch.isfinite(one).all())


def test_trained_heads_set_thresholds_for_each_image(tmp_path: Path) -> None:
    heads = heads_of()
    method = ATP.from_pretrained(atp.save_heads(heads, tmp_path, SETTINGS))
    state = state_of()
    rows, found = state.attention[3], []
    place = ((state.image >= 0) | state.text).nonzero().squeeze(1)
    for ordinal, n in enumerate(state.original):
        keys = (state.image == ordinal).nonzero().squeeze(1)
        own = rows[torch.isin(place, keys)][:, keys].mean(0)
        asking = state.text[place] & (place > keys.max())
        cross = rows[asking][:, keys].mean(0)
        score = (own + cross) / 2
        redundant = (score - score.min()) / (score.max() - score.min())
        x = (atp.statistics(own, cross, redundant, n) - heads.centre[1]) / heads.spread[1]
        z = torch.relu(heads.hidden[1](x.clamp(-5, 5)))
        theta_r, theta_s = (h(z).sigmoid().item() for h in (heads.head_r[1], heads.head_s[1]))
        spatial = atp.spatial_score(state.grid[keys], 3.0)
        found.append((redundant > theta_r) | (spatial > theta_s))
    assert kept(method, state) == torch.cat(found).nonzero().squeeze(1).tolist()
    assert 0 < len(kept(method, state)) < 32


def test_a_folder_gives_back_the_same_heads(tmp_path: Path) -> None:
    heads = heads_of(5)
    folder = atp.save_heads(heads, tmp_path / "heads", {**SETTINGS, "normalise": "log"})
    by_folder, by_file = (
        ATP.from_pretrained(folder, positions="contiguous"),
        ATP(weights=str(folder / "model.safetensors"), positions="contiguous"),
    )
    loaded, config = atp.load_heads(str(folder))
    for name, tensor in heads.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert config["normalise"] == "log"
    assert by_folder.prune_layers(8) == (1, 4, 6)
    state = state_of()
    assert kept(by_folder, state) == kept(by_file, state)
    spec = json.loads(json.dumps(by_folder.to_dict()))
    assert make(spec) == by_folder
    # heads that were trained anew in the same place are found
    before = kept(by_folder, state)
    other = heads_of(6)
    with torch.no_grad():
        for head in other.head_r:
            head.bias.fill_(9.0)  # type: ignore[operator]
    atp.save_heads(other, folder, {**SETTINGS, "normalise": "log"})
    assert kept(by_folder, state) != before


def test_missing_and_ill_formed_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights.*nowhere is missing"):
        ATP.from_pretrained(tmp_path / "nowhere")
    atp.save_heads(heads_of(), tmp_path, SETTINGS)
    config, tensors = tmp_path / "config.json", tmp_path / "model.safetensors"
    good, whole = config.read_text(), tensors.read_bytes()
    config.write_text(good.replace('"width": 8', '"width": 9'))
    with pytest.raises(ValueError, match=r"weights: tensor 'head_r.0.weight'.*\[1, 9\]"):
        ATP.from_pretrained(tmp_path)
    for wrong in ("{", '{"cuts": 3}', good.replace("minmax", "softmax")):
        config.write_text(wrong)
        with pytest.raises(ValueError, match=r"weights: config\.json"):
            ATP.from_pretrained(tmp_path)
    config.write_text(good)
    tensors.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"weights: .*not a safetensors file"):
        ATP.from_pretrained(tmp_path)
    config.unlink()
    with pytest.raises(ValueError, match=r"weights.*config.json is missing"):
        ATP.from_pretrained(tmp_path)


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="atp needs trained heads"):
        ATP()
    with pytest.raises(ValueError, match="atp needs trained heads"):
        make("atp")
    with pytest.raises(TypeError, match="theta_s"):
        ATP(theta_r=0.5)
    folder = atp.save_heads(heads_of(), tmp_path, SETTINGS)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"theta_r": 0.1, "theta_s": 0.1}, "theta_r: trained heads set it"),
        ({"normalise": "log"}, "normalise: the heads were trained with 'minmax'"),
        ({"sampling": 2.0}, "sampling: the heads were trained with 3.0"),
        ({"layers": (1, 2)}, "layers: the heads are for 3 cuts, got 2"),
        ({"positions": "none"}, "positions"),
    ]
    for given_settings, message in wrong:
        with pytest.raises(ValueError, match=message):
            ATP.from_pretrained(folder, **given_settings)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"theta_r": 1.5}, r"theta_r: .*\[0, 1\]"),
        ({"theta_s": -0.1}, "theta_s"),
        ({"theta_r": float("nan")}, "theta_r"),
        ({"sampling": 0}, "sampling"),
        ({"sampling": float("inf")}, "sampling"),
        ({"normalise": "sum"}, "normalise"),
        ({"layers": (0, 2)}, "layers"),
    ]
    for given_settings, message in bad:
        with pytest.raises(ValueError, match=message):
            ATP(**{"theta_r": 0.5, "theta_s": 0.5, **given_settings})
    with pytest.raises(TypeError, match="theta_r"):
        ATP(theta_r=True, theta_s=0.5)
    with pytest.raises(TypeError, match="layers"):
        ATP(theta_r=0.5, theta_s=0.5, layers=3)  # type: ignore[arg-type]


def test_layers_are_the_published_ones_and_scale() -> None:
    method = ATP(theta_r=0.5, theta_s=0.5)
    assert method.prune_layers(32) == (4, 14, 24)
    assert method.prune_layers(8) == (1, 4, 6)
    assert method.taps(8) == dict.fromkeys((0, 3, 5), "vision_text")
    chosen = make({**method.to_dict(), "layers": [2, 3]})
    assert chosen.prune_layers(8) == (2, 3)
    with pytest.raises(ValueError, match="layers"):
        ATP(theta_r=0.5, theta_s=0.5, layers=(2, 9)).prune_layers(8)


def test_layers_of_the_weights_are_for_models_as_deep_as_theirs(tmp_path: Path) -> None:
    config = {**SETTINGS, "layers": [2, 3, 5]}
    method = ATP.from_pretrained(atp.save_heads(heads_of(), tmp_path, config))
    assert method.prune_layers(8) == (2, 3, 5)
    assert method.prune_layers(32) == (4, 14, 24)


# ---- in a model ---------------------------------------------------------------------------------
class Spy:
    """Notes the position ids that enter the rotary embedding of every forward."""

    def __init__(self, model: Any) -> None:
        self.seen: list[Tensor] = []
        rotary = model.model.language_model.rotary_emb
        self.handle = rotary.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])


def test_surviving_tokens_keep_their_positions() -> None:
    model = shared_model("clip+llama", "sdpa")
    batch = collate(samples("one", "clip"))
    spy = Spy(model)
    try:
        with torch.no_grad(), vtc.patch(model, ATP(theta_r=0.3, theta_s=0.9)) as patch:
            model(**batch)
            left = patch.report.images[0].per_layer
    finally:
        spy.handle.remove()
    assert left[0] == 36
    assert left[0] > left[1] >= left[4] >= left[6] >= 1
    text = [0, 1, 2, *range(39, 46)]
    before = list(range(46))
    for positions in spy.seen[1:]:
        row = positions[0].tolist()
        assert row == sorted(set(row))
        assert set(row) <= set(before)
        assert [p for p in row if not 3 <= p < 39] == text
        before = row
    assert [len(p[0]) for p in spy.seen[-3:]] == [left[1] + 10, left[4] + 10, left[6] + 10]


def test_each_sample_of_a_batch_gets_what_it_gets_alone(tmp_path: Path) -> None:
    model = shared_model("clip+llama", "sdpa")
    method = ATP.from_pretrained(atp.save_heads(heads_of(), tmp_path, SETTINGS))
    rows = samples("images", "clip")
    with torch.no_grad(), vtc.patch(model, method) as patch:
        model(**collate(rows))
        together = [image.per_layer for image in patch.report.images]
        patch.report.reset()
        for row in rows:
            model(**collate([row]))
        alone = [image.per_layer for image in patch.report.images]
    assert together == alone
    assert len(set(together)) > 1
