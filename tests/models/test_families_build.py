# SPDX-License-Identifier: Apache-2.0
"""What `tests.reference.families` says of its models and batches is true of plain transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.reference.families import FAMILIES, LAYOUTS, Row, TinyFamily, Unsupported, head_of
from tests.reference.masked import MERGES_IN_DECODER

NAMES = list(FAMILIES)
KINDS = list(LAYOUTS)
TOLERANCE = 1e-4
CODED = {"chameleon", "emu3", "apertus1p5"}
"""Their tokens are words of the vocabulary, of which one may occur twice."""


@cache
def built(name: str, attention: str) -> Any:
    return FAMILIES[name].build(attention)


def model_of(name: str) -> Any:
    return built(name, FAMILIES[name].attentions[-1])


def rows_of(name: str, kind: str) -> tuple[Row, ...]:
    try:
        return FAMILIES[name].rows(kind)
    except Unsupported as error:
        pytest.skip(str(error))


def language_model(model: Any) -> Any:
    """The module that the base model calls with `inputs_embeds`."""
    for owner in (getattr(model, "model", model), model):
        for attribute in ("language_model", "text_model"):
            if hasattr(owner, attribute):
                return getattr(owner, attribute)
    raise AssertionError(f"no language model in {type(model).__name__}")


@contextmanager
def embeds(model: Any, change: Any) -> Iterator[None]:
    """Have `change` replace or see what the language model is called with."""

    def enter_layers(module: Any, args: Any, kwargs: Any) -> Any:
        found = change(module, (), {**kwargs, "inputs_embeds": args[0]})
        if found is None:
            return None
        return (found[1].pop("inputs_embeds"),), found[1]

    if model.config.model_type in MERGES_IN_DECODER:
        first = model.model.layers[0]
        handle = first.register_forward_pre_hook(enter_layers, with_kwargs=True)
    else:
        handle = language_model(model).register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def logits(model: Any, family: TinyFamily, rows: tuple[Row, ...], side: str = "left") -> Tensor:
    return model(**family.collate(rows, side)).logits


# ---- the model ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_model(name: str) -> None:
    family, model = FAMILIES[name], model_of(name)
    assert name == family.name
    assert model.config.model_type == family.model_type
    assert not model.training
    assert model.generation_config.eos_token_id is None
    assert not head_of(model).weight[list(family.never)].any()
    row = family.rows("one")
    variants = [logits(built(name, attention), family, row) for attention in family.attentions]
    for other in variants[1:]:
        assert (other - variants[0]).abs().max() < TOLERANCE
    if "sdpa" not in family.attentions:
        with pytest.raises(Unsupported):
            family.build("sdpa")


# ---- the batches --------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_what_they_are_in_any_batch(name: str, kind: str) -> None:
    family, rows, model = FAMILIES[name], rows_of(name, kind), model_of(name)
    alone = [logits(model, family, (row,))[0] for row in rows]
    worst = 0.0
    for side in ("left", "right"):
        batch = family.collate(rows, side)
        together = logits(model, family, rows, side)
        for i, single in enumerate(alone):
            real = together[i][batch["attention_mask"][i].bool()]
            assert torch.isfinite(real).all()
            worst = max(worst, (real - single).abs().max().item())
    assert (worst > TOLERANCE) == (kind in family.unstable)
    out = model.generate(**family.collate(rows), max_new_tokens=3, do_sample=False)
    assert out.shape[0] == len(rows)
    assert not set(out[:, -3:].flatten().tolist()) & set(family.never)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_truth(name: str, kind: str) -> None:
    family, rows, model = FAMILIES[name], rows_of(name, kind), model_of(name)
    for row in rows:
        taken: list[int] = []
        for truth in row.images:
            assert list(truth.index) == sorted(truth.index)
            assert len(set(truth.grid)) == len(truth.grid) or truth.crop
            assert truth.crop is None or len(truth.crop) == len(truth.grid)
            assert name == "mllama" or len(truth.grid) == len(truth.index)
            taken += [*truth.index, *truth.separators]
        assert len(set(taken)) == len(taken)
        assert all(place < row.input_ids.numel() for place in taken)
        if not row.images or name == "mllama":
            continue

        seen: list[Tensor] = []

        def look(module: Any, args: Any, kwargs: Any, seen: list[Tensor] = seen) -> None:
            entering = kwargs["inputs_embeds"].detach()
            if kwargs.get("deepstack_features") is not None:  # they enter as zeros
                first = min(kwargs["deepstack_features"].items())[1]
                entering = entering.masked_scatter(kwargs["vision_mask"], first)
            seen.append(entering)

        with embeds(model, look):
            whole = logits(model, family, (row,))
        # The embedding table has the same row for each placeholder; the features differ.
        places = [i for truth in row.images for i in truth.index]
        features = seen[0][0, places]
        apart = torch.cdist(features, features) + torch.eye(len(places))
        if family.model_type in CODED:
            assert len({tuple(own) for own in features.tolist()}) > len(places) // 4
        else:
            assert apart.min() > 1e-3

        def zero(module: Any, args: Any, kwargs: Any, places: list[int] = places) -> Any:
            changed = kwargs["inputs_embeds"].clone()
            changed[:, places] = 0
            given = {**kwargs, "inputs_embeds": changed}
            if given.get("deepstack_features") is not None:
                features = given["deepstack_features"]
                given["deepstack_features"] = {layer: 0 * f for layer, f in features.items()}
            return args, given

        with embeds(model, zero):
            assert (logits(model, family, (row,)) - whole)[0, -1].abs().max() > 1e-2


def test_mllama_sees_its_images() -> None:
    family, model = FAMILIES["mllama"], model_of("mllama")
    row = family.rows("one")
    states: list[Tensor] = []

    def zero(module: Any, args: Any, kwargs: Any) -> Any:
        states.append(kwargs["cross_attention_states"])
        return args, {**kwargs, "cross_attention_states": 0 * states[0]}

    whole = logits(model, family, row)
    with embeds(model, zero):
        assert (logits(model, family, row) - whole)[0, -1].abs().max() > 1e-2
    (truth,) = row[0].images
    assert states[0].flatten(0, -2).shape[0] == len(truth.grid) + 2  # a [CLS] for each of two tiles


# ---- places -------------------------------------------------------------------------------------
LOCAL = [
    *("vipllava", "paligemma", "gemma3", "llava_next", "llava_next_video", "llava_onevision"),
    *("internvl", "aya_vision", "cohere2_vision", "llama4", "idefics3", "smolvlm", "mistral3"),
    *("video_llava", "deepseek_vl", "ovis2", "perception_lm"),
]
"""Families whose images are pictures, and whose towers are local once they do not attend."""


def without_attention(model: Any) -> None:
    """Make a tower local: what its attention adds becomes nothing."""
    text = {id(p) for p in language_model(model).parameters()}
    ends = ("out_proj", "o_proj", "projection_layer", "attn.proj", "self_attn.proj")
    for name, module in model.named_modules():
        if name.endswith(ends) and id(module.weight) not in text:
            torch.nn.init.zeros_(module.weight)


@pytest.mark.parametrize("name", LOCAL)
def test_tokens_see_the_place_that_the_grid_says(name: str) -> None:
    family = FAMILIES[name]
    model: Any = family.build(family.attentions[-1])
    without_attention(model)
    kinds = ["ragged", "video"] if family.has_video else ["ragged"]
    for row in [row for kind in kinds for row in family.rows(kind)[:2]]:
        (truth,) = row.images
        batch = family.collate([row])
        key = "pixel_values_videos" if "pixel_values_videos" in batch else "pixel_values"
        picture = batch[key].requires_grad_()
        seen: list[Tensor] = []

        def look(module: Any, args: Any, kwargs: Any, seen: list[Tensor] = seen) -> None:
            seen.append(kwargs["inputs_embeds"])

        with embeds(model, look):
            model(**batch)
        weights = torch.linspace(1, 2, seen[0].shape[-1])  # sums of normed rows may be constant
        crops = truth.crop or tuple(frame for frame, _, _ in truth.grid)
        places: dict[int, dict[tuple[int, int], tuple[float, float]]] = {}
        tiles: dict[int, float] = {}
        for index, (_, line, column), crop in zip(truth.index, truth.grid, crops, strict=True):
            score = (seen[0][0, index] * weights).sum()
            (gradient,) = torch.autograd.grad(score, picture, retain_graph=True)
            energy = gradient.abs().sum(-3).flatten(0, -3)  # (tiles or frames, height, width)
            looked_at = (energy > 1e-3 * energy.max()).nonzero().double()
            tile, y, x = looked_at.mean(0).tolist()
            assert (looked_at[:, 0] == tile).all()
            assert tiles.setdefault(crop, tile) == tile
            places.setdefault(crop, {})[line, column] = (y, x)
        assert len(set(tiles.values())) == len(tiles)
        for found in places.values():
            for axis in (0, 1):
                # One pixel line for one row or column, and a later one for a later one.
                lines = {cell[axis]: place[axis] for cell, place in found.items()}
                assert all(place[axis] == lines[cell[axis]] for cell, place in found.items())
                assert [lines[k] for k in sorted(lines)] == sorted(set(lines.values()))


@pytest.mark.parametrize(
    "name",
    [
        *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        *("glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr"),
    ],
)
@pytest.mark.parametrize("kind", ["images", "video"])
def test_grids_are_those_of_the_positions(name: str, kind: str) -> None:
    family, model = FAMILIES[name], model_of(name)
    for row in family.rows(kind):
        batch = family.collate([row])
        positions, _ = model.model.get_rope_index(
            **{k: v for k, v in batch.items() if "pixel" not in k}
        )
        for truth in row.images:
            found = positions[:, 0, list(truth.index)]
            grid = torch.tensor(truth.grid).T
            for frame in grid[0].unique():
                of = found[:, grid[0] == frame]
                assert torch.equal(of[1:] - of[1:, :1], grid[1:, grid[0] == frame])
                assert len(of[0].unique()) == 1
            assert len(found[0].unique()) == len(grid[0].unique())


@pytest.mark.parametrize("kind", ["smolvlm", "video_llava", "llava_next_video"])
def test_a_transformers_too_old_for_a_family_is_named(kind, monkeypatch):
    if kind not in FAMILIES:  # this one is
        pytest.skip("this transformers is too old for it")
    model = FAMILIES[kind].build("eager")
    monkeypatch.setattr("transformers.__version__", "5.20.0")
    with pytest.raises(vtc.UnsupportedModelError, match=r"needs transformers 5\.21 or newer"):
        vtc.patch(model, "random")
    assert "_vtc_patch" not in vars(model.model)
