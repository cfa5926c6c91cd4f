# SPDX-License-Identifier: Apache-2.0
"""Models that make images, too, or whose images are words: what `test_families.py` cannot ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtc
from tests.reference.families import FAMILIES, IMAGE, PAD
from tests.reference.probes import Fixed, Spy
from vtc.core import VisionTokens


def test_janus_makes_images_as_without_a_patch() -> None:
    model: Any = FAMILIES["janus"].build("sdpa")
    config = model.generation_config
    config.generation_kwargs = {"boi_token_id": 4}
    ids = torch.tensor([[PAD, 1, 30, 31, 4], [1, 40, 41, 42, 4]])
    given = {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "generation_mode": "image",
        "guidance_scale": 3,
        "do_sample": False,
    }
    expected = model.generate(**given)
    with vtc.patch(model, "divprune", keep=0.25) as patch:
        assert torch.equal(model.generate(**given), expected)
        assert not patch.report.prefills
    assert torch.equal(model.generate(**given), expected)


def test_images_of_emu3_have_places_whatever_their_sizes() -> None:
    """A batch pads them to one size; a code ends each row and is not shown."""
    model: Any = FAMILIES["emu3"].build("sdpa")
    sizes = ((4, 5), (3, 2))
    ids = [1]
    for rows, columns in sizes:
        ids += [30] + [IMAGE] * (rows * (columns + 1)) + [31]
    spy = Spy(Fixed(stride=1))
    with vtc.patch(model, spy), torch.no_grad():
        model(
            input_ids=torch.tensor([ids]),
            pixel_values=torch.randn(2, 3, 16, 20),
            image_sizes=4 * torch.tensor(sizes),
        )
    shown = [tokens for tokens, _ in spy.notes if isinstance(tokens, VisionTokens)]
    for tokens, (rows, columns) in zip(shown, sizes, strict=True):
        places = [[0, r, c] for r in range(rows) for c in range(columns)]
        assert tokens.grid is not None
        assert tokens.grid.tolist() == places


@pytest.mark.parametrize("name", ["chameleon", "emu3"])
def test_codes_have_no_tower_states(name: str) -> None:
    with pytest.raises(vtc.UnsupportedModelError, match="codes of a VQ-VAE"):
        vtc.patch(FAMILIES[name].build("sdpa"), "visionzip")


@pytest.mark.parametrize("name", ["janus", "chameleon", "emu3"])
def test_unpatching_restores_everything(name: str) -> None:
    family = FAMILIES[name]
    model: Any = family.build("sdpa")
    batch = family.collate(family.rows("mixed"))
    before = {id(module): set(vars(module)) for module in model.modules()}
    with torch.no_grad():
        expected = model(**batch).logits
        with vtc.patch(model, "divprune", keep=0.25) as patch:
            assert not torch.equal(model(**batch).logits, expected)
            images = patch.report.images
        assert torch.equal(model(**batch).logits, expected)
    assert before == {id(module): set(vars(module)) for module in model.modules()}
    count = len(family.rows("one")[0].images[0].grid)
    assert [(image.original, image.steps) for image in images] == [(count, ((0, count // 4),))] * 2
    assert patch.report.flops["lm"] > 0
