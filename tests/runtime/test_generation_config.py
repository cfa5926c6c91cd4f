# SPDX-License-Identifier: Apache-2.0
"""`generate` may be told a thing in three places: as an argument, by name or in its place, in a
configuration, and in the model's own; and decoding with guessed tokens, in all of these ways."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

import vtc
from tests.reference.families import FAMILIES
from tests.reference.models import build_model, collate, samples, shared_model
from tests.reference.probes import Nothing, Ragged, Stairs
from tests.runtime.test_exactness import TOLERANCE, difference, generate, steps_of
from tests.runtime.test_families import shared
from vtc.core import Method

NEW = 8
FASTV = vtc.FastV(keep=0.3, layer=2)


def asked_by(model: Any, batch: dict[str, Tensor], where: str, **settings: Any) -> Tensor:
    """`generate`, told `settings` in one of the places where it takes them."""
    batch = dict(batch)
    plain = {"max_new_tokens": 2, "do_sample": False}
    if where == "argument":
        return model.generate(**batch, **plain, **settings)
    if where == "configuration":
        return model.generate(**batch, generation_config=GenerationConfig(**plain, **settings))
    if where == "position":
        ids = batch.pop("input_ids")
        return model.generate(ids, GenerationConfig(**plain, **settings), **batch)
    own = model.generation_config
    try:
        model.generation_config = copy.deepcopy(own)
        model.generation_config.update(**settings)
        if where == "own, beside one":
            return model.generate(**batch, generation_config=GenerationConfig(**plain))
        return model.generate(**batch, **plain)
    finally:
        model.generation_config = own


PLACES = ("argument", "configuration", "position", "own", "own, beside one")
REFUSED = {
    "prefill_chunk_size": 8,
    "assistant_early_exit": 2,
    "use_mtp": True,
    "speculation_type": "dflash",
}


@pytest.mark.parametrize("setting", REFUSED)
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("name", ["vipllava", "qwen2_vl"])
def test_refusals_hold_wherever_it_is_said(name: str, where: str, setting: str) -> None:
    if setting == "speculation_type" and not hasattr(GenerationConfig(), setting):
        pytest.skip("this transformers has no such setting")
    family = FAMILIES[name]
    batch = family.collate(family.rows("one"))
    with vtc.patch(shared(name, "sdpa"), Ragged()) as patch:
        with pytest.raises(ValueError, match=setting):
            asked_by(patch.model, batch, where, **{setting: REFUSED[setting]})
        assert patch.report.prefills == []


@pytest.mark.parametrize("setting", ["prefill_chunk_size", "prompt_lookup_num_tokens"])
@pytest.mark.parametrize("where", PLACES)
def test_refusals_hold_where_vision_is_read_by_other_layers(where: str, setting: str) -> None:
    from tests.runtime import test_mllama as mllama

    batch = mllama.FAMILY.collate(mllama.rows_of("one"))
    with (
        vtc.patch(mllama.shared("sdpa"), Ragged()) as patch,
        pytest.raises(ValueError, match=setting),
    ):
        asked_by(patch.model, batch, where, **{setting: 4})


def test_what_is_said_last_counts() -> None:
    """An argument overrules a configuration, even with `None`."""
    batch = collate(samples("one", "clip"))
    with vtc.patch(build_model(), FASTV) as patch:
        expected = asked_by(patch.model, batch, "argument")
        patch.model.generation_config.prefill_chunk_size = 8
        found = asked_by(patch.model, batch, "argument", prefill_chunk_size=None)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("where", PLACES)
def test_text_may_come_in_pieces(where: str) -> None:
    batch = collate(samples("text", "clip"))
    model = shared_model("clip+llama", "sdpa")
    expected = asked_by(model, batch, "argument")
    with vtc.patch(model, FASTV):
        assert torch.equal(asked_by(model, batch, where, prefill_chunk_size=4), expected)


# ---- guessed tokens -----------------------------------------------------------------------------
def echoing(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`batch` with text at its end that repeats itself, so that a look-up guesses at once."""
    ids = batch["input_ids"].clone()
    ids[:, -3:] = ids[:, -1:]
    return {**batch, "input_ids": ids}


@contextmanager
def first_widths(model: Any) -> Iterator[list[int]]:
    """Widths of what enters the base model, forward by forward."""
    seen: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("input_ids")
        seen.append(0 if given is None else given.shape[1])

    handle = model.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def assert_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    assert difference(steps_of(found), steps_of(expected)) < TOLERANCE


