# SPDX-License-Identifier: Apache-2.0
"""Every cache that transformers has, under methods that look ahead, and under others: the second
picture on a cache is chosen from as the layers then see it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache, cache_utils
from transformers.cache_utils import Cache, QuantizedLayer

import vtc
from tests.reference.families import FAMILIES
from tests.reference.models import build_model, collate, samples
from tests.reference.probes import Probe, Ragged, Stairs
from tests.runtime.test_exactness import TOLERANCE, difference, generate, new_words, steps_of
from tests.runtime.test_families import shared
from vtc.core import LayerState, Method, Rows, Selection

ROOM = 320
GPU = torch.cuda.is_available()


class _Exact(QuantizedLayer):
    """Quantizes in name only, so that what comes of it can be told exactly."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.clone()

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor


class _Rounded(_Exact):
    """Quantizes to steps that are the same for all."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return (tensor * 8).round() / 8


class _OwnQuantized(QuantizedCache):
    def __init__(self, layer: type[QuantizedLayer], config: Any, residual: int) -> None:
        count = config.get_text_config().num_hidden_layers
        Cache.__init__(self, layers=[layer(residual_length=residual) for _ in range(count)])


def _fp8(config: Any) -> Cache:
    layer = getattr(cache_utils, "Fp8QuantizedLayer", None)
    if layer is None:
        pytest.skip("this transformers has no fp8 cache")
    return Cache(layers=[layer() for _ in range(config.get_text_config().num_hidden_layers)])


def _backend(name: str, package: str) -> Callable[[Any], Cache]:
    def make(config: Any) -> Cache:
        if importlib.util.find_spec(package.split(".")[0]) is None:
            pytest.skip(f"needs {package}")
        return QuantizedCache(name, config.get_text_config(), q_group_size=8)

    return make


def _offloaded(make: Callable[..., Cache]) -> Callable[[Any], Cache]:
    def made(config: Any) -> Cache:
        if not GPU:
            pytest.skip("caches are offloaded from a GPU only")
        return make(config)

    return made


EXACT: dict[str, Callable[[Any], Cache]] = {
    "dynamic": lambda config: DynamicCache(),
    "configured": lambda config: DynamicCache(config=config.get_text_config()),
    "static": lambda config: StaticCache(config=config.get_text_config(), max_cache_len=ROOM),
    "quantized": lambda config: _OwnQuantized(_Exact, config, 128),
    "quantized at once": lambda config: _OwnQuantized(_Exact, config, 4),
    "offloaded": _offloaded(
        lambda config: DynamicCache(config=config.get_text_config(), offloading=True)
    ),
    "static offloaded": _offloaded(
        lambda config: StaticCache(
            config=config.get_text_config(), max_cache_len=ROOM, offloading=True
        )
    ),
}
ROUNDING: dict[str, Callable[[Any], Cache]] = {
    "rounded": lambda config: _OwnQuantized(_Rounded, config, 4),
    "fp8": _fp8,
    "quanto": _backend("quanto", "optimum.quanto"),
    "hqq": _backend("hqq", "hqq"),
}
METHODS: dict[str, Callable[[], Method]] = {
    "pyramiddrop": lambda: vtc.PyramidDrop(keep=0.4),
    "stairs": Stairs,
    "ragged|stairs": lambda: Ragged() | Stairs(positions="contiguous"),
    "fastv": lambda: vtc.FastV(keep=0.5),
}


@dataclass(frozen=True)
class Foresees(Probe):
    """Looks ahead at a layer before which it drops nothing, and again once that layer ran."""

    notes: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False)

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        return (2, 3)

    def peeks(self, num_layers: int) -> dict[int, Rows]:
        return {2: "vision_text"}

    def taps(self, num_layers: int) -> dict[int, Rows]:
        return {2: "vision_text"}

    def prune(self, state: LayerState) -> Selection | None:
        if state.layer == 2:
            assert state.ahead is not None
            return Selection(torch.arange(len(state.vision)), memory=state.ahead)
        self.notes.append((state.memory, state.attention[2]))
        return Selection(torch.arange(0, len(state.vision), 2))


def two_turns(model: Any, batch: dict[str, Tensor], cache: Cache, words: int = 6) -> Tensor:
    """Logits of a second picture, asked about after `words` more words on the cache of a first."""
    device = model.device
    batch = {name: value.to(device) for name, value in batch.items()}
    rows = len(batch["input_ids"])
    with torch.no_grad():
        model(**batch, past_key_values=cache, use_cache=True)
        for i in range(words):
            model(input_ids=new_words(rows, 1, i).to(device), past_key_values=cache)
        again = {**batch, "pixel_values": batch["pixel_values"].flip(-1)}
        before = torch.ones(rows, words, dtype=torch.long, device=device)
        mask = batch["attention_mask"]
        again["attention_mask"] = torch.cat([mask, before, mask], dim=1)
        return model(**again, past_key_values=cache).logits[mask.bool()].cpu()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("rows", ["one", "ragged"])
def test_a_second_picture_is_chosen_from_alike(rows: str, kind: str, method: str) -> None:
    model, batch = build_model(), collate(samples(rows, "clip"))
    cache = EXACT[kind](model.config)
    model.to("cuda" if "offloaded" in kind else "cpu")
    with vtc.patch(model, METHODS[method]()):
        expected = two_turns(model, batch, DynamicCache())
        found = two_turns(model, batch, cache)
    assert difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("words", [0, 6, 40])
@pytest.mark.parametrize("kind", [*EXACT, *ROUNDING])
def test_looking_ahead_sees_what_the_layer_then_sees(kind: str, words: int) -> None:
    """Also where the cache rounds its keys, and whatever it has moved meanwhile."""
    model, looks = build_model(), Foresees()
    cache = {**EXACT, **ROUNDING}[kind](model.config)
    model.to("cuda" if "offloaded" in kind else "cpu")
    with vtc.patch(model, Ragged() | looks):
        two_turns(model, collate(samples("one", "clip")), cache, words)
    assert len(looks.notes) == 2
    for ahead, ran in looks.notes:
        assert difference(ahead, ran) < 1e-5
    assert looks.notes[1][1].std() > 1e-3


@pytest.mark.parametrize("kind", ["configured", "static"])
@pytest.mark.parametrize("name", ["gemma3_short", "gemma3", "llama4_short", "aya_vision_short"])
def test_looking_ahead_in_layers_with_a_window(name: str, kind: str) -> None:
    """The first keys are gone by the second picture, or are not yet."""
    model = shared(name, "eager")
    looks = Foresees()
    batch = FAMILIES[name].collate(FAMILIES[name].rows("one"))
    with vtc.patch(model, Ragged() | looks):
        two_turns(model, batch, EXACT[kind](model.config), 20)
    for ahead, ran in looks.notes:
        assert difference(ahead, ran) < 1e-5


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["static", "quantized", "quantized at once"])
def test_decoding_on_every_cache(kind: str, method: str, beams: int) -> None:
    model, batch = build_model(), collate(samples("ragged", "clip"))
    with vtc.patch(model, METHODS[method]()):
        expected = generate(model, batch, num_beams=beams)
        cache = EXACT[kind](model.config)
        found = generate(model, batch, num_beams=beams, past_key_values=cache)
    assert torch.equal(found.sequences, expected.sequences)
    assert difference(steps_of(found), steps_of(expected)) < TOLERANCE
