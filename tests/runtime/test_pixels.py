# SPDX-License-Identifier: Apache-2.0
"""The pixels stage: fewer pixels into the tower equal a prompt made from a smaller picture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vtc
from tests.reference.models import GRIDS, IMAGE, PATCH, build_model, collate, samples


def small_picture_logits(
    model: nn.Module, batch: dict[str, Tensor], side: int, contiguous: bool
) -> Tensor:
    """Last logits of a batch of one, from the picture resized to side x side patches."""
    full = round(batch["pixel_values"].shape[-1] / PATCH)
    pixels = nn.functional.interpolate(
        batch["pixel_values"], size=(side * PATCH,) * 2, mode="bilinear", antialias=True
    )
    states = model.model.vision_tower(
        pixels, interpolate_pos_encoding=True, output_hidden_states=True
    ).hidden_states
    layer = model.config.vision_feature_layer
    skip = 1 if model.config.vision_feature_select_strategy == "default" else 0
    features = model.model.multi_modal_projector(states[layer][:, skip:])[0]
    ids = batch["input_ids"][0]
    # The token of cell (r, c) stands where the middle of the cell lies in the full grid.
    middle = [int((i + 0.5) * full / side) for i in range(side)]
    places = torch.tensor([r * full + c for r in middle for c in middle])
    first = int((ids == IMAGE).nonzero()[0])
    kept = torch.cat([torch.arange(first), first + places, torch.arange(first + full**2, len(ids))])
    embeds = model.get_input_embeddings()(ids[kept])
    embeds[first : first + side**2] = features
    positions = torch.arange(len(kept)) if contiguous else kept
    out = model.model.language_model(
        inputs_embeds=embeds[None],
        position_ids=positions[None],
        attention_mask=torch.ones(1, len(kept), dtype=torch.long),
    )
    return model.lm_head(out.last_hidden_state[0, -1])


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_fewer_pixels_equal_a_smaller_picture(tower: str, positions: str) -> None:
    model = build_model(tower, "llama")
    batch = collate(samples("one", tower))
    side = GRIDS[tower] // 2
    method = vtc.Downsample(keep=side**2, how="pixels", positions=positions)
    with torch.no_grad():
        expected = small_picture_logits(model, batch, side, positions == "contiguous")
        plain = model(**batch).logits[0, -1]
        with vtc.patch(model, method) as patch:
            found = model(**batch).logits[0, -1]
            generated = model.generate(
                **batch,
                max_new_tokens=1,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            ).logits[0][0]
    assert (found - expected).abs().max() < 1e-4
    assert (generated - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 1e-2
    assert patch.report.tokens_out == side**2
    assert patch.report.tokens_in == GRIDS[tower] ** 2


def test_fewer_pixels_then_a_selection() -> None:
    """A method behind the reduction sees the small picture's tokens and their signals."""
    model = build_model("clip", "llama")
    batch = collate(samples("images", "clip"))
    method = vtc.Downsample(keep=9, how="pixels") | vtc.ToDRE(keep=4, second_stage=False)
    with torch.no_grad(), vtc.patch(model, method) as patch:
        model(**batch)
    assert patch.report.tokens_out == 4


def test_a_reduction_of_pixels_comes_first_and_once() -> None:
    model = build_model("clip", "llama")
    pixels = vtc.Downsample(keep=9, how="pixels")
    for method in (vtc.Random(keep=9) | pixels, pixels | pixels):
        with pytest.raises(ValueError, match="must come first"):
            vtc.patch(model, method)
    assert "_vtc_patch" not in vars(model.model)


def test_a_tower_of_one_size_is_refused() -> None:
    model = build_model("clip", "llama")
    model.model.vision_tower.config.patch_size = [14, 14]
    with pytest.raises(vtc.UnsupportedModelError, match="how='grid'"):
        vtc.patch(model, vtc.Downsample(keep=9, how="pixels"))
    assert "_vtc_patch" not in vars(model.model)
