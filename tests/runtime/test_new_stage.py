# SPDX-License-Identifier: Apache-2.0
"""A stage is added by one stage object and one runner: here the cache stage, of which vtc has no
method, with a runner of this file. Nothing of the engine is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtc
from tests.reference.models import build_model, collate, samples
from vtc.core import Method, check_keep
from vtc.core.settings import budget
from vtc.models import CACHE
from vtc.runtime.forward import Forward
from vtc.runtime.hf.stages import RUNNERS, Runner

TOLERANCE = 1e-4


# ---- the method: what a user writes -------------------------------------------------------------
@dataclass(frozen=True)
class Lightest(Method):
    """Evicts the vision tokens whose values are smallest, in all layers together."""

    keep: float | int = 0.5

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def evict(self, values: Tensor) -> Tensor:
        """(k,) ascending indices of the tokens that stay, from values (layers, n, h * d)."""
        norm = values.norm(dim=-1).sum(0)
        return norm.topk(budget(self.keep, len(norm))).indices.sort().values


Lightest.name = "lightest"


# ---- the runner: what a stage needs -------------------------------------------------------------
class CacheRunner(Runner):
    """Calls `evict` on the vision tokens of each row when the prompt has been read."""

    stage: ClassVar[str] = "cache"

    def leave(self, forward: Forward, cache: Any) -> None:
        if cache is None:
            return
        (group,) = forward.ledger.groups
        before, keep = forward.layout, forward.layout.valid.clone()
        assert group.length == before.index.shape[1], "a cache that holds earlier turns"
        for number, method in self.parts:
            for b in range(len(keep)):
                image = forward.prompt.image[b, before.index[b]]
                places = ((image >= 0) & keep[b]).nonzero().squeeze(1)
                held = [layer.values[b, :, places].transpose(0, 1) for layer in cache.layers]
                stay = method.evict(torch.stack(held).flatten(2))
                keep[b, places] = False
                keep[b, places[stay]] = True
                if len(stay) < len(places):
                    forward.choices.dropped.add(number)
        after, place = before.compact(keep)
        for layer in cache.layers:
            for name in ("keys", "values"):
                rows = getattr(layer, name)
                index = place[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
                setattr(layer, name, rows.gather(2, index))
        group.length, group.valid, group.diverged = after.index.shape[1], after.valid, True


# ---- held to the plain model in which the evicted tokens are masked -----------------------------
@pytest.fixture(autouse=True)
def _with_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtc.models import Adapter
    from vtc.runtime.hf.executor import Transformers

    monkeypatch.setitem(RUNNERS, "cache", CacheRunner)
    monkeypatch.setattr(Transformers, "stages", tuple(RUNNERS))
    monkeypatch.setattr(Adapter, "stages", (*Adapter.stages, "cache"))


@pytest.mark.parametrize("kind", ["one", "images", "mixed"])
def test_the_steps_after_the_prompt(kind: str) -> None:
    batch = collate(samples(kind, "clip"))
    model = build_model("clip", "llama")
    words = torch.randint(5, 30, (len(batch["input_ids"]), 3), generator=_seeded())
    with vtc.patch(model, Lightest(keep=0.4)), torch.no_grad():
        first = model(**batch, use_cache=True)
        held = first.past_key_values.layers[0].keys.shape[2]
        found = _steps(model, first.past_key_values, batch["attention_mask"], words)
    with torch.no_grad():
        plain = model(**batch, use_cache=True)
        assert (plain.logits - first.logits).abs().max() < TOLERANCE
        mask = _masked(model, batch, plain.past_key_values, 0.4)
        assert held == int(mask.sum(1).max()) < batch["input_ids"].shape[1]
        expected = _steps(model, plain.past_key_values, mask, words)
        again = model(**batch, use_cache=True)
        control = _steps(model, again.past_key_values, batch["attention_mask"], words)
    assert (found - expected).abs().max() < TOLERANCE
    assert (control - expected).abs().max() > 100 * TOLERANCE


def test_generate() -> None:
    batch, model = collate(samples("one", "clip")), build_model("clip", "llama")
    settings: Any = {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(**batch, **settings)
    with vtc.patch(model, Lightest(keep=1.0)):
        assert torch.equal(model.generate(**batch, **settings), plain)
    with vtc.patch(model, Lightest(keep=0.1)):
        assert model.generate(**batch, **settings).shape == plain.shape
    assert torch.equal(model.generate(**batch, **settings), plain)


def test_it_composes_with_a_stage_of_vtc() -> None:
    batch, model = collate(samples("one", "clip")), build_model("clip", "llama")
    with vtc.patch(model, vtc.DivPrune(keep=0.5) | Lightest(keep=0.25)) as patch, torch.no_grad():
        out = model(**batch, use_cache=True)
    (prefill,) = patch.report.prefills
    left = [
        sample.text_tokens
        + budget(0.25, sum(budget(0.5, image.original) for image in sample.images))
        for sample in prefill.samples
    ]
    assert out.past_key_values.layers[0].keys.shape[2] == max(left)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _steps(model: Any, cache: Any, mask: Tensor, words: Tensor) -> Tensor:
    """(b, 3, v) logits of further tokens on a cache."""
    found = []
    for i in range(words.shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        out = model(input_ids=words[:, i : i + 1], attention_mask=mask, **{CACHE: cache})
        found.append(out.logits)
    return torch.cat(found, dim=1)


def _masked(model: Any, batch: dict[str, Tensor], cache: Any, keep: float) -> Tensor:
    """The mask of the prompt without the evicted tokens."""
    mask = batch["attention_mask"].clone()
    for b, ids in enumerate(batch["input_ids"]):
        places = (ids == model.config.image_token_id).nonzero().squeeze(1)
        held = torch.stack([layer.values[b][:, places] for layer in cache.layers])
        size = held.pow(2).sum((1, 3)).sqrt().sum(0)
        count = max(1, round(keep * len(places)))
        mask[b, places] = 0
        mask[b, places[size.argsort(descending=True)[:count]]] = 1
    return mask
