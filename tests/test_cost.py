# SPDX-License-Identifier: Apache-2.0
"""FLOPs against PyTorch's own counter and against published figures."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)

from vtc.cost import decode_flops, equivalent_tokens, kv_bytes, prefill_flops, visual_flops

TEXT = 20


def _config(kind: str) -> LlavaConfig:
    if kind == "clip-llama-gqa":
        vision = CLIPVisionConfig(
            hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
            image_size=56, patch_size=14,
        )  # fmt: skip
        text = LlamaConfig(
            hidden_size=64, intermediate_size=144, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=2, vocab_size=200,
        )  # fmt: skip
        strategy = "default"
    else:
        vision = SiglipVisionConfig(
            hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
            image_size=56, patch_size=14,
        )  # fmt: skip
        text = Qwen2Config(
            hidden_size=64, intermediate_size=144, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=200,
        )  # fmt: skip
        strategy = "full"
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=199,
        vision_feature_select_strategy=strategy, attn_implementation="eager",
    )  # fmt: skip


@pytest.fixture(params=["clip-llama-gqa", "siglip-qwen2"])
def counted(request):
    """A tiny model's configuration and PyTorch's count of its forward, by part."""
    config = _config(request.param)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.cat([torch.full((1, 16), 199), torch.arange(TEXT)[None]], 1)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.randn(1, 3, 56, 56),
            logits_to_keep=1,
        )
    parts = counter.get_flop_counts()
    by_name = {name.rsplit(".", 1)[-1]: sum(c.values()) for name, c in parts.items()}
    return config, by_name, counter.get_total_flops()


def test_agrees_with_pytorchs_counter(counted):
    config, parts, total = counted
    cost = prefill_flops(config, [16 + TEXT] * 4, [16])
    assert cost.vision == pytest.approx(parts["vision_tower"], rel=0.02)
    assert cost.projector == pytest.approx(parts["multi_modal_projector"], rel=0.02)
    assert cost.lm == pytest.approx(parts["language_model"] + parts["lm_head"], rel=0.02)
    assert cost.total == pytest.approx(total, rel=0.02)


def _text_sizes(**more):
    return {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200, "bos_token_id": 0,
        "eos_token_id": 1, **more,
    }  # fmt: skip


def _qwen2_vl():
    """64 patches, merged four by four into 16 tokens."""
    config = Qwen2VLConfig(
        text_config=_text_sizes(rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}),
        vision_config={
            "embed_dim": 48, "hidden_size": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 3,
            "patch_size": 14,
        },
        image_token_id=199, attn_implementation="eager",
    )  # fmt: skip
    inputs = {"pixel_values": torch.randn(64, 3 * 2 * 14 * 14)}
    inputs["image_grid_thw"] = torch.tensor([[1, 8, 8]])
    return Qwen2VLForConditionalGeneration(config), inputs, 16


def _internvl():
    """16 patches, shuffled into 4 tokens."""
    config = InternVLConfig(
        vision_config={
            "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "image_size": [56, 56], "patch_size": [14, 14],
        },
        text_config=_text_sizes(model_type="qwen2"), image_token_id=199,
        attn_implementation="eager",
    )  # fmt: skip
    inputs = {"pixel_values": torch.randn(1, 3, 56, 56)}
    return InternVLForConditionalGeneration(config), inputs, 4


@pytest.mark.parametrize("build", [_qwen2_vl, _internvl])
def test_other_layouts_agree_too(build):
    torch.manual_seed(0)
    model, inputs, tokens = build()
    ids = torch.cat([torch.full((1, tokens), 199), torch.arange(TEXT)[None]], 1)
    kinds = (ids == 199).long()
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = kinds
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.eval()(
            input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1, **inputs
        )  # fmt: skip
    cost = prefill_flops(model.config, [tokens + TEXT] * 3, [tokens])
    assert cost.total == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_shorter_layers_cost_less_and_only_in_the_language_model(counted):
    config, _, _ = counted
    full, cut = (prefill_flops(config, [36, 36, n, n], [16]) for n in (36, 21))
    assert (cut.vision, cut.projector) == (full.vision, full.projector)
    # What is saved is what the counter would have counted in the two last layers.
    alone = prefill_flops(config, [36, 36, 0, 0]).lm
    assert cut.lm < full.lm
    assert full.lm - alone == pytest.approx(2 * (prefill_flops(config, [0, 0, 36, 0]).lm - _head()))


def _head() -> int:
    return 2 * 64 * 200


def test_decode_step_agrees_with_pytorchs_counter():
    config = _config("clip-llama-gqa")
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.inference_mode():
        cache = model(input_ids=torch.arange(30)[None], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert decode_flops(config, [30] * 4) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("per_layer", "teraflops"),
    [
        ([576] * 32, 3.817),
        ([2880] * 32, 20.83),
        # TransPrune "High": 7/8, 5/8 and 1/8 of the tokens after (1-based) layers 7, 9 and 12.
        ([576] * 7 + [504] * 2 + [360] * 3 + [72] * 20, 1.557),
        ([2880] * 7 + [2520] * 2 + [1800] * 3 + [360] * 20, 8.33),
    ],
)
def test_published_figures(per_layer, teraflops):
    assert visual_flops(per_layer, d=4096, m=11008) / 1e12 == pytest.approx(teraflops, abs=0.005)


def test_the_two_conventions_differ_by_two():
    """Without text, head and grouped queries, 2 per multiply-add is the literature's times two."""
    config = LlamaConfig(num_hidden_layers=32, vocab_size=1)  # LLaMA-7B's sizes are the defaults
    ours = prefill_flops(config, [576] * 32).lm - 2 * 4096
    assert ours == pytest.approx(2 * visual_flops([576] * 32, 4096, 11008))


