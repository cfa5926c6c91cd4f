# SPDX-License-Identifier: Apache-2.0
"""FLOPs against PyTorch's own counter and against published figures."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.reference.families import FAMILIES, LAYERS
from vtc.core.prefill import ImageTokens, Prefill, Sample, Stopwatch
from vtc.cost import (
    decode_flops,
    equivalent_tokens,
    flops_per_layer,
    kv_bytes,
    kv_bytes_per_layer,
    prefill_flops,
    selector_flops,
    visual_flops,
)
from vtc.methods import make, methods
from vtc.ops.greedy import PLAINLY
from vtc.report import Report

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


# ---- every family -------------------------------------------------------------------------------
COUNTED = (
    "aya_vision", "aya_vision_short", "cohere2_vision", "deepseek_vl", "gemma3", "gemma4",
    "gemma4_device", "glm46v", "glm4v", "glm4v_moe",
    "idefics3", "internvl", "kimi_k25", "llama4", "llava_next",
    "llava_next_video", "llava_onevision", "llava_onevision_shrunk", "mistral3", "ovis2",
    "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm",
    "video_llava", "vipllava",
)  # fmt: skip
NOT_KNOWN = {
    # Of vision, projector and language model, what there is a formula for.
    "blip_2": (False, False, True),
    "chameleon": (False, False, True),
    "deepseek_vl_hybrid": (False, False, True),
    "emu3": (False, False, True),
    "fast_vlm": (False, False, True),
    "gemma3n": (False, False, False),
    "got_ocr2": (False, False, True),
    "idefics2": (False, False, True),
    "instructblip": (False, False, True),
    "janus": (False, False, True),
    "perception_lm": (False, False, True),
    "qwen3_5": (True, True, False),
}
NATIVE = (
    "glm46v", "glm4v", "glm4v_moe", "kimi_k25", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
    "qwen3_vl_moe",
)  # fmt: skip
# Kimi averages frames of a clip, LLaVA-NeXT-Video pools them before its projector, and Gemma 4 pads
# them: tokens do not tell what was run. A patch does know it (`tests/runtime/test_report_cost.py`).
NO_VIDEO = ("gemma4", "kimi_k25", "llava_next_video")


def _cells(name: str) -> list[tuple[str, str]]:
    family, cells = FAMILIES[name], []
    for kind in ("one", "images", "video"):
        if kind == "video" and (family.model_type in NO_VIDEO or not family.has_video):
            continue
        cells.append((name, kind))
    return cells


def _count(model, **inputs) -> tuple[dict[str, int], int]:
    """PyTorch's count by module and in all."""
    # Modules are tracked with hooks on gradients, which views of parameters under no_grad break.
    model.requires_grad_(False)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products are not counted
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    parts = {name: sum(c.values()) for name, c in counter.get_flop_counts().items()}
    return parts, counter.get_total_flops()


def _layers_of(parts: dict[str, int]) -> list[int]:
    name = re.compile(
        r"\w+\.(model\.)?(language_model|text_model)\.(model\.)?layers\.(\d+)"  # of the decoder
    )
    found = {int(m[4]): n for key, n in parts.items() if (m := name.fullmatch(key))}
    return [found[i] for i in range(len(found))]


@pytest.mark.parametrize(("name", "kind"), [cell for name in COUNTED for cell in _cells(name)])
def test_families_agree_with_pytorchs_counter(name, kind):
    family = FAMILIES[name]
    model, row = family.build("eager"), family.rows(kind)[0]
    batch = family.collate([row])
    images, length = [len(t.index) for t in row.images], row.input_ids.numel()
    known: dict = {"logits": 1}
    if family.model_type in NATIVE:
        known["grids"] = [tuple(1 + max(x) for x in zip(*t.grid, strict=True)) for t in row.images]
    if family.model_type.startswith("llava_"):  # padding is cut off, or frames are pooled
        known["tiles"] = [
            1 + max(frame for frame, _, _ in t.grid) if t.video else 1 + max(t.crop or (0,))
            for t in row.images
        ]
    if family.model_type == "gemma4":
        known["patches"] = batch["pixel_values"].shape[1]
    if name == "gemma4_device":  # with one logit, layers that share keys run for one token
        known["logits"] = length
    keep = {} if name == "gemma4_device" else {"logits_to_keep": 1}
    parts, total = _count(model, **batch, **keep)
    cost = prefill_flops(model.config, [length] * LAYERS, images, **known)
    beside = [0.0] * LAYERS  # what is run and not counted
    if family.model_type == "llama4":  # experts that were not chosen
        text = model.config.text_config
        idle = text.num_local_experts - text.num_experts_per_tok
        for layer in text.moe_layers:
            beside[layer] = 6 * length * text.hidden_size * text.intermediate_size * idle
    padding = 0
    if name == "mistral3":  # patches of the padding that makes images equally large
        weight = model.model.vision_tower.patch_conv.weight
        patches = batch["pixel_values"].numel() // weight[0].numel()
        padding = 2 * weight.numel() * (patches - 4 * sum(images))
    assert cost.total + sum(beside) + padding == pytest.approx(total, rel=0.02)
    layers = [a + b for a, b in zip(cost.layers, beside, strict=True)]
    assert layers == pytest.approx(_layers_of(parts), rel=0.02)
    assert cost.lm == pytest.approx(sum(cost.layers) + cost.head)
    assert list(cost.layers) == flops_per_layer(model.config, [length] * LAYERS)
    # A dictionary, as a file has it, is as good.
    assert prefill_flops(model.config.to_dict(), [length] * LAYERS, images, **known) == cost


