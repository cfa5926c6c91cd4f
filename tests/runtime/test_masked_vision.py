# SPDX-License-Identifier: Apache-2.0
"""Image tokens that the user masked: no method sees them, no budget counts them, and where nothing
is dropped the model is the plain one, masked places included."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.reference.families import FAMILIES, TinyFamily
from tests.reference.models import IMAGE, build_model, collate, make_sample
from tests.reference.probes import Probe
from tests.runtime.test_exactness import METHODS, TOLERANCE
from tests.runtime.test_families import RECURRENT, first_cut, shared
from tests.runtime.test_serving import EVERY
from vtc.core import LayerState, Method, Selection, VisionTokens, make


@dataclass(frozen=True)
class Sees(Probe):
    """Notes what both stages are shown; keeps a third of each."""

    selects: list[VisionTokens] = field(default_factory=list)
    prunes: list[LayerState] = field(default_factory=list)

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        return (2,)

    def select(self, tokens: VisionTokens) -> Selection:
        self.selects.append(tokens)
        return Selection(torch.arange(0, len(tokens), 2))

    def prune(self, state: LayerState) -> Selection | None:
        self.prunes.append(state)
        return Selection(torch.arange(0, len(state.vision), 2))


PICTURES = {
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"),
    *("glm4v", "glm4v_moe", "glm46v"),
    "qwen3_5_moe",
    "glm_ocr",
    "qwen2_5_omni_thinker",
    "qwen3_omni_moe_thinker",
    "paddleocr_vl",
    "ernie4_5_vl_moe",
    "glmga",
    "minicpmv4_7",
    *("cosmos3_omni", "cosmos3_edge", "cohere_compass", "hunyuan_vl"),
}
"""The plain model cannot place an image on its axes of which tokens are masked."""
WHOLE = {"hunyuan_vl"}
"""Of these, not even if all tokens of an image are masked."""
LAYERED = [
    name
    for name in EVERY
    if FAMILIES[name].model_type not in {*RECURRENT, *PICTURES} and "device" not in name
]


def masking(family: TinyFamily, kind: str, every: int | None) -> dict[str, Tensor]:
    """The batch `kind` in which of each image only each `every`-th token is open, or none."""
    rows = family.rows(kind)
    batch = family.collate(rows)
    mask = batch["attention_mask"]
    width = mask.shape[1]
    for b, row in enumerate(rows):
        first = width - len(row.input_ids)
        for image in row.images:
            shut = [p for i, p in enumerate(image.index) if every is None or i % every]
            mask[b, torch.tensor(shut) + first] = 0
    return batch


def run(model: Any, batch: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        # With states asked for, phi4_multimodal finds none of its own tower's.
        states = {} if hasattr(model.config, "embd_pdrop") else {"output_hidden_states": True}
        return model(**batch, **states)


@pytest.mark.parametrize("every", [3, None])
@pytest.mark.parametrize("name", EVERY)
def test_keeping_all_is_the_plain_model(name: str, every: int | None) -> None:
    family = FAMILIES[name]
    model = shared(name, family.attentions[-1])
    batch = masking(family, "one", every)
    if family.model_type in (PICTURES if every is not None else WHOLE):
        why = "shape mismatch|expanded size|span length does not match"
        with pytest.raises((RuntimeError, ValueError), match=why):
            run(model, batch)
        return
    plain = run(model, batch)
    keep_all: Method = vtc.Random(keep=1.0)
    if "device" not in name:
        keep_all = keep_all | vtc.FastV(keep=1.0, layer=first_cut(family))
    for method in (vtc.Full(), keep_all):
        with vtc.patch(model, method):
            found = run(model, batch)
        assert torch.equal(found.logits, plain.logits)
        states = (
            getattr(out, "language_model_outputs", out).hidden_states for out in (found, plain)
        )
        for a, b in zip(*(found or () for found in states), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", LAYERED)
def test_methods_are_shown_what_is_open(name: str) -> None:
    family = FAMILIES[name]
    model = shared(name, family.attentions[-1])
    batch = masking(family, "one", 3)
    probe = Sees()
    with vtc.patch(model, probe) as patch:
        run(model, batch)
        report = patch.report
    row = family.rows("one")[0]
    count = sum(len(image.index[::3]) for image in row.images)
    assert sum(len(tokens) for tokens in probe.selects) == count
    left = sum(len(range(0, len(tokens), 2)) for tokens in probe.selects)
    (state,) = probe.prunes
    assert len(state.vision) == left
    assert sum(state.original) == count
    assert sum(image.original for image in report.images) == count
    assert sum(image.per_layer[0] for image in report.images) == left


# ---- a masked token is as one that is not there -------------------------------------------------
HOLE = 9
"""Tokens of the middle of the image that are open."""


def opened(first: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A row in which only `HOLE` tokens of a picture are open, and the same picture whole."""
    row = make_sample("clip", (2, "image", 7), 100)
    whole = collate([row])
    batch = {k: v.clone() for k, v in whole.items()}
    place = (row.input_ids == IMAGE).nonzero().flatten()
    shut = torch.cat([place[:first], place[first + HOLE :]])
    batch["attention_mask"][0, shut] = 0
    return batch, whole


