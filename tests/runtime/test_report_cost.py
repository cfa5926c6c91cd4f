# SPDX-License-Identifier: Apache-2.0
"""What a patch reports of cost is what ran, by PyTorch's own counter: tiles and frames, windows,
padded and merged patches, vision states, and the positions of the output head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import vtc
from tests.reference.families import FAMILIES, LAYERS, Row, TinyFamily
from tests.reference.models import make_sample, shared_model
from vtc.core.prefill import logits_of
from vtc.cost import decode_flops, flops_per_layer, kv_bytes_per_layer, prefill_flops
from vtc.models.base import CACHE

ALL = (
    "aya_vision", "cohere2_vision", "deepseek_vl", "gemma3", "gemma4", "glm46v", "glm4v",
    "glm4v_moe", "idefics3",
    "internvl", "kimi_k25", "llava_next", "llava_next_video", "llava_onevision",
    "llava_onevision_shrunk", "mllama", "ovis2", "paligemma", "qwen2_5_vl", "qwen2_vl",
    "qwen3_vl", "qwen3_vl_moe",
    "smolvlm", "video_llava", "vipllava",
)  # fmt: skip
"""Families of which everything that runs has a formula."""
KINDS = ("one", "images", "video")


def count(model: Any, **inputs: Any) -> tuple[dict[str, int], int]:
    """PyTorch's count by module and in all."""
    # Modules are tracked with hooks on gradients, which views of parameters under no_grad break.
    model.requires_grad_(False)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products are not counted
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    parts = {name: sum(c.values()) for name, c in counter.get_flop_counts().items()}
    return parts, counter.get_total_flops()


def rows_of(family: TinyFamily, kind: str) -> list[Row]:
    return [row for row in family.rows(kind) if row.images]


def reported(model: Any, method: vtc.Method, batch: dict[str, Any]) -> tuple[vtc.Patch, int]:
    """The patch after one forward, and PyTorch's count of it."""
    with vtc.patch(model, method) as patch:
        _, total = count(model, **batch)
    return patch, total


CELLS = [
    (name, kind) for name in ALL for kind in KINDS if kind != "video" or FAMILIES[name].has_video
]


@pytest.mark.parametrize(("name", "kind"), CELLS)
@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_the_report_is_what_ran(name: str, kind: str, keep: float) -> None:
    """Images of any shape, tiles that are cut, clips; all logits, as nothing else was asked for."""
    family = FAMILIES[name]
    model = family.build("eager")
    for row in rows_of(family, kind):
        patch, total = reported(model, vtc.make("random", keep=keep), family.collate([row]))
        assert sum(patch.report.flops.values()) == pytest.approx(total, rel=0.002)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next", "mllama"])
def test_parts_are_those_of_the_modules(name: str) -> None:
    family = FAMILIES[name]
    model = family.build("eager")
    for row in rows_of(family, "images"):
        with vtc.patch(model, vtc.make("random", keep=0.3)) as patch:
            parts, _ = count(model, **family.collate([row]))
        found = {key.split(".")[-1]: n for key, n in parts.items() if key.count(".") <= 2}
        tower = next(
            found[key] for key in ("visual", "vision_tower", "vision_model") if key in found
        )
        joined = found["multi_modal_projector"] if name != "qwen2_5_vl" else 0
        flops = patch.report.flops
        # Qwen's projector is a part of its tower.
        inside = flops["projector"] if name == "qwen2_5_vl" else 0
        assert flops["vision"] + inside == pytest.approx(tower, rel=0.002)
        assert flops["projector"] - inside == pytest.approx(joined)
        assert flops["lm"] == found["language_model"] + found["lm_head"]


@pytest.mark.parametrize(
    ("name", "kind", "larger"),
    [("qwen2_5_vl", "one", True), ("llava_next", "images", False), ("qwen2_vl", "video", True)],
)
def test_what_is_known_of_images_is_needed(name: str, kind: str, larger: bool) -> None:
    """Without it, the figures would be others: the cells above are no accident."""
    family = FAMILIES[name]
    batch = family.collate([rows_of(family, kind)[0]])
    patch, total = reported(family.build("eager"), vtc.make("full"), batch)
    (sample,) = patch.report.samples
    images = [image.original for image in sample.images]
    guess = prefill_flops(family.config(), sample.lengths, images, logits=sample.logits)
    assert sum(patch.report.flops.values()) == total
    assert guess.total > total if larger else guess.total < total


def test_windows_of_a_wide_image() -> None:
    """18 x 5 tokens in windows of 2 x 2: the last row of windows is cut."""
    family = FAMILIES["qwen2_5_vl"]
    tokens, generator = 18 * 5, torch.Generator().manual_seed(0)
    row = rows_of(family, "one")[0]
    place = row.images[0].index[0]
    ids = row.input_ids
    after = ids[row.images[0].index[-1] + 1 :]
    ids = torch.cat([ids[:place], ids[place].repeat(tokens), after])[None]
    batch = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == ids[0, place]).int(),
        "pixel_values": torch.randn(4 * tokens, 96, generator=generator),
        "image_grid_thw": torch.tensor([[1, 10, 36]]),
    }
    patch, total = reported(family.build("eager"), vtc.make("random", keep=0.1), batch)
    assert patch.report.images[0].extent == (1, 5, 18)
    assert sum(patch.report.flops.values()) == total
    (sample,) = patch.report.samples
    square = prefill_flops(family.config(), sample.lengths, [tokens])
    assert square.vision > patch.report.flops["vision"]