def test_what_is_not_told_is_bounded():
    """Without grids, Qwen2.5-VL's windows are full; without tiles, LLaVA-NeXT has few."""
    config = FAMILIES["qwen2_5_vl"].config()
    rough, exact = (
        prefill_flops(config, [30] * LAYERS, [20], grids=grids).vision
        for grids in (None, [(1, 4, 5)])
    )
    assert exact < rough < 1.1 * exact
    even = prefill_flops(config, [30] * LAYERS, [16], grids=[(1, 4, 4)])
    assert even.vision == prefill_flops(config, [30] * LAYERS, [16]).vision
    config = FAMILIES["llava_next"].config()
    least, exact = (
        prefill_flops(config, [30] * LAYERS, [20], tiles=tiles).vision for tiles in (None, [5])
    )
    assert 5 * least == 3 * exact


@pytest.mark.parametrize("name", NOT_KNOWN)
def test_what_has_no_formula_is_nan_and_does_not_raise(name):
    config = FAMILIES[name].config()
    layers = config.get_text_config().num_hidden_layers
    for given in (config, config.to_dict()):
        cost = prefill_flops(given, [40] * layers, [9])
        parts = (cost.vision, cost.projector, cost.lm)
        assert tuple(not math.isnan(part) for part in parts) == NOT_KNOWN[name]
        rest = (decode_flops(given, [40] * layers), kv_bytes(given, [40] * layers))
        assert [not math.isnan(n) for n in rest] == [NOT_KNOWN[name][2]] * 2


def test_gemma_4s_tower_needs_the_patches_it_is_padded_to():
    config = FAMILIES["gemma4"].config()
    cost = prefill_flops(config, [40] * LAYERS, [20])
    assert math.isnan(cost.vision)
    assert cost.projector > 0
    assert cost.lm > 0


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_report_of_any_family_has_its_figures_or_nan(name):
    """No configuration makes the cost model raise, whatever it does not know."""
    report = Report(FAMILIES[name].config())
    image = ImageTokens(original=9, encoded=9, steps=((0, 9),), num_layers=LAYERS)
    clocks = (Stopwatch() for _ in range(4))
    report.add(Prefill([Sample(8, (image,), (17,) * LAYERS)], 2, *clocks))
    assert set(report.flops) == {"vision", "projector", "lm"}
    assert math.isnan(report.kv_bytes) or report.kv_bytes > 0


TEXTS = {
    "cohere2": {"sliding_window": 9, "head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 2, "q_lora_rank": None,
        "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
        "num_key_value_heads": 4,
    },
    "gemma2": {"sliding_window": 9, "head_dim": 16},
    "glm4_moe": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 16,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi3": {},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40, "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
        "decoder_sparse_step": 2, "head_dim": 16,
    },
    "starcoder2": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXTS)
def test_language_models_agree_in_prefill_decoding_and_cache(kind):
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200, "pad_token_id": 0,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    if kind == "opt":
        del sizes["num_key_value_heads"]
    config = CONFIG_MAPPING[kind](**sizes | TEXTS[kind])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids, cache = torch.arange(2, 26)[None], DynamicCache(config=config)
    named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    _, total = _count(model, input_ids=ids, **{named: cache}, use_cache=True)
    assert prefill_flops(config, [24] * 4, logits=24).lm == pytest.approx(total, rel=0.02)
    held = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    assert kv_bytes_per_layer(config, [24] * 4) == held
    assert kv_bytes(config, [24] * 4) == sum(held)
    _, total = _count(model, input_ids=ids[:, :1], **{named: cache}, use_cache=True)
    assert decode_flops(config, [24] * 4) == pytest.approx(total, rel=0.02)