@dataclass(frozen=True)
class Only(Probe):
    """Drops all but the `HOLE` tokens from `first` on."""

    first: int = 0

    def select(self, tokens: VisionTokens) -> Selection:
        return Selection(torch.arange(self.first, self.first + HOLE))


@pytest.mark.parametrize("keep", [3, 0.34, 1.0])
@pytest.mark.parametrize("name", ["random", "divprune", "fastv", "todre", "visionzip", "cdpruner"])
def test_masking_is_as_dropping_beforehand(name: str, keep: float) -> None:
    """The plain positions count masked tokens, as they do those that were dropped."""
    model = build_model("clip", "llama")
    batch, whole = opened(11)
    method = make(name, keep=keep, positions="original")
    with vtc.patch(model, method):
        found = run(model, batch).logits[0, -7:]
    budget = 9 if keep == 1.0 else 3
    if name in ("random", "divprune", "cdpruner"):  # the same tokens to choose from
        with vtc.patch(model, Only(first=11) | make(name, keep=budget, positions="original")):
            expected = run(model, whole).logits[0, -7:]
        assert (found - expected).abs().max() < TOLERANCE
    with vtc.patch(model, method) as patch:
        run(model, batch)
        (image,) = patch.report.images
    assert image.original == HOLE
    assert image.per_layer[-1] == budget


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_an_image_with_holes(method: str) -> None:
    model = build_model("clip", "llama")
    row = make_sample("clip", (2, "image", 4, "image", 7), 3)
    batch = collate([row])
    place = (row.input_ids == IMAGE).nonzero().flatten()
    batch["attention_mask"][0, place[1::2]] = 0
    batch["attention_mask"][0, place[36:]] = 0  # all of the second image
    with vtc.patch(model, METHODS[method]()) as patch:
        found = run(model, batch).logits
        tokens = model.generate(**batch, max_new_tokens=3, do_sample=False)
        (image,) = patch.report.images[:1]
    assert torch.isfinite(found[batch["attention_mask"].bool()]).all()
    assert tokens.shape[1] == batch["input_ids"].shape[1] + 3
    assert image.original == 18


@pytest.mark.parametrize("method", ["random", "fastv", "todre", "divprune"])
def test_nothing_is_left_of_any_image(method: str) -> None:
    """The plain model, in a forward and in `generate`; the report knows no image."""
    model = build_model("clip", "llama")
    batch = collate(
        [make_sample("clip", (2, "image", 7), 1), make_sample("clip", (1, "image", 3), 2)]
    )
    batch["attention_mask"][batch["input_ids"] == IMAGE] = 0
    plain = run(model, batch)
    answer = model.generate(**batch, max_new_tokens=4, do_sample=False)
    with vtc.patch(model, method) as patch:
        found = run(model, batch)
        assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), answer)
        assert patch.report.images == []
    assert torch.equal(found.logits, plain.logits)
    for a, b in zip(found.hidden_states, plain.hidden_states, strict=True):
        assert torch.equal(a, b)


