# SPDX-License-Identifier: Apache-2.0
"""What becomes of models of transformers that have no family here, for MODELS.md."""

from __future__ import annotations

WRITTEN_FOR = "5.24"
"""The version of transformers whose models these are."""

ACCEPTED = "accepted"
"""Of a model that the generic family takes, with a warning."""

OTHERS: dict[str, str] = {
    "apertus1p5": ACCEPTED,
    "blip": (
        "BlipForConditionalGeneration lacks get_placeholder_mask, get_image_features, "
        "language_model"
    ),
    "cohere_compass": (
        "CohereCompassTextModel has not one rotary embedding for all layers, and so needs a "
        "family of its own"
    ),
    "cosmos3_edge": (
        "Cosmos3EdgeForConditionalGeneration has rope_deltas: rotary positions of its vision "
        "tokens are places in the picture (m-RoPE), which needs a family of its own"
    ),
    "cosmos3_omni": (
        "Cosmos3OmniForConditionalGeneration has rope_deltas: rotary positions of its vision "
        "tokens are places in the picture (m-RoPE), which needs a family of its own"
    ),
    "deepseek_ocr2": ACCEPTED,
    "diffusion_gemma": (
        "DiffusionGemmaForBlockDiffusion lacks get_placeholder_mask, get_image_features, "
        "language_model"
    ),
    "dots3_note": (
        "Dots3NoteTextModel has layers of kind indexed_attention; supported are full and "
        "sliding attention"
    ),
    "evolla": "EvollaForProteinText2Text (evolla) has no vision encoder",
    "fuyu": "FuyuForCausalLM (fuyu) has no vision encoder",
    "gemma4_unified": (
        "Gemma4UnifiedTextModel has not one rotary embedding for all layers, and so needs a "
        "family of its own"
    ),
    "git": ("GitForCausalLM lacks get_placeholder_mask, get_image_features, language_model"),
    "glm5_next": (
        "Glm5NextTextModel has layers of kind indexed_attention, linear_attention; supported "
        "are full and sliding attention"
    ),
    "granite4_vision": (
        "vision tokens enter Granite4VisionTextModel as zeros, and features are added between"
        " its layers, which needs a family of its own"
    ),
    "granite_docling": (
        "GraniteDoclingForConditionalGeneration has _deepstack_process: features of earlier "
        "tower layers are added between decoder layers, which needs a family of its own"
    ),
    "hunyuan_vl": (
        "HunYuanVLForConditionalGeneration has rope_deltas: rotary positions of its vision "
        "tokens are places in the picture (m-RoPE), which needs a family of its own"
    ),
    "hy_v4_vl": (
        "HYV4VLTextModel has layers of kind indexed_attention; supported are full and sliding"
        " attention"
    ),
    "idefics": (
        "IdeficsForVisionText2Text lacks get_placeholder_mask, get_image_features, language_model"
    ),
    "inkling2": (
        "Inkling2TextModel has layers of kind hybrid, hybrid_sliding; supported are full and "
        "sliding attention"
    ),
    "inkling2_loop": (
        "Inkling2LoopTextModel has layers of kind hybrid, hybrid_sliding; supported are full "
        "and sliding attention"
    ),
    "inkling_mm_model": (
        "InklingTextModel has layers of kind hybrid, hybrid_sliding; supported are full and "
        "sliding attention"
    ),
    "kosmos-2": (
        "Kosmos2ForConditionalGeneration lacks get_placeholder_mask, get_image_features, "
        "language_model"
    ),
    "kosmos-2.5": (
        "Kosmos2_5ForConditionalGeneration lacks get_placeholder_mask, get_image_features, "
        "language_model"
    ),
    "lfm3_vl": ("Lfm3Model has layers of kind conv; supported are full and sliding attention"),
    "minicpm_ocr": (
        "Qwen3_5TextModel has layers of kind linear_attention; supported are full and sliding"
        " attention"
    ),
    "minicpmv4_7": (
        "Qwen3_5TextModel has layers of kind linear_attention; supported are full and sliding"
        " attention"
    ),
    "minimax_m3_vl": (
        "MiniMaxM3VLTextModel has layers of kind minimax_m3_sparse; supported are full and "
        "sliding attention"
    ),
    "mistral4": "Mistral4ForCausalLM (mistral4) has no vision encoder",
    "mistral_large4": (
        "MistralLarge4TextModel has layers of kind indexed_attention; supported are full and "
        "sliding attention"
    ),
    "molmo2": (
        "Molmo2ForConditionalGeneration takes mm_token_type_ids, by which it may mask or "
        "place the tokens of an image in a way of its own, which needs a family of its own"
    ),
    "nemotron_h_omni": (
        "NemotronHModel has layers of kind linear_attention, mlp, moe; supported are full and"
        " sliding attention"
    ),
    "pi0": "PI0ForConditionalGeneration (pi0) has no vision encoder",
    "pix2struct": (
        "Pix2StructForConditionalGeneration lacks get_placeholder_mask, get_image_features, "
        "language_model"
    ),
    "pp_formulanet": (
        "PPFormulaNetForConditionalGeneration lacks get_placeholder_mask, get_image_features,"
        " language_model"
    ),
    "qwen4_exp": (
        "Qwen4ExpTextModel has layers of kind indexed_attention, linear_attention; supported "
        "are full and sliding attention"
    ),
    "shieldgemma2": (
        "Gemma3TextModel has not one rotary embedding for all layers, and so needs a family "
        "of its own"
    ),
    "step3p7": (
        "Step3p7TextModel has not one rotary embedding for all layers, and so needs a family "
        "of its own"
    ),
    "t5gemma2": (
        "T5Gemma2ForConditionalGeneration lacks get_placeholder_mask, get_image_features, "
        "language_model"
    ),
    "udop": "UdopForConditionalGeneration (udop) has no vision encoder",
    "unlimited_ocr": (
        "UnlimitedOcrTextModel has layers of kind reference_sliding_attention; supported are "
        "full and sliding attention"
    ),
    "vision-encoder-decoder": (
        "VisionEncoderDecoderModel (vision-encoder-decoder) has no vision encoder"
    ),
}
