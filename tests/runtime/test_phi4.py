# SPDX-License-Identifier: Apache-2.0
"""What the matrix does not show of Phi-4 multimodal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.reference.families import FAMILIES
from tests.reference.probes import Probe
from tests.runtime.test_families import rows_of, shared
from vtc.core import Selection, VisionTokens

NAME = "phi4_multimodal"
pytestmark = pytest.mark.skipif(NAME not in FAMILIES, reason="this transformers is too old for it")


@dataclass(frozen=True)
class Looks(Probe):
    """Keeps all, and notes what it is shown."""

    needs = frozenset({"cls_attention", "keys"})
    vision_layer = 1
    notes: list[VisionTokens] = field(default_factory=list)

    def select(self, tokens: VisionTokens) -> Selection:
        self.notes.append(tokens)
        return Selection(torch.arange(len(tokens)))


@pytest.mark.parametrize("whole", [False, True], ids=["padded", "whole"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_methods_are_shown_the_tower(attention: str, whole: bool) -> None:
    """Without padding there is no mask, and then only eager attention sees both ways."""
    family, model = FAMILIES[NAME], shared(NAME, attention)
    row = family._row((2, "image2", 7), 0)
    batch = family.collate([row])
    rows = 2
    if whole:  # another row of the plane, of 3 tokens and their end
        rows = 3
        batch["image_attention_mask"] = torch.ones_like(batch["image_attention_mask"])
        first = int(row.images[0].index[0])
        more = batch["input_ids"][:, first : first + 4]
        ids = batch["input_ids"]
        batch["input_ids"] = torch.cat([ids[:, :first], more, ids[:, first:]], dim=1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    heard: list[tuple[Tensor, Tensor]] = []
    layer: Any = model.model.embed_tokens_extend.image_embed.img_processor.encoder.layers[1]

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        heard.append((hidden.detach(), module.k_proj(hidden).detach()))

    handle = layer.self_attn.register_forward_hook(note, with_kwargs=True)
    looks = Looks()
    try:
        with vtc.patch(model, looks), torch.no_grad():
            model(**batch)
    finally:
        handle.remove()
    ((hidden, keys),) = heard  # of the thumbnail and of a tile
    query = layer.self_attn.q_proj(hidden)
    heads = [t.unflatten(2, (4, -1)).transpose(1, 2) for t in (query, keys)]
    seen = batch["image_attention_mask"][0].flatten(1).bool()
    see = (seen[:, None] & seen[:, :, None])[:, None]
    if whole and attention == "sdpa":
        see = see & torch.ones(36, 36).bool().tril()
    logits = heads[0] @ heads[1].transpose(2, 3) * layer.self_attn.scaling
    weights = logits.masked_fill(~see, -torch.inf).softmax(-1).nan_to_num().mean(1)
    received = weights.sum(1) / see[:, 0].sum(1).clamp_min(1)
    (tokens,) = looks.notes
    expected = [*_cells(received, keys, 1, rows), *_cells(received, keys, 0, 3)]
    assert len(tokens) == len(expected)
    assert tokens.cls_attention is not None
    assert tokens.keys is not None
    for i, (attended, key) in enumerate(expected):
        assert abs(float(tokens.cls_attention[i]) - float(attended)) < 1e-5
        assert (tokens.keys[i] - key).abs().max() < 1e-3 * key.abs().max()
    assert torch.stack([attended for attended, _ in expected]).std() > 0


def _cells(received: Tensor, keys: Tensor, tile: int, rows: int) -> list[tuple[Tensor, Tensor]]:
    """Attention and keys of the tokens of a tile of 6 x 6 patches, 3 to a row."""
    found = []
    for r in range(rows):
        for c in range(3):
            patches = [(2 * r + i) * 6 + 2 * c + j for i in (0, 1) for j in (0, 1)]
            found.append((received[tile, patches].mean(), keys[tile, patches].mean(0)))
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["ragged", "images"])
def test_keeping_all_keeps_all(kind: str) -> None:
    model, batch = shared(NAME, "sdpa"), FAMILIES[NAME].collate(rows_of(NAME, kind))
    with torch.no_grad():
        plain = model(**batch).logits
        for method in (vtc.Full(), vtc.Random(keep=1.0), vtc.FastV(keep=1.0, layer=2)):
            with vtc.patch(model, method):
                assert torch.equal(model(**batch).logits, plain)


def test_embeddings_beside_pixels_are_refused() -> None:
    """The model itself would ignore the pixels."""
    model, batch = shared(NAME, "sdpa"), FAMILIES[NAME].collate(rows_of(NAME, "one"))
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    with vtc.patch(model, "divprune"), pytest.raises(ValueError, match="cannot tell vision tokens"):
        model(**batch)