def test_rows_of_a_batch_are_averaged() -> None:
    family = FAMILIES["qwen2_5_vl"]
    model, rows = family.build("eager"), rows_of(family, "ragged")
    alone = [
        reported(model, vtc.make("random", keep=0.3), family.collate([row]))[0].report.flops
        for row in rows
    ]
    patch, _ = reported(model, vtc.make("random", keep=0.3), family.collate(rows))
    for part, value in patch.report.flops.items():
        assert value == pytest.approx(sum(flops[part] for flops in alone) / len(rows))


# ---- pixels, patches, logits --------------------------------------------------------------------
def llava_batch() -> dict[str, Any]:
    sample = make_sample("clip", ("image", 5), seed=0)
    return {"input_ids": sample.input_ids[None], "pixel_values": sample.pixel_values}


def test_fewer_pixels() -> None:
    method = vtc.make("downsample", how="pixels", keep=9)
    patch, total = reported(shared_model("clip+llama", "eager"), method, llava_batch())
    (image,) = patch.report.images
    assert (image.original, image.encoded, image.tiles) == (36, 9, 1)
    assert sum(patch.report.flops.values()) == pytest.approx(total, rel=0.002)


def test_images_larger_than_the_tower_was_made_for() -> None:
    """An interpolated image is one large tile, not several of the usual size."""

    model, batch = shared_model("clip+llama", "eager"), llava_batch()
    encode, image = model.model.get_image_features, model.config.image_token_id
    ids = batch["input_ids"]
    before, after = ids[:, : int((ids == image).nonzero()[0, 1])], ids[ids != image][None]
    after = after[:, before.shape[1] :]
    given = {
        "input_ids": torch.cat([before, ids.new_full((1, 8 * 10), image), after], dim=1),
        "pixel_values": torch.randn(1, 3, 8 * 14, 10 * 14),
    }
    model.model.get_image_features = lambda **kw: encode(**kw, interpolate_pos_encoding=True)
    try:
        patch, total = reported(model, vtc.make("random", keep=20), given)
    finally:
        del model.model.get_image_features
    (found,) = patch.report.images
    assert (found.original, found.tiles, found.patches) == (80, 1, 80)
    assert sum(patch.report.flops.values()) == pytest.approx(total, rel=0.002)


def test_merging_is_counted_image_by_image() -> None:
    """Images whose patches go at other layers are not taken for their mean."""
    config = FAMILIES["vipllava"].config()
    passed = [(16, 12, 9), (16, 4, 2)]
    both = prefill_flops(config, [30] * LAYERS, [16, 16], tiles=[1, 1], patches=passed)
    alone = [prefill_flops(config, [30] * LAYERS, [16], tiles=[1], patches=own) for own in passed]
    assert both.vision == sum(cost.vision for cost in alone)
    assert both.projector == sum(cost.projector for cost in alone)
    usual = prefill_flops(config, [30] * LAYERS, [16, 16])
    mixed = prefill_flops(config, [30] * LAYERS, [16, 16], patches=[None, passed[1]])
    assert mixed.vision == usual.vision / 2 + alone[1].vision


@pytest.mark.parametrize("name", ["qwen2_vl", "mllama"])
@pytest.mark.parametrize("logits", [None, 1, 3, torch.tensor([0, 4])])
def test_the_head_runs_where_it_was_asked_to(name: str, logits: Any) -> None:
    family = FAMILIES[name]
    batch = family.collate([rows_of(family, "one")[0]])
    given = {} if logits is None else {"logits_to_keep": logits}
    patch, total = reported(family.build("eager"), vtc.make("full"), {**batch, **given})
    assert sum(patch.report.flops.values()) == pytest.approx(total, rel=0.002)


@pytest.mark.parametrize(("given", "places"), [({}, None), ({"logits_to_keep": 1}, 1)])
def test_the_head_of_a_model_that_is_its_own_base(given: dict[str, int], places: Any) -> None:
    """Llama 4, whose experts that run in vain keep it from the other tests."""
    family = FAMILIES["llama4"]
    batch = family.collate([rows_of(family, "one")[0]])
    patch, _ = reported(family.build("eager"), vtc.make("full"), {**batch, **given})
    (prefill,) = patch.report.prefills
    (sample,) = prefill.samples
    assert sample.logits == (places or batch["input_ids"].shape[1])