def test_a_masked_image_is_none_beside_others() -> None:
    """Text after it is not text after an image, and the next image is the first."""
    model = build_model("clip", "llama")
    row = make_sample("clip", (2, "image", 4, "image", 7), 3)
    batch = collate([row])
    place = (row.input_ids == IMAGE).nonzero().flatten()
    batch["attention_mask"][0, place[:36]] = 0
    probe = Sees()
    with vtc.patch(model, probe):
        run(model, batch)
    (tokens,) = probe.selects
    (state,) = probe.prunes
    assert tokens.image == 0
    assert int(state.text.sum()) == 7
    assert state.original == (36,)


@dataclass(frozen=True)
class Places(Probe):
    """Notes which patches it is shown."""

    needs = frozenset({"patches"})

    seen: list[VisionTokens] = field(default_factory=list)

    def select(self, tokens: VisionTokens) -> Selection:
        self.seen.append(tokens)
        return Selection(torch.arange(0, len(tokens), 2))


def test_patches_are_those_of_the_open_tokens() -> None:
    model, probe = build_model("clip", "llama"), Places()
    batch, _ = opened(11)
    with vtc.patch(model, probe):
        run(model, batch)
    (tokens,) = probe.seen
    assert tokens.patches is not None
    rows, columns = tokens.grid[:, 1], tokens.grid[:, 2]
    assert torch.equal(tokens.patches[:, 0], rows * 6 + columns)
    assert tokens.patches[:, 0].tolist() == list(range(11, 11 + HOLE))


@pytest.mark.parametrize("first", ["downsample:keep=4:how=pixels", "tome:keep=9"])
def test_masks_that_hide_all_that_the_tower_made(first: str) -> None:
    """Nothing is left to choose from, in either part."""
    model = build_model("clip", "llama")
    row = make_sample("clip", (2, "image", 7), 100)
    batch = collate([row])
    place = (row.input_ids == IMAGE).nonzero().flatten()

    probe = Sees()
    with vtc.patch(model, make(first) | probe):
        run(model, batch)
    kept = probe.selects[0].grid[:, 1] * 6 + probe.selects[0].grid[:, 2]
    batch["attention_mask"][0, place[kept]] = 0
    with vtc.patch(model, make(f"{first}|random:keep=2")):
        found = run(model, batch)
    assert torch.isfinite(found.logits[batch["attention_mask"].bool()]).all()


@dataclass(frozen=True)
class Signals(Probe):
    """Notes what it is shown of the tower."""

    needs = frozenset({"cls_attention", "low_attention", "keys", "encoder"})
    vision_layer = -2
    low_layer = 1

    seen: list[VisionTokens] = field(default_factory=list)

    def select(self, tokens: VisionTokens) -> Selection:
        self.seen.append(tokens)
        return Selection(torch.arange(0, len(tokens), 2))


def test_signals_of_the_tower_are_those_of_the_open_tokens() -> None:
    """What a token is shown with does not hang on which others are masked."""
    model, probe = build_model("clip", "llama"), Signals()
    masked, whole = opened(11)
    with vtc.patch(model, probe):
        run(model, whole)
        run(model, masked)
    every, some = probe.seen
    for name in ("features", "cls_attention", "low_attention", "keys", "encoder"):
        expected = getattr(every, name)[11 : 11 + HOLE]
        assert torch.equal(getattr(some, name), expected), name


def test_a_row_of_masked_tokens_was_not_emptied() -> None:
    """The newline that ends it is open: it stays, and the model is the plain one."""
    family, model = FAMILIES["llava_next"], shared("llava_next", "sdpa")
    (row,) = family.rows("one")
    (image,) = row.images
    batch = family.collate([row])
    newline = image.separators[1]
    shut = [p for p in image.index if image.separators[0] < p < newline]
    batch["attention_mask"][0, shut] = 0
    plain = run(model, batch)
    for method in (vtc.Full(), vtc.Random(keep=1.0), vtc.FastV(keep=1.0, layer=2)):
        with vtc.patch(model, method):
            assert torch.equal(run(model, batch).logits, plain.logits)
    batch["attention_mask"][0, newline] = 0
    with vtc.patch(model, vtc.Random(keep=5)) as patch:
        run(model, batch)
        (sample,) = patch.report.samples
    assert sample.text_tokens == len(row.input_ids) - len(image.index) - len(image.separators)
