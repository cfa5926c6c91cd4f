# SPDX-License-Identifier: Apache-2.0
"""Calls of a patched model within a call of it: each is what it is alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

import vtc
from tests.reference.families import FAMILIES
from tests.reference.models import IMAGE, build_model, collate, make_sample
from tests.runtime.test_exactness import some_now
from tests.runtime.test_families import shared
from vtc.core import Method

METHODS: dict[str, Callable[[], Method]] = {
    "divprune": lambda: vtc.DivPrune(keep=4),
    "cdpruner": lambda: vtc.CDPruner(keep=4),
    "todre": lambda: vtc.ToDRE(keep=6),
    "fastv": lambda: vtc.FastV(keep=4),
    "pyramiddrop": lambda: vtc.PyramidDrop(),
    "tome": lambda: vtc.ToMe(keep=0.4),
}


class Calls(LogitsProcessor):
    """Calls `ask` at every step, and leaves the scores alone."""

    def __init__(self, ask: Callable[[Tensor], Any]) -> None:
        self.ask = ask
        self.found: list[Any] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.found.append(self.ask(input_ids))
        return scores


class Stops(StoppingCriteria):
    """Calls `ask` at every step, and stops nothing."""

    def __init__(self, ask: Callable[[Tensor], Any]) -> None:
        self.ask = ask
        self.found: list[Any] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.found.append(self.ask(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model("clip", "llama")


def outer() -> dict[str, Tensor]:
    return collate([make_sample("clip", (2, "image", 7), 1)])


def inner() -> dict[str, Tensor]:
    return collate([make_sample("clip", (3, "image", 4), 2)])


def logits_of(model: Any, batch: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, **more).logits


def generate(model: Any, batch: dict[str, Tensor], **more: Any) -> tuple[Tensor, Tensor]:
    settings = {"max_new_tokens": 4, "do_sample": False, **more}
    out = model.generate(**batch, **settings, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return all(map(equal, a, b))
    return bool(torch.equal(a, b))


ASKS: dict[str, Callable[[Any], Any]] = {
    "forward": lambda m: logits_of(m, inner()),
    "uncached": lambda m: logits_of(m, inner(), use_cache=False),
    "base": lambda m: m.model(**inner(), use_cache=False).last_hidden_state.detach(),
    "labels": lambda m: logits_of(m, inner(), labels=_labels()),
    "text": lambda m: logits_of(m, collate([make_sample("clip", (5,), 3)])),
    "generate": lambda m: generate(m, inner()),
    "generate_uncached": lambda m: generate(m, inner(), use_cache=False),
    "beams": lambda m: generate(m, inner(), use_cache=False, num_beams=2)[0],
    "features": lambda m: m.get_image_features(inner()["pixel_values"]).pooler_output[0].detach(),
}


def _labels() -> Tensor:
    labels = inner()["input_ids"].clone()
    labels[:, :-2] = -100
    return labels


@pytest.mark.parametrize(
    ("method", "ask", "outer_cache", "how"),
    some_now(11, METHODS, ASKS, (True, False), ("logits_processor", "stopping_criteria")),
)
def test_calls_within_generate(
    model: Any, method: str, ask: str, outer_cache: bool, how: str
) -> None:
    settings: dict[str, Any] = {"use_cache": outer_cache}
    if not outer_cache:
        settings["num_beams"] = 2  # whose features are repeated, and found by what was seen
    with vtc.patch(model, METHODS[method]()) as patch:
        alone, around = ASKS[ask](model), generate(model, outer(), **settings)
        kind: Any = Calls if how == "logits_processor" else Stops
        calls = kind(lambda _: ASKS[ask](model))
        found = generate(model, outer(), **settings, **{how: [calls]})
        assert patch._bound.forward is None
    assert equal(found, around)
    assert len(calls.found) >= 3
    assert all(equal(call, alone) for call in calls.found)


def test_contrast_with_another_picture(model: Any) -> None:
    """The same tokens with another picture, as contrastive decoding has it: no step of `generate`,
    whether or not it prepares its inputs as one."""
    other = inner()["pixel_values"]

    def ask(ids: Tensor) -> Tensor:
        return logits_of(model, {"input_ids": ids, "pixel_values": other}, use_cache=False)

    def prepared(ids: Tensor) -> Tensor:
        given = model.prepare_inputs_for_generation(
            ids, pixel_values=other, use_cache=False, is_first_iteration=True
        )
        return logits_of(model, given)

    for method in METHODS.values():
        with vtc.patch(model, method()):
            around = generate(model, outer(), use_cache=False)
            for call in (ask, prepared):
                calls = Calls(lambda ids, call=call: (ids.clone(), call(ids)))
                found = generate(model, outer(), use_cache=False, logits_processor=[calls])
                assert equal(found, around)
                for ids, logits in calls.found:
                    assert torch.equal(ask(ids), logits)


@pytest.mark.parametrize("where", ["vision_tower", "language_model.layers.1", "language_model"])
@pytest.mark.parametrize("method", METHODS)
def test_calls_within_a_forward(model: Any, method: str, where: str) -> None:
    """By a hook, in the middle of the tower or of the decoder."""
    with vtc.patch(model, METHODS[method]()):
        alone, around = logits_of(model, inner()), logits_of(model, outer())
        found: list[Tensor] = []
        busy: list[bool] = []

        def ask(*_: Any) -> None:
            if not busy:
                busy.append(True)
                found.append(logits_of(model, inner()))
                busy.clear()

        handle = model.model.get_submodule(where).register_forward_pre_hook(ask)
        within = logits_of(model, outer())
        handle.remove()
    assert torch.equal(within, around)
    assert len(found) == 1
    assert torch.equal(found[0], alone)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_processor_that_asks_in_another_thread(model: Any, method: str, use_cache: bool) -> None:
    def ask(_: Tensor) -> Tensor:
        answer: list[Tensor] = []
        thread = threading.Thread(
            target=lambda: answer.append(logits_of(model, inner())), daemon=True
        )
        thread.start()
        thread.join(60)
        return answer[0]

    with vtc.patch(model, METHODS[method]()):
        alone, around = logits_of(model, inner()), generate(model, outer(), use_cache=use_cache)
        calls = Calls(ask)
        found = generate(model, outer(), use_cache=use_cache, logits_processor=[calls])
    assert equal(found, around)
    assert all(torch.equal(call, alone) for call in calls.found)


@pytest.mark.parametrize("use_cache", [True, False])
def test_mllama(use_cache: bool) -> None:
    family = FAMILIES["mllama"]
    model = shared("mllama", "sdpa")
    first, second = (family.collate([row]) for row in family.rows("ragged")[:2])
    with vtc.patch(model, vtc.CDPruner(keep=0.3)):
        asks: list[Callable[[Any], Any]] = [
            lambda _: logits_of(model, second, use_cache=False),
            lambda _: generate(model, second, use_cache=False),
            lambda _: generate(model, second),
        ]
        around = generate(model, first, use_cache=use_cache)
        for ask in asks:
            alone, calls = ask(None), Calls(ask)
            found = generate(model, first, use_cache=use_cache, logits_processor=[calls])
            assert equal(found, around)
            assert all(equal(call, alone) for call in calls.found)


# ---- patches that come and go meanwhile ---------------------------------------------------------
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_disabled_within_generate(model: Any, method: str, use_cache: bool) -> None:
    plain = logits_of(model, inner())
    with vtc.patch(model, METHODS[method]()) as patch:
        around = generate(model, outer(), use_cache=use_cache)

        def ask(_: Tensor) -> Tensor:
            with patch.disable():
                return logits_of(model, inner())

        calls = Calls(ask)
        found = generate(model, outer(), use_cache=use_cache, logits_processor=[calls])
    assert equal(found, around)
    assert all(torch.equal(call, plain) for call in calls.found)


@pytest.mark.parametrize("use_cache", [True, False])
def test_mllama_disabled_within_generate(use_cache: bool) -> None:
    family = FAMILIES["mllama"]
    model: Any = shared("mllama", "sdpa")
    first, second = (family.collate([row]) for row in family.rows("ragged")[:2])
    plain = logits_of(model, second)
    # Reads the text, so that without a cache later steps would choose anew.
    with vtc.patch(model, vtc.CDPruner(keep=0.3)) as patch:
        around = generate(model, first, use_cache=use_cache)

        def ask(_: Tensor) -> Tensor:
            with patch.disable():
                return logits_of(model, second)

        calls = Calls(ask)
        found = generate(model, first, use_cache=use_cache, logits_processor=[calls])
    assert equal(found, around)
    assert all(torch.equal(call, plain) for call in calls.found)


@pytest.mark.parametrize("name", ["llava", "mllama"])
def test_no_patch_comes_off_in_a_forward(model: Any, name: str) -> None:
    batch = outer()
    if name == "mllama":
        family = FAMILIES["mllama"]
        model, batch = shared("mllama", "sdpa"), family.collate(family.rows("one"))
    with vtc.patch(model, vtc.Random(keep=0.3)) as patch:
        expected = logits_of(model, batch)

        def disable(*_: Any) -> None:
            with patch.disable():
                pass

        acts: list[Callable[..., Any]] = [
            disable,
            lambda *_: vtc.unpatch(model),
            lambda *_: vtc.patch(model, "full"),
        ]
        for act in acts:
            handle = model.model.language_model.layers[1].register_forward_pre_hook(act)
            with pytest.raises(RuntimeError, match="during a forward"):
                logits_of(model, batch)
            handle.remove()
            assert patch.active
            assert torch.equal(logits_of(model, batch), expected)


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_a_patched_assistant_of_a_plain_model(model: Any, method: str) -> None:
    """transformers hands an assistant no images, so that there is nothing to compress."""
    batch = outer()
    target = build_model("clip", "llama", seed=5)
    alone = target.generate(**batch, max_new_tokens=6, do_sample=False)
    with vtc.patch(model, METHODS[method]()) as patch:
        found = target.generate(**batch, max_new_tokens=6, do_sample=False, assistant_model=model)
        assert patch.report.images == []
    assert int((batch["input_ids"] == IMAGE).sum()) == 36
    assert torch.equal(found, alone)


@pytest.mark.parametrize("name", ["cdpruner", "fastv"])
def test_the_same_picture_within_generate(model: Any, name: str) -> None:
    """A prompt that goes on as that of `generate` does is a call of its own all the same: what it
    keeps is chosen by its own text, and is not what the first step of `generate` kept."""
    pixels = outer()["pixel_values"]

    def ask(ids: Tensor) -> Tensor:
        encoded = {"image": model.get_image_features(pixels)}
        return logits_of(model, {"input_ids": ids, "mm_encoder_outputs": encoded}, use_cache=False)

    with vtc.patch(model, METHODS[name]()):
        around = generate(model, outer(), use_cache=False)
        calls = Calls(lambda ids: (ids.clone(), ask(ids)))
        found = generate(model, outer(), use_cache=False, logits_processor=[calls])
        assert equal(found, around)
        for ids, logits in calls.found:
            assert torch.equal(ask(ids), logits)


@pytest.mark.parametrize(
    ("where", "ask"),
    [("model", "forward"), ("model.vision_tower", "forward"), ("model.vision_tower", "base")],
)
@pytest.mark.parametrize("name", ["cdpruner", "fastv"])
def test_labels_belong_to_the_call(model: Any, name: str, where: str, ask: str) -> None:
    """A call in the middle of one with labels is told none, and leaves them to that one."""
    labels = outer()["input_ids"].clone()
    labels[:, :-5] = -100
    with vtc.patch(model, METHODS[name]()):
        alone, around = ASKS[ask](model), logits_of(model, outer(), labels=labels)
        assert not torch.equal(around, logits_of(model, outer()))
        found: list[Any] = []
        busy: list[bool] = []

        def within(*_: Any) -> None:
            if not busy:
                busy.append(True)
                found.append(ASKS[ask](model))
                busy.clear()

        handle = model.get_submodule(where).register_forward_pre_hook(within)
        try:
            assert torch.equal(logits_of(model, outer(), labels=labels), around)
        finally:
            handle.remove()
    assert len(found) == 1
    assert equal(found[0], alone)