METHODS: dict[str, Callable[[], Method]] = {
    "full": vtc.Full,
    "whole": lambda: vtc.Random(keep=1.0),
    "nothing": Nothing,
    "ragged": Ragged,
    "contiguous": lambda: Ragged(positions="contiguous"),
    "text": lambda: vtc.CDPruner(keep=0.3),
    "fastv": lambda: FASTV,
    "todre": lambda: vtc.ToDRE(keep=0.3, tau=2.0),
    "transprune": vtc.TransPrune,
    "stairs": Stairs,
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["one", "images"])
def test_a_look_up_decodes_as_without(name: str, kind: str) -> None:
    """The same tokens, though the first guesses come with the prompt: no method takes them for
    part of it, and those that were wrong leave the cache."""
    batch = echoing(collate(samples(kind, "clip")[:1]))
    model = shared_model("clip+llama", "sdpa")
    with vtc.patch(model, METHODS[name]()):
        expected = generate(model, batch, max_new_tokens=NEW)
        with first_widths(model) as widths:
            found = generate(model, batch, max_new_tokens=NEW, prompt_lookup_num_tokens=3)
    assert widths[0] > batch["input_ids"].shape[1]
    assert_same(found, expected)


@pytest.mark.parametrize("where", PLACES)
def test_a_look_up_is_seen_wherever_it_is_said(where: str) -> None:
    batch = echoing(collate(samples("one", "clip")))
    with vtc.patch(build_model(), FASTV) as patch:
        expected = asked_by(patch.model, batch, "argument")
        with first_widths(patch.model) as widths:
            found = asked_by(patch.model, batch, where, prompt_lookup_num_tokens=3)
        kept = [prefill.samples[0].images for prefill in patch.report.prefills]
    assert widths[0] > batch["input_ids"].shape[1]
    assert torch.equal(found, expected)
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    "name", ["llava_onevision", "qwen2_vl", "qwen3_vl", "gemma3", "gemma4", "llama4", "idefics3"]
)
def test_a_look_up_decodes_as_without_in_every_kind_of_model(name: str) -> None:
    """m-RoPE, deepstack, both directions, windows, shared keys, chunks, tiles."""
    family = FAMILIES[name]
    model, batch = shared(name, family.attentions[-1]), family.collate(family.rows("images")[:1])
    batch = echoing(batch)
    for method in (Ragged(), vtc.Random(keep=0.5) | vtc.FastV(keep=3, layer=2)):
        with vtc.patch(model, method):
            expected = generate(model, batch, max_new_tokens=NEW)
            found = generate(model, batch, max_new_tokens=NEW, prompt_lookup_num_tokens=3)
        assert_same(found, expected)


@pytest.mark.parametrize("assistant", ["plain", "patched", "itself"])
@pytest.mark.parametrize("method", ["ragged", "text", "fastv"])
def test_an_assistant_decodes_as_without(method: str, assistant: str) -> None:
    batch, model, helper = collate(samples("one", "clip")), build_model(), build_model()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for weight in helper.parameters():  # right at times
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    if assistant == "patched":
        vtc.patch(helper, vtc.FastV(keep=2, layer=1))
    with vtc.patch(model, METHODS[method]()):
        expected = generate(model, batch, max_new_tokens=NEW)
        helps = model if assistant == "itself" else helper
        found = generate(model, batch, max_new_tokens=NEW, assistant_model=helps)
    assert_same(found, expected)


def test_a_patched_assistant_of_a_plain_model() -> None:
    batch, model = collate(samples("one", "clip")), shared_model("clip+llama", "sdpa")
    expected = generate(model, batch, max_new_tokens=NEW)
    with vtc.patch(build_model(), FASTV) as patch:
        found = generate(model, batch, max_new_tokens=NEW, assistant_model=patch.model)
    assert_same(found, expected)


@pytest.mark.parametrize("method", ["ragged", "contiguous", "fastv"])
def test_text_after_the_images_can_be_taken_back(method: str) -> None:
    """Of a cache, right after the prompt; what stays is what a shorter prompt would have left."""
    (row,) = samples("one", "clip")
    batch, model = collate([row]), shared_model("clip+llama", "sdpa")
    word = torch.tensor([[9]])
    with vtc.patch(model, METHODS[method]()), torch.no_grad():
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -4:] = batch["input_ids"][:, -4:]  # the prompt that methods see ends before
        cache = model(**batch, labels=labels, use_cache=True).past_key_values
        short = {name: value[:, :-4] for name, value in batch.items() if name != "pixel_values"}
        short["pixel_values"] = batch["pixel_values"]
        other = model(**short, use_cache=True).past_key_values
        cache.crop(-4)
        found = model(input_ids=word, past_key_values=cache).logits
        assert difference(found, model(input_ids=word, past_key_values=other).logits) < TOLERANCE
        with pytest.raises(ValueError, match="tokens_to_remove"):
            cache.crop(-(int(cache.get_seq_length()) - 4))
