# SPDX-License-Identifier: Apache-2.0
"""Patch states of towers whose patches are joined into tokens: a token is shown their mean.

Which patches a token has is found by gradients through the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable
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
}
"""The module whose output are the last states in which patches stand apart."""

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
    features: list[Tensor] = []

    def note(module: Any, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        made.append(states if states.requires_grad else states.requires_grad_())

    base = model.model if hasattr(model, "model") else model
    original = base.get_image_features

    def encode(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        found = out.pooler_output if hasattr(out, "pooler_output") else out[1]
        features.extend(found)
        return out

    handle = LAST[name](base).register_forward_hook(note)
    base.get_image_features = encode
    try:
        model(**batch)
    finally:
        handle.remove()
        del base.get_image_features
    means = []
    for token in torch.cat([own.reshape(-1, own.shape[-1]) for own in features]):
        grads = torch.autograd.grad(token.sum(), made, retain_graph=True, allow_unused=True)
        for states, grad in zip(made, grads, strict=True):
            if grad is not None and bool(grad.any()):
                used = grad.reshape(-1, grad.shape[-1]).abs().sum(1) > 0
                means.append(states.detach().reshape(-1, grad.shape[-1])[used].mean(0))
                break
    return means


@pytest.mark.parametrize("kind", ["one", "images"])
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
    # Tiles are joined in another order than they are made in.
    expected_rows = torch.stack(expected)
    near = torch.cdist(found.double(), expected_rows.double())
    if name not in ("internvl", "qianfan_ocr"):
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
