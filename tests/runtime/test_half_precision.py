# SPDX-License-Identifier: Apache-2.0
"""In half precision a sample is shown to methods, and chosen from, in a batch as it is alone.

Near ties abound there, and a tower or projector that rounded otherwise for three images than for
one would turn them. That the plain model's decoder rounds padded rows otherwise is its own doing:
of what methods read between layers, the same tensors are held to give the same choice.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtc
from tests.reference.models import Sample, build_model, collate, make_sample
from tests.reference.probes import Spy
from tests.runtime.test_exactness import METHODS
from vtc.core import Selection, VisionTokens
from vtc.core.spec import parse_method
from vtc.ops import greedy
from vtc.runtime.hf import taps

HALF = [torch.float16, torch.bfloat16]
LAYOUTS = ((1, "image", 9), (4, "image", 3), (2, "image", 6))
STAGES = {name: made().stages for name, made in METHODS.items() if len(made().parts) == 1}
IN_SEQUENCE = sorted(name for name, stages in STAGES.items() if "sequence" in stages)
CHOOSING = sorted(name for name, stages in STAGES.items() if {"sequence", "layers"} & {*stages})
Notes = list[tuple[Any, Selection | None]]


@cache
def model_of(tower: str, dtype: torch.dtype) -> nn.Module:
    return build_model(tower, dtype=dtype)


def shown(name: str, tower: str, dtype: torch.dtype, rows: list[Sample]) -> tuple[Tensor, Notes]:
    """Logits, and what the method was shown and answered."""
    batch, spy = collate(rows), Spy(METHODS[name]())
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    with vtc.patch(model_of(tower, dtype), spy) as patch, torch.no_grad():
        logits = patch.model(**batch).logits
    return logits, spy.notes


@cache
def machine_rounds_alike(tower: str, dtype: torch.dtype) -> bool:
    """Whether this machine's products give an image the same bits in a batch as alone, with nothing
    of vtc about: some give others in float16, by how many rows there are."""
    model: Any = model_of(tower, dtype)
    pixels = collate([make_sample(tower, x, 1000 + i) for i, x in enumerate(LAYOUTS)])
    together = pixels["pixel_values"].to(dtype)
    layer = model.config.vision_feature_layer

    def features(images: Tensor) -> Tensor:
        states = model.model.vision_tower(images, output_hidden_states=True).hidden_states[layer]
        return model.model.multi_modal_projector(states.contiguous())

    with torch.no_grad():
        alone = torch.cat([features(image[None].clone()) for image in together])
        return torch.equal(features(together), alone)


def tensors(given: Any) -> dict[str, Tensor]:
    every = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    return {name: value for name, value in every.items() if isinstance(value, Tensor)}


def same(one: Selection | None, other: Selection | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.indices, other.indices)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("name", IN_SEQUENCE)
def test_an_image_is_shown_and_chosen_from_in_a_batch_as_alone(
    name: str, tower: str, dtype: torch.dtype
) -> None:
    if not machine_rounds_alike(tower, dtype):
        pytest.skip(f"this machine's own products in {dtype} depend on the size of a batch")
    rows = [make_sample(tower, layout, 1000 + i) for i, layout in enumerate(LAYOUTS)]
    together = [x for x in shown(name, tower, dtype, rows)[1] if isinstance(x[0], VisionTokens)]
    assert len(together) == len(rows)
    for row, (tokens, chosen) in zip(rows, together, strict=True):
        (alone, own), *_ = shown(name, tower, dtype, [row])[1]
        ours, its = tensors(tokens), tensors(alone)
        assert ours.keys() == its.keys()
        for field, value in ours.items():
            assert torch.equal(value, its[field]), field
        assert same(chosen, own)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", CHOOSING)
def test_the_same_tensors_give_the_same_choice_wherever_they_lie(
    name: str, dtype: torch.dtype
) -> None:
    """As parts of a batch's tensors, with other rows between, and by themselves."""

    def apart(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: apart(of_key) for key, of_key in value.items()}
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        return torch.stack([value, torch.zeros_like(value)], 1)[:, 0]

    rows = [make_sample("clip", layout, 2000 + i) for i, layout in enumerate(LAYOUTS)]
    method, notes = METHODS[name](), shown(name, "clip", dtype, rows)[1]
    assert len(notes) >= len(rows)
    for given, chosen in notes:
        fields = {f.name: apart(getattr(given, f.name)) for f in dataclasses.fields(given)}
        again = method.select if isinstance(given, VisionTokens) else method.prune
        assert same(again(type(given)(**fields)), chosen)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_attention_rows_of_a_sample_are_those_it_has_alone(dtype: torch.dtype) -> None:
    """Also where the probabilities of one sample are few and those of all are many."""
    generator = torch.Generator().manual_seed(0)
    heads, k = 8, 64
    r = taps._AT_ONCE // (heads * k)
    query = torch.randn(3, heads, r, 16, generator=generator).to(dtype)
    key = torch.randn(3, 2, k, 16, generator=generator).to(dtype)
    together = taps.mean_attention(query, key, None, None, taps.Options())
    for i in range(3):
        alone = taps.mean_attention(query[i : i + 1], key[i : i + 1], None, None, taps.Options())
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("method", ["full", "divprune:keep=1.0", "divprune@tile:keep=1.0"])
def test_where_all_is_kept_the_model_rounds_as_it_does_by_itself(method: str) -> None:
    rows = [make_sample("clip", layout, 3000 + i) for i, layout in enumerate(LAYOUTS)]
    batch, model = collate(rows), model_of("clip", torch.bfloat16)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with torch.no_grad():
        plain = model(**batch).logits
        with vtc.patch(model, parse_method(method)):
            assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("name", CHOOSING)
def test_under_autocast_methods_compute_in_their_own_precision(
    name: str, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate's and Trainer's bfloat16 are autocast. Many tokens go other ways on a CPU."""
    if many:
        monkeypatch.setattr(greedy, "_AHEAD_FROM", 1)
    method, spy = METHODS[name](), Spy(METHODS[name]())
    batch = collate([make_sample("clip", layout, 4000 + i) for i, layout in enumerate(LAYOUTS)])
    model = model_of("clip", torch.float32)
    with vtc.patch(model, spy), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    assert spy.notes
    for given, chosen in spy.notes:
        again = method.select if isinstance(given, VisionTokens) else method.prune
        assert same(again(given), chosen)
