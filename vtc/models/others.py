# SPDX-License-Identifier: Apache-2.0
"""What becomes of models of transformers that have no family here, for MODELS.md."""

from __future__ import annotations

WRITTEN_FOR = "5.24"
"""The version of transformers whose models these are."""

ACCEPTED = "accepted"
"""Of a model that the generic family takes, with a warning."""

OTHERS: dict[str, str] = {
    "blip": (
        "BlipForConditionalGeneration lacks get_placeholder_mask, get_image_features, "
        "language_model"
    ),
    "diffusion_gemma": (
        "DiffusionGemmaForBlockDiffusion lacks get_placeholder_mask, get_image_features, "
        "language_model"
    ),
    "dots3_note": (
        "Dots3NoteTextModel has layers of kind indexed_attention; supported are full and "
        "sliding attention; an index chooses their keys among those that are visible, so that "
        "dropping tokens would be the same as masking them, but vtc does not read attention "
        "under an index, nor move the choices that some layers hand on, which needs a family of "
        "its own"
    ),
    "evolla": "EvollaForProteinText2Text (evolla), in which vtc finds no vision encoder",
    "fuyu": "FuyuForCausalLM (fuyu), in which vtc finds no vision encoder",
    "git": ("GitForCausalLM lacks get_placeholder_mask, get_image_features, language_model"),
    "glm5_next": (
        "Glm5NextTextModel has layers of kind indexed_attention, linear_attention; supported "
        "are full and sliding attention; they choose blocks of adjacent keys by their place in "
        "the cache, and a dropped token moves all later keys to other blocks, so that no mask "
        "gives the same result"
    ),
    "hy_v4_vl": (
        "HYV4VLTextModel has layers of kind indexed_attention; supported are full and sliding "
        "attention; an index chooses their keys among those that are visible, so that dropping "
        "tokens would be the same as masking them, but vtc does not read attention under an "
        "index, nor move the choices that some layers hand on, which needs a family of its own"
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
    "minimax_m3_vl": (
        "MiniMaxM3VLTextModel has layers of kind minimax_m3_sparse; supported are full and "
        "sliding attention; they choose blocks of adjacent keys by their place in the cache, and "
        "a dropped token moves all later keys to other blocks, so that no mask gives the same "
        "result"
    ),
    "mistral4": "Mistral4ForCausalLM (mistral4), in which vtc finds no vision encoder",
    "mistral_large4": (
        "MistralLarge4TextModel has layers of kind indexed_attention; supported are full and "
        "sliding attention; an index chooses their keys among those that are visible, so that "
        "dropping tokens would be the same as masking them, but vtc does not read attention "
        "under an index, nor move the choices that some layers hand on, which needs a family of "
        "its own"
    ),
    "pi0": "PI0ForConditionalGeneration (pi0), in which vtc finds no vision encoder",
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
        "are full and sliding attention; an index chooses their keys among those that are "
        "visible, so that dropping tokens would be the same as masking them, but vtc does not "
        "read attention under an index, nor move the choices that some layers hand on, which "
        "needs a family of its own"
    ),
    "t5gemma2": (
        "T5Gemma2ForConditionalGeneration lacks get_placeholder_mask, get_image_features, "
        "language_model"
    ),
    "udop": "UdopForConditionalGeneration (udop), in which vtc finds no vision encoder",
    "unlimited_ocr": (
        "UnlimitedOcrTextModel has layers of kind reference_sliding_attention; supported are "
        "full and sliding attention"
    ),
    "vision-encoder-decoder": (
        "VisionEncoderDecoderModel (vision-encoder-decoder), in which vtc finds no vision encoder"
    ),
}