# ---- parts --------------------------------------------------------------------------------------
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
    with pytest.raises(ValueError, match=r"grids: .* 1 images, got 2"):
        prefill_flops(config, [36] * 4, [16], grids=[(1, 4, 4)] * 2)
    with pytest.raises(ValueError, match=r"grids: .* 16 tokens"):
        prefill_flops(config, [36] * 4, [16], grids=[(1, 4, 5)])
    for patches in ([(16,), (16,)], [()], [16, (16,)]):
        with pytest.raises(ValueError, match=r"patches: .* 1 images, got"):
            prefill_flops(config, [36] * 4, [16], patches=patches)
    with pytest.raises(ValueError, match="at least 0"):
        kv_bytes(config, [-1] * 4)


# ---- the selector -------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [100, 1100])
def test_divprune_compares_all_pairs(n):
    assert selector_flops("divprune", n, 64, keep=0.25) == 2 * n * n * 64
    assert not PLAINLY.get()


@pytest.mark.parametrize(("n", "keep"), [(100, 50), (100, 10), (1100, 70), (1100, 600)])
def test_todre_compares_the_chosen_with_all(n, keep):
    """However `vtc.ops` does it. The pivot is from [CLS]'s row of the tower."""
    found = selector_flops(
        "todre", n, 64, keep=keep, second_stage=False, vision_d=48, heads=4, text=8
    )
    assert found == 2 * n * keep * 64 + 2 * n * 48


def test_todre_reads_rows_of_the_decoder_too():
    method = make("todre", keep=50)
    first, both = (
        selector_flops(make("todre", keep=50, second_stage=on), 100, 64, text=8, q=80)
        for on in (False, True)
    )
    (which,) = method.taps(32).values()
    rows = {"text": 8, "vision_text": 58}[which]
    assert both - first == 2 * rows * 58 * 80


def test_visionzip_merges_the_rest():
    """Of 99 others (one is [CLS]'s slot), 10 are targets; keys are averaged over 4 heads."""
    found = selector_flops("visionzip", 110, 64, keep=20, contextual=0.5, vision_d=48, heads=4)
    rest = 110 - 9
    compared = 2 * (rest - 10) * 10 * 12  # averages are sums, not products
    assert found == compared + 2 * 110 * 48


def test_fastv_reads_one_row():
    assert selector_flops("fastv", 100, 64, text=8) == 2 * 108 * 64
    assert selector_flops("fastv", 100, 64, text=8, q=80) == 2 * 108 * 80
    # Behind another method, the row is shorter.
    both = make("divprune", keep=20) | make("fastv")
    assert selector_flops(both, 100, 64, text=8) == 2 * 100 * 100 * 64 + 2 * 28 * 64


def test_towers_without_cls_read_every_row():
    with_cls, without = (
        selector_flops("vispruner", 100, 64, vision_d=48, cls=cls) for cls in (True, False)
    )
    assert without - with_cls == 2 * 99 * 100 * 48


@pytest.mark.parametrize("name", sorted(set(methods()) - {"atp"}))  # ATP needs trained weights
def test_selectors_of_all_methods_are_counted_or_not_known(name):
    made = make(name)
    found = selector_flops(made, 64, 32, layers=12, text=8)
    unknown = "encoder" in made.stages or bool(made.peeks(12))
    assert math.isnan(found) == unknown
    assert unknown or found >= 0
    assert unknown or found == selector_flops(made, 64, 32, layers=12, text=8)


def test_choices_without_products_are_free():
    assert selector_flops("random", 64, 32) == 0
    assert selector_flops("full", 64, 32) == 0
    assert selector_flops("downsample", 64, 32, how="pixels") == 0


def test_selectors_sizes_are_checked():
    for name in ("text", "layers", "vision_d", "heads", "q"):
        with pytest.raises(ValueError, match=f"{name}: .* got 0"):
            selector_flops("full", 64, 32, **{name: 0})
    with pytest.raises(TypeError, match=r"tokens: .* got 1.5"):
        selector_flops("full", 1.5, 32)
