# SPDX-License-Identifier: Apache-2.0
"""Methods for each tile are shown the [CLS] of that tile."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import vtc
from tests.methods.test_method_split import INNER, made, tiled
from tests.reference.families import FAMILIES
from vtc.core import Method, VisionTokens


@dataclasses.dataclass(frozen=True)
class Looks(Method):
    """Keeps all and notes what it is shown."""

    vision_layer = -1
    encoder: bool = True
    notes: list[VisionTokens] = dataclasses.field(default_factory=list, compare=False)

    @property
    def needs(self) -> Any:  # type: ignore[override]
        return {"cls_attention", "cls_query", "keys"} | ({"encoder"} if self.encoder else set())

    def select(self, tokens: VisionTokens) -> vtc.Selection:
        self.notes.append(tokens)
        return vtc.Selection(torch.arange(len(tokens)))


# Named here and not in the class, where it would register.
Looks.name = "looks"


@pytest.mark.parametrize("name", ["llava_next", "internvl"])
def test_each_tile_has_its_own_cls(name: str) -> None:
    """Its query and key give the attention that the tower itself paid to the tile."""
    family = FAMILIES[name]
    reads = name != "internvl"  # whose projector joins patches
    looks, whole = Looks(reads), Looks(reads)
    model: Any = family.build("sdpa")
    batch = family.collate(family.rows("one"))
    states: list[torch.Tensor] = []
    if reads:
        model.get_submodule("model.vision_tower").register_forward_hook(
            lambda module, args, output: states.append(
                output.hidden_states[model.config.vision_feature_layer]
            )
        )
    with torch.no_grad():
        with vtc.patch(model, whole):
            model(**batch)
        states.clear()
        with vtc.patch(model, vtc.PerTile(looks)):
            model(**batch)
    (image,) = whole.notes
    assert image.crop is not None
    tiles = image.crop.unique().tolist()
    assert len(looks.notes) == len(tiles) > 1
    thumbnail = looks.notes[0]
    for told, tile in (
        (thumbnail.cls_query, image.cls_query),
        (thumbnail.encoder_cls, image.encoder_cls),
    ):
        if told is not None and tile is not None:
            assert torch.equal(told, tile)
    for i, seen in enumerate(looks.notes):
        assert seen.crop is not None
        assert set(seen.crop.tolist()) == {tiles[i]}
        assert seen.cls_query is not None
        assert seen.cls_key is not None
        assert seen.keys is not None
        assert seen.cls_attention is not None
        if reads and len(seen) == len(thumbnail):  # one token a patch, and none is cut
            heads = torch.cat([seen.cls_key[None], seen.keys]).unflatten(1, (seen.heads, -1))
            query = seen.cls_query.unflatten(0, (seen.heads, -1))
            weights = torch.einsum("nhd,hd->hn", heads, query) / query.shape[1] ** 0.5
            torch.testing.assert_close(seen.cls_attention, weights.softmax(1).mean(0)[1:])
        if reads:
            assert torch.equal(seen.encoder_cls, states[0][tiles[i], 0])  # type: ignore[arg-type]
    shown = torch.stack([seen.cls_query for seen in looks.notes if seen.cls_query is not None])
    assert len(shown.unique(dim=0)) == len(tiles)


def test_the_only_tile_that_others_left_has_its_cls() -> None:
    """After another method a tile may stand alone, and it need not be the thumbnail."""
    tokens = tiled(3, 4, 4)
    assert tokens.crop is not None
    own, looks = torch.randn(3, 5), Looks()
    places = (tokens.crop == 2).nonzero().squeeze(1)
    rows = {
        field.name: value[places]
        for field in dataclasses.fields(tokens)
        if isinstance(value := getattr(tokens, field.name), torch.Tensor)
        and len(value) == len(tokens)
    }
    vtc.PerTile(looks).select(dataclasses.replace(tokens, **rows, crop_cls=own))
    (seen,) = looks.notes
    assert torch.equal(seen.encoder_cls, own[2])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", INNER)
def test_a_tile_is_chosen_from_with_its_cls(name: str) -> None:
    tokens = tiled(3, 4, 4)
    assert tokens.crop is not None
    rows = torch.randn(3, 21, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own: dict[str, Any] = {
        "crop_cls": rows[:, :5], "crop_query": rows[:, 5:13], "crop_key": rows[:, 13:],
    }  # fmt: skip
    found = vtc.PerTile(made(name, 5)).select(dataclasses.replace(tokens, **own))
    for tile in range(3):
        alone = dataclasses.replace(
            tokens, encoder_cls=rows[tile, :5], cls_query=rows[tile, 5:13], cls_key=rows[tile, 13:]
        )
        expected = vtc.PerTile(made(name, 5)).select(alone)
        mine, wanted = tokens.crop[found.indices] == tile, tokens.crop[expected.indices] == tile
        assert torch.equal(found.indices[mine], expected.indices[wanted])
        if expected.features is not None and found.features is not None:
            assert torch.equal(found.features[mine], expected.features[wanted])
