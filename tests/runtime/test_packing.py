# SPDX-License-Identifier: Apache-2.0
"""Several documents in one row, told apart by positions that start anew: where something would be
dropped they are refused, and where nothing is they give what the plain model gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.reference.families import FAMILIES, join
from tests.runtime.test_families import first_cut, shared
from tests.runtime.test_serving import EVERY


def packed(name: str) -> dict[str, Tensor]:
    """Two documents with an image each in one row, without a mask."""
    family = FAMILIES[name]
    batches = [family.collate([row]) for row in family.rows("ragged")[:2]]
    along = {"input_ids", *family.per_token}
    batch = {}
    for key in {name for own in batches for name in own} - {"attention_mask"}:
        # Some inputs, such as tiles, only some documents have.
        parts = [own[key] for own in batches if key in own]
        batch[key] = (
            torch.cat(parts, dim=1) if key in along else join(parts, family.dims.get(key, 0))
        )
    lengths = [b["input_ids"].shape[1] for b in batches]
    batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    return batch


def logits_of(model: Any, batch: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, use_cache=False, **more).logits


@pytest.mark.parametrize("name", EVERY)
def test_documents_in_one_row(name: str) -> None:
    family = FAMILIES[name]
    if family.model_type == "instructblipvideo":
        pytest.skip("transformers hands the positions of the prompt to its Q-Former as well")
    model, batch = shared(name, family.attentions[-1]), packed(name)
    plain = logits_of(model, batch)
    keep_all: Any = vtc.Random(keep=1.0)
    methods: list[Any] = [vtc.Random(keep=0.3)]
    if "device" not in name:
        keep_all = keep_all | vtc.FastV(keep=1.0, layer=first_cut(family))
        methods.append(vtc.FastV(keep=2, layer=first_cut(family)))
    for method in (vtc.Full(), keep_all):
        with vtc.patch(model, method):
            assert torch.equal(logits_of(model, batch), plain)
    for method in methods:
        with vtc.patch(model, method), pytest.raises(ValueError, match=r"position_ids: .*document"):
            logits_of(model, batch)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seq_lens_k"])
def test_lengths_for_flash_attention(name: str) -> None:
    model, batch = shared("vipllava", "sdpa"), packed("vipllava")
    del batch["position_ids"]
    ends = {name: torch.tensor([0, 20, batch["input_ids"].shape[1]], dtype=torch.int32)}
    plain = logits_of(model, batch, **ends)
    with vtc.patch(model, "full"):
        assert torch.equal(logits_of(model, batch, **ends), plain)
    for method in (vtc.Random(keep=0.3), vtc.FastV(keep=2)):
        with vtc.patch(model, method), pytest.raises(ValueError, match=f"{name}: .*document"):
            logits_of(model, batch, **ends)


def test_positions_of_padded_rows_are_no_documents() -> None:
    family = FAMILIES["vipllava"]
    batch = family.collate(family.rows("ragged"))
    mask = batch["attention_mask"]
    batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    model = shared("vipllava", "sdpa")
    with vtc.patch(model, vtc.Random(keep=0.3)):
        together = logits_of(model, batch)
        for i, row in enumerate(family.rows("ragged")):
            alone = logits_of(model, family.collate([row]))
            assert (together[i, mask[i].bool()] - alone[0]).abs().max() < 1e-4


def test_documents_in_one_row_where_layers_look_across() -> None:
    """Vision states stand in no row; the refusal is the same."""
    family, model = FAMILIES["mllama"], shared("mllama", "sdpa")
    first, second = (family.collate([row]) for row in family.rows("ragged")[:2])
    # Each document sees its own image, of two in the row.
    masks = first["cross_attention_mask"], second["cross_attention_mask"]
    seen = [torch.cat([masks[0], 0 * masks[0]], 2), torch.cat([0 * masks[1], masks[1]], 2)]
    batch = {name: torch.cat([first[name], second[name]], dim=1) for name in first}
    batch["cross_attention_mask"] = torch.cat(seen, dim=1)
    del batch["attention_mask"]
    lengths = [b["input_ids"].shape[1] for b in (first, second)]
    batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    plain = logits_of(model, batch)
    for method in (vtc.Full(), vtc.Random(keep=1.0)):
        with vtc.patch(model, method):
            assert torch.equal(logits_of(model, batch), plain)
    with (
        vtc.patch(model, vtc.Random(keep=0.3)),
        pytest.raises(ValueError, match=r"position_ids: .*document"),
    ):
        logits_of(model, batch)
