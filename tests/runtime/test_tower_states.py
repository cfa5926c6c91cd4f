# SPDX-License-Identifier: Apache-2.0
"""Patch states of towers whose patches are joined into tokens: a token is shown their mean.

Which patches a token has is found by gradients through the model's own code. Convolutions that
overlap are cut to what their strides leave to each place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.reference.families import FAMILIES
from tests.reference.masked import images_of
from tests.reference.probes import Probe
from tests.runtime.test_families import REFUSED, rows_of, shared, skip_reason
from vtc.core import Selection, VisionTokens

LAST: dict[str, Callable[[Any], Any]] = {
    "gemma3": lambda base: base.vision_tower.post_layernorm,
    "internvl": lambda base: base.vision_tower.layernorm,
    "aya_vision": lambda base: base.vision_tower.encoder.layers[-1],
    "cohere2_vision": lambda base: base.vision_tower.post_layernorm,
    "idefics3": lambda base: base.vision_model.post_layernorm,
    "smolvlm": lambda base: base.vision_model.post_layernorm,
    "deepseek_vl": lambda base: base.vision_model.post_layernorm,
    "deepseek_vl_hybrid": lambda base: base.vision_model.post_layernorm,
    "mistral3": lambda base: base.vision_tower.transformer.layers[-1],
    "qwen2_vl": lambda base: base.visual.blocks[-1],
    "qwen2_5_vl": lambda base: base.visual.blocks[-1],
    "qwen3_vl": lambda base: base.visual.blocks[-1],
    "qwen3_vl_moe": lambda base: base.visual.blocks[-1],
    "qwen3_5": lambda base: base.visual.blocks[-1],
    "glm4v": lambda base: base.visual.post_layernorm,
    "glm4v_moe": lambda base: base.visual.post_layernorm,
    "glm46v": lambda base: base.visual.post_layernorm,
    "gemma4": lambda base: base.vision_tower.encoder.layers[-1],
    "gemma4_device": lambda base: base.vision_tower.encoder.layers[-1],
    "llama4": lambda base: base.vision_model.layernorm_post,
    "kimi_k25": lambda base: base.vision_tower.final_layernorm,
    "perception_lm": lambda base: base.vision_tower.timm_model.norm,
    "ovis2": lambda base: base.vision_tower.transformer.rms_norm,
    "qwen3_5_moe": lambda base: base.visual.blocks[-1],
    "glm_ocr": lambda base: base.visual.post_layernorm,
    "qwen2_5_omni_thinker": lambda base: base.visual.blocks[-1],
    "qwen3_omni_moe_thinker": lambda base: base.visual.blocks[-1],
    "exaone4_5": lambda base: base.visual.blocks[-1],
    "hyperclovax_vision_v2": lambda base: base.vision_model.blocks[-1],
    "video_llama_3": lambda base: base.vision_model.post_layernorm,
    "paddleocr_vl": lambda base: base.visual.vision_model.post_layernorm,
    "ernie4_5_vl_moe": lambda base: base.vision_tower.ln,
    "lighton_ocr": lambda base: base.vision_encoder.transformer.layers[-1],
    "qianfan_ocr": lambda base: base.vision_tower.layernorm,
    "glmga": lambda base: base.visual.post_layernorm,
    "lfm2_vl": lambda base: base.vision_tower.post_layernorm,
    "minicpmv4_6": lambda base: base.vision_tower.post_layernorm,
    "muse_glimmer": lambda base: base.vision_tower.ln_post,
    "muse_spark": lambda base: base.vision_tower.ln_post,
    "hunyuan_vl": lambda base: base.vision_tower.layers[-1],
    "granite_docling": lambda base: base.vision_model.post_layernorm,
    "granite_docling_fine": lambda base: base.vision_model.post_layernorm,
    "cohere_compass": lambda base: base.visual.blocks[-1],
    "cosmos3_omni": lambda base: base.visual.blocks[-1],
    "cosmos3_edge": lambda base: base.visual.post_layernorm,
    "molmo2": lambda base: base.vision_tower.layers[-1],
    "blip_2": lambda base: base.qformer.encoder.layer[-1],
    "instructblip": lambda base: base.qformer.encoder.layer[-1],
    "instructblipvideo": lambda base: base.qformer.encoder.layer[-1],
    "idefics2": lambda base: base.connector.perceiver_resampler,
    "deepseek_ocr2": lambda base: base.vision_tower.vision_encoder.norm,
    "got_ocr2": lambda base: base.vision_tower.layers[-1],
    "pp_chart2table": lambda base: base.vision_tower.layers[-1],
    "step3p7": lambda base: base.vision_model.layers[-1],
    "lfm3_vl": lambda base: base.vision_tower.layers[-1],
    "nemotron_h_omni": lambda base: base.vision_model.encoder.layer[-1],
}
"""The module whose output are the last states in which patches, or queries of a resampler, stand
apart."""
RESAMPLED = ("blip_2", "instructblip", "instructblipvideo", "idefics2", "deepseek_ocr2")

OVERLAP: dict[str, Callable[[Any], list[Any]]] = {
    **dict.fromkeys(
        ("got_ocr2", "pp_chart2table"),
        lambda base: [
            base.vision_tower.neck.conv2,
            base.multi_modal_projector.conv_upsampler1,
            base.multi_modal_projector.conv_upsampler2,
        ],
    ),
    "step3p7": lambda base: [base.vision_model.downsampler1, base.vision_model.downsampler2],
}
"""The convolutions that read more than the patches of a token."""

HERE = [name for name in LAST if name in FAMILIES and name not in REFUSED]


@dataclass(frozen=True)
class Asks(Probe):
    """Keeps all, and notes what it is shown."""

    needs = frozenset({"encoder"})

    def select(self, tokens: VisionTokens) -> Selection:
        SHOWN.append(tokens)
        return Selection(torch.arange(len(tokens)))


SHOWN: list[VisionTokens] = []


def states_by_gradient(name: str, model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """For each token of the batch that the tower makes, the mean state of the patches on which it
    depends, in the order in which the model makes tokens."""
    made: list[Tensor] = []
    used = uses_by_gradient(name, model, batch, made)
    states = torch.cat([own.detach().reshape(-1, own.shape[-1]) for own in made])
    return [states[own].mean(0) for own in used]


def uses_by_gradient(
    name: str, model: Any, batch: dict[str, Tensor], made: list[Tensor] | None = None
) -> list[Tensor]:
    """For each token of the batch that the tower makes, which of its last states the token depends
    on: (all states,) bool. The states are appended to `made`. Separators, which depend on none, are
    left out."""
    made = [] if made is None else made
    features: list[Tensor] = []

    def note(module: Any, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        made.append(states if states.requires_grad else states.requires_grad_())

    base = model.model if hasattr(model, "model") else model
    names = [n for n in ("get_image_features", "get_video_features") if hasattr(base, n)]

    def noting(original: Callable[..., Any]) -> Callable[..., Any]:
        def encode(*args: Any, **kwargs: Any) -> Any:
            before = len(features)
            out = original(*args, **kwargs)
            found = out.pooler_output if hasattr(out, "pooler_output") else out[1]
            if len(features) == before:  # it did not call the other one
                features.extend(out.last_hidden_state if found is None else found)
            return out

        return encode

    handle = LAST[name](base).register_forward_hook(note)
    overlap = OVERLAP.get(name, lambda base: [])(base)
    for entry in names:
        setattr(base, entry, noting(getattr(base, entry)))
    uses = []
    with cut_to_strides(overlap):
        try:
            model(**batch)
        finally:
            handle.remove()
            for entry in names:
                delattr(base, entry)
        for token in torch.cat([own.reshape(-1, own.shape[-1]) for own in features]):
            grads = torch.autograd.grad(token.sum(), made, retain_graph=True, allow_unused=True)
            found = [
                torch.zeros(states.shape[:-1], dtype=torch.bool).flatten()
                if grad is None
                else grad.reshape(-1, grad.shape[-1]).abs().sum(1) > 0
                for states, grad in zip(made, grads, strict=True)
            ]
            uses.append(torch.cat(found))
    return [own for own in uses if own.any()]


@contextmanager
def cut_to_strides(convolutions: list[Any]) -> Iterator[None]:
    """Context in which convolutions read, of each place of theirs, the square that starts at it and
    is as wide as their stride: no two read the same."""
    before = [convolution.weight.data for convolution in convolutions]
    for convolution in convolutions:
        kept = torch.zeros_like(convolution.weight)
        square = tuple(
            slice(start, start + stride)
            for start, stride in zip(convolution.padding, convolution.stride, strict=True)
        )
        kept[..., square[0], square[1]] = convolution.weight.data[..., square[0], square[1]]
        convolution.weight.data = kept
    try:
        yield
    finally:
        for convolution, weight in zip(convolutions, before, strict=True):
            convolution.weight.data = weight


@pytest.mark.parametrize("kind", ["one", "images", "video"])
@pytest.mark.parametrize("name", HERE)
def test_a_token_is_shown_the_mean_of_its_patches(name: str, kind: str) -> None:
    family = FAMILIES[name]
    attention = family.attentions[-1]
    if (reason := skip_reason(name, kind, attention, "forward")) is not None:
        pytest.skip(reason)
    model, rows = shared(name, attention), rows_of(name, kind)
    batch = family.collate(rows)
    SHOWN.clear()
    with vtc.patch(model, Asks()), torch.no_grad():
        model(**batch)
    expected = states_by_gradient(name, model, batch)
    found = torch.cat([tokens.encoder for tokens in SHOWN])
    assert len(found) == sum(len(image.index) for row in rows for image in images_of(family, row))
    assert len(expected) == len(found)
    # Tiles are joined in another order than they are made in, and clips are made after images.
    expected_rows = torch.stack(expected)
    near = torch.cdist(found.double(), expected_rows.double())
    if name not in ("internvl", "qianfan_ocr") and kind != "video":
        assert (found - expected_rows).abs().max() < 1e-5
    assert near.min(1).values.max() < 1e-4
    assert near.argmin(1).unique().numel() == len(found)
    for tokens in SHOWN:
        assert tokens.project is None
        rows_, contents = tokens.mergeable
        assert rows_ is tokens.features
        assert contents(rows_) is rows_


@pytest.mark.filterwarnings("ignore:.*positions='contiguous'")
@pytest.mark.parametrize("method", ["visionzip", "prumerge", "prumerge_plus", "scope", "vispruner"])
@pytest.mark.parametrize("name", HERE)
def test_methods_that_merge_patches_merge_features_there(name: str, method: str) -> None:
    family = FAMILIES[name]
    attention = family.attentions[-1]
    batch = family.collate(rows_of(name, "one"))
    with vtc.patch(shared(name, attention), method) as patch, torch.no_grad():
        assert patch.model(**batch).logits.isfinite().all()
    assert patch.report.tokens_out < patch.report.tokens_in


MAKERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "fast_vlm": lambda base, states: base.multi_modal_projector(states),
    "gemma3n": lambda base, states: base.embed_vision(inputs_embeds=states),
}
"""What makes features of states, of convolutional towers."""


@pytest.mark.parametrize("kind", ["one", "images"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_token_is_shown_the_feature_map_at_its_place(name: str, kind: str) -> None:
    family = FAMILIES[name]
    model, batch = shared(name, family.attentions[-1]), family.collate(rows_of(name, kind))
    SHOWN.clear()
    with vtc.patch(model, Asks()), torch.no_grad():
        model(**batch)
        assert SHOWN
        for tokens in SHOWN:
            made = MAKERS[name](model.model, tokens.encoder[None])[0]
            assert (made - tokens.features).abs().max() < 1e-5
    with vtc.patch(model, "mmtok") as patch, torch.no_grad():
        assert patch.model(**batch).logits.isfinite().all()
    assert patch.report.tokens_out < patch.report.tokens_in
    if name == "gemma3n":
        with pytest.raises(vtc.UnsupportedModelError, match="no attention and no keys"):
            vtc.patch(model, "scope")
