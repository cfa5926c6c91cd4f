# SPDX-License-Identifier: Apache-2.0
"""Modules that are put in the place of others after `vtc.patch`, as adapters do: what is looked up
at every call is followed, what was hooked is refused."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import vtc
from tests.reference.families import FAMILIES
from tests.reference.models import build_model, collate, samples
from tests.runtime.test_exactness import difference
from vtc.core import Method

READERS: list[Method] = [
    vtc.VisionZip(keep=9),
    vtc.PruMerge(),
    vtc.SCOPE(keep=9),
    vtc.VisPruner(keep=9),
    vtc.MMTok(keep=9),
    vtc.ToDRE(keep=9, second_stage=False),
    vtc.ToMe(keep=9),
    vtc.FlowCut(keep=9),
    vtc.Downsample(keep=9, how="pixels"),
    vtc.DivPrune(keep=9),
]
BETWEEN: list[Method] = [vtc.FastV(keep=9, layer=2), vtc.TransPrune()]


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    return model(**collate(samples("ragged", "clip"))).logits


def _adapted(model: Any, saved: str) -> Any:
    """`model` with LoRA, whose module `saved` is replaced by a copy that learns."""
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[saved], r=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = peft.get_peft_model(model, config)
    with torch.no_grad():  # as after some training
        for name, parameter in found.named_parameters():
            if "modules_to_save" in name or "lora_B" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return found.eval()


@pytest.mark.parametrize("saved", ["multi_modal_projector", "vision_tower", "lm_head"])
@pytest.mark.parametrize("method", READERS, ids=lambda method: method.name)
def test_what_lora_saves_is_followed(method: Method, saved: str) -> None:
    """As if LoRA had been there before the patch, and the plain model is intact afterwards."""
    first = build_model("clip", "llama")
    adapted = _adapted(first, saved)
    plain = _logits(adapted)
    with vtc.patch(adapted, method):
        expected = _logits(adapted)
    assert difference(expected, plain) > 0.1

    second = build_model("clip", "llama")
    patch = vtc.patch(second, method)
    _logits(second)
    adapted = _adapted(second, saved)
    assert torch.equal(_logits(adapted), expected)
    patch.unpatch()
    assert torch.equal(_logits(adapted), plain)


REPLACED = {
    "base model": "model",
    "language model": "model.language_model",
    "decoder layer 1": "model.language_model.layers.1",
    "self_attn of decoder layer 1": "model.language_model.layers.1.self_attn",
}


@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.parametrize("method", BETWEEN, ids=lambda method: method.name)
def test_what_was_hooked_is_refused(method: Method, name: str) -> None:
    model = build_model("clip", "llama")
    plain = _logits(model)
    patch = vtc.patch(model, method)
    expected = _logits(model)
    where, _, last = REPLACED[name].rpartition(".")
    parent = model.get_submodule(where)
    original = getattr(parent, last)
    if last == "1":
        parent[1] = copy.deepcopy(original)  # type: ignore[index]
    else:
        setattr(parent, last, copy.deepcopy(original))
    with pytest.raises(RuntimeError, match=rf"{name}.*not the one that was patched"):
        _logits(model)
    with pytest.raises(RuntimeError, match=r"unpatch before modules are replaced"):
        model.generate(**collate(samples("one", "clip")), max_new_tokens=2)
    if last == "1":
        parent[1] = original  # type: ignore[index]
    else:
        setattr(parent, last, original)
    assert torch.equal(_logits(model), expected)
    patch.unpatch()
    assert torch.equal(_logits(model), plain)


def test_decoder_layers_that_were_taken_out_are_noticed() -> None:
    model = build_model("clip", "llama")
    with vtc.patch(model, vtc.DivPrune(keep=9)):
        _logits(model)
        model.model.language_model.layers = nn.ModuleList(model.model.language_model.layers[:4])
        with pytest.raises(RuntimeError, match=r"number of decoder layers \(4\)"):
            _logits(model)


def test_cross_attention_models_notice_as_well() -> None:
    family = FAMILIES["mllama"]
    model: Any = family.build("sdpa")
    batch = family.collate(family.rows("one"))
    with vtc.patch(model, vtc.DivPrune(keep=9)), torch.no_grad():
        model(**batch)
        layers = model.model.language_model.layers
        layers[2] = copy.deepcopy(layers[2])
        with pytest.raises(RuntimeError, match=r"decoder layer 2.*not the one that was patched"):
            model(**batch)


def test_a_compiled_decoder_is_the_same_decoder() -> None:
    """`torch.compile` puts a module around the one that was patched."""
    model = build_model("clip", "llama")
    with vtc.patch(model, vtc.FastV(keep=9, layer=2)):
        expected = _logits(model)
        inner = model.model.language_model
        model.model.language_model = torch.compile(inner, backend="eager")
        torch.testing.assert_close(_logits(model), expected)
        model.model.language_model = inner
    model.model.language_model = torch.compile(inner, backend="eager")
    with vtc.patch(model, vtc.FastV(keep=9, layer=2)):
        torch.testing.assert_close(_logits(model), expected)


@pytest.mark.parametrize("name", ["llava", "mllama"])
def test_a_base_model_that_runs_alone_notices_as_well(name: str) -> None:
    family = FAMILIES["mllama"]
    model: Any = family.build("sdpa") if name == "mllama" else build_model("clip", "llama")
    rows = family.collate(family.rows("one"))
    batch = rows if name == "mllama" else collate(samples("one", "clip"))
    with vtc.patch(model, vtc.DivPrune(keep=9)), torch.no_grad():
        model.model(**batch)
        layers = model.model.language_model.layers
        layers[2] = copy.deepcopy(layers[2])
        with pytest.raises(RuntimeError, match=r"decoder layer 2.*not the one that was patched"):
            model.model(**batch)


@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("method", READERS[:6], ids=str)
def test_a_tower_of_another_depth_is_followed(method: Method, layers: int) -> None:
    """Layers count from the end, or by a fraction, of the tower that runs."""
    model = build_model("clip", "llama")
    tower = model.model.vision_tower
    config = copy.deepcopy(tower.config)
    config.num_hidden_layers = layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other = type(tower)(config).eval()
    with vtc.patch(model, method):
        model.model.vision_tower = other
        found = _logits(model)
    with vtc.patch(model, method):
        assert torch.equal(found, _logits(model))