def test_kv_bytes_are_those_of_a_real_cache():
    config = _config("clip-llama-gqa")
    model = LlavaForConditionalGeneration(config).eval()
    with torch.inference_mode():
        cache = model(input_ids=torch.arange(30)[None], use_cache=True).past_key_values
    real = sum(
        t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
    )
    assert kv_bytes(config, [30] * 4) == real
    assert kv_bytes(config, [30] * 4, bytes_per_value=2) == real / 2


def test_sliding_window_layers_hold_less_than_the_window():
    config = MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, sliding_window=8,
    )  # fmt: skip
    with torch.inference_mode():
        model = MistralForCausalLM(config).eval()
        cache = model(input_ids=torch.arange(20)[None], use_cache=True).past_key_values
    real = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_bytes(config, [20, 20]) == real
    assert kv_bytes(config, [20, 5]) == real * 12 / 14


def test_several_images_and_tiles():
    config = _config("clip-llama-gqa")
    one, three = prefill_flops(config, [36] * 4, [16]), prefill_flops(config, [68] * 4, 3)
    assert three.vision == 3 * one.vision
    assert three.projector == 3 * one.projector
    # 40 tokens need three tiles of 16; a caller who knows that there were five says so.
    assert prefill_flops(config, [60] * 4, [40]).vision == 3 * one.vision
    assert prefill_flops(config, [60] * 4, [40], tiles=[5]).vision == 5 * one.vision
    assert prefill_flops(config, [36] * 4).vision == 0


def test_llava_onevision_counts_all_its_tiles():
    config = LlavaOnevisionConfig()
    tiled = prefill_flops(config, [5 * 729] * config.text_config.num_hidden_layers, [5 * 729])
    single = prefill_flops(config, [729] * config.text_config.num_hidden_layers, [729])
    assert tiled.vision == pytest.approx(5 * single.vision)
    assert tiled.projector == pytest.approx(5 * single.projector)


def test_what_is_not_known_is_not_guessed():
    config = {"model_type": "who_knows", "vision_config": {"model_type": "odd"},
              "text_config": _config("siglip-qwen2").text_config.to_dict()}  # fmt: skip
    cost = prefill_flops(config, [30] * 4, [16])
    assert math.isnan(cost.vision)
    assert math.isnan(cost.projector)
    assert cost.lm > 0
    assert math.isnan(cost.total)


def test_dictionaries_are_as_good_as_objects():
    config = _config("clip-llama-gqa")
    assert prefill_flops(config.to_dict(), [36] * 4, [16]) == prefill_flops(config, [36] * 4, [16])


def test_equivalent_tokens():
    assert equivalent_tokens([576, 576, 144, 144]) == 360
    with pytest.raises(ValueError, match="per_layer"):
        equivalent_tokens([])


def test_bad_input_is_named():
    config = _config("clip-llama-gqa")
    with pytest.raises(ValueError, match="4 decoder layers, got 3"):
        prefill_flops(config, [36] * 3)
    with pytest.raises(ValueError, match="tiles"):
        prefill_flops(config, [36] * 4, [16], tiles=[1, 1])
    with pytest.raises(ValueError, match="at least 0"):
        kv_bytes(config, [-1] * 4)