def test_a_base_model_has_no_head() -> None:
    family = FAMILIES["qwen2_vl"]
    batch = family.collate([rows_of(family, "one")[0]])
    patch, total = reported(family.build("eager").model, vtc.make("full"), batch)
    assert patch.report.samples[0].logits == 0
    assert sum(patch.report.flops.values()) == pytest.approx(total, rel=0.002)


def test_logits_of() -> None:
    found = [logits_of(given, 7) for given in (None, 0, 1, 3, 9, torch.tensor([2, 5]))]
    assert found == [0, 7, 1, 3, 7, 2]


# ---- cross-attention ----------------------------------------------------------------------------
TOKENS, STATES = 9, 34
CROSS = (1, 4)
LENGTHS = [STATES if i in CROSS else TOKENS for i in range(LAYERS)]


def test_cross_layers_by_hand() -> None:
    config = FAMILIES["mllama"].config()
    text = config.text_config
    d, q = text.hidden_size, text.hidden_size
    kv = q // text.num_attention_heads * text.num_key_value_heads
    mlp = 3 * d * text.intermediate_size
    t, n = TOKENS, STATES
    prefill = 2 * t * (2 * d * q + mlp) + 4 * n * d * kv + 4 * t * n * q
    found = flops_per_layer(config, LENGTHS)
    assert [found[i] for i in CROSS] == [prefill] * 2
    assert found[0] == 2 * t * (2 * d * q + 2 * d * kv + mlp) + 4 * t * t * q
    found = flops_per_layer(config, LENGTHS, decoding=True)
    assert [found[i] for i in CROSS] == [2 * (2 * d * q + mlp) + 4 * n * q] * 2
    cached = kv_bytes_per_layer(config, LENGTHS, 2)
    assert [cached[i] for i in CROSS] == [2 * kv * n * 2] * 2
    assert cached[0] == 2 * kv * t * 2
    assert prefill_flops(config.to_dict(), LENGTHS, [32]) == prefill_flops(config, LENGTHS, [32])


def test_cross_layers_without_states_do_not_run() -> None:
    config = FAMILIES["mllama"].config()
    lengths = [0 if i in CROSS else TOKENS for i in range(LAYERS)]
    model = FAMILIES["mllama"].build("eager")
    ids = torch.arange(30, 30 + TOKENS)[None]
    _, total = count(model, input_ids=ids)
    assert prefill_flops(config, lengths, logits=TOKENS).total == pytest.approx(total, rel=0.002)
    assert [flops_per_layer(config, lengths, decoding=True)[i] for i in CROSS] == [0, 0]
    assert [kv_bytes_per_layer(config, lengths)[i] for i in CROSS] == [0, 0]


def test_a_decoder_of_cross_layers_alone_is_not_known() -> None:
    config = FAMILIES["mllama"].config()
    config.text_config.cross_attention_layers = list(range(LAYERS))
    assert math.isnan(prefill_flops(config, LENGTHS, [32]).lm)


@pytest.mark.parametrize("keep", [1.0, 5])
def test_mllama_layer_by_layer_then_decoding_and_cache(keep: float | int) -> None:
    family = FAMILIES["mllama"]
    model, row = family.build("eager"), rows_of(family, "images")[0]
    batch, cache = family.collate([row]), DynamicCache(config=family.config().text_config)
    with vtc.patch(model, vtc.make("random", keep=keep)) as patch:
        parts, _ = count(model, **batch, **{CACHE: cache}, use_cache=True)
        (sample,) = patch.report.samples
        layers = [
            parts[f"MllamaForConditionalGeneration.model.language_model.layers.{i}"]
            for i in range(LAYERS)
        ]
        assert flops_per_layer(model.config, sample.lengths) == layers
        # Two tiles' worth of columns an image, or [CLS] of each real tile and the patches kept.
        tiles = sum(1 if image.crop is None else 2 for image in row.images)
        whole = len(row.images) * 2 * (1 + 16)
        kept = whole if keep == 1.0 else tiles + 5 * len(row.images)
        assert [sample.lengths[i] for i in CROSS] == [kept] * 2
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert patch.report.kv_bytes == held
        seen = batch["cross_attention_mask"][:, -1:]
        _, total = count(
            model,
            input_ids=batch["input_ids"][:, :1],
            cross_attention_mask=torch.cat([batch["cross_attention_mask"], seen], dim=1),
            **{CACHE: cache},
            use_cache=True,
        )
    assert decode_flops(model.config, sample.lengths) == pytest.approx(total, rel=0.002)


def test_images_that_were_encoded_before_generate_count() -> None:
    family = FAMILIES["paligemma"]
    model, batch = family.build("eager"), family.collate(family.rows("one"))
    pixels = batch.pop("pixel_values")
    with vtc.patch(model, "divprune", keep=0.5) as patch, torch.no_grad():
        for ask in (lambda **given: model.generate(**given, max_new_tokens=2), model):
            encoded = model.get_image_features(pixel_values=pixels)
            ask(**batch, mm_encoder_outputs={"image": encoded})
    first, second = patch.report.prefills
    assert first.vision_ms > 0
    assert second.vision_ms > 0
