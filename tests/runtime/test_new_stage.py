# SPDX-License-Identifier: Apache-2.0
"""A stage is added by one stage object and one runner: here the cache stage, of which vtc has no
method, with a runner of this file. Nothing of the engine is touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtc
from tests.reference.families import FAMILIES
from tests.reference.models import build_model, collate, samples
from vtc.core import Method, Selection, check_keep
from vtc.core.errors import ArgumentError
from vtc.core.events import Event, Selected
from vtc.core.settings import budget
from vtc.models import CACHE, Adapter
from vtc.runtime.forward import Forward
from vtc.runtime.hf.stages import RUNNERS, Runner
from vtc.runtime.layout import Layout

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

    def __init__(
        self, adapter: Adapter, method: Method, current: Callable[[], Forward | None]
    ) -> None:
        super().__init__(adapter, method, current)
        if len(self.parts) > 1 or "layers" in method.stages:
            raise ArgumentError("method", f"{method}: layers that hold the same tokens are needed")

    def leave(self, forward: Forward, cache: Any) -> None:
        if cache is None or forward.phase != "prefill":
            return
        (group,), before, ((number, method),) = forward.ledger.groups, forward.layout, self.parts
        past = group.length - before.index.shape[1]  # earlier turns stay as they are
        keep = before.valid.clone()
        for b in range(len(keep)):
            image = forward.prompt.image[b, before.index[b]]
            places = ((image >= 0) & keep[b]).nonzero().squeeze(1)
            held = [layer.values[b, :, past + places].transpose(0, 1) for layer in cache.layers]
            stay = method.evict(torch.stack(held).flatten(2))
            keep[b, places] = False
            keep[b, places[stay]] = True
            if not len(places):
                continue
            selection = Selection(stay)
            chosen = Selected(self.stage, method, b, None, None, len(places), selection)
            forward.choices.emit(chosen)
            if len(stay) < len(places):
                forward.choices.dropped.add(number)
        old = group.valid
        if old is None:
            old = keep.new_ones(len(keep), group.length)
        after, place = Layout.whole(old).compact(torch.cat([old[:, :past], keep], dim=1))
        for layer in cache.layers:
            for name in ("keys", "values"):
                rows = getattr(layer, name)
                index = place[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
                setattr(layer, name, rows.gather(2, index))
        group.length, group.valid, group.diverged = after.index.shape[1], after.valid, True
        counts = after.valid.sum(1).tolist()
        forward.counts.cached = [(n,) * len(self.adapter.layers) for n in counts]


# ---- held to the plain model in which the evicted tokens are masked -----------------------------
@pytest.fixture(autouse=True)
def _with_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNNERS, "cache", CacheRunner)


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
    assert [s.cached for s in prefill.samples] != [s.lengths for s in prefill.samples]
    left = [
        sample.text_tokens
        + budget(0.25, sum(budget(0.5, image.original) for image in sample.images))
        for sample in prefill.samples
    ]
    assert out.past_key_values.layers[0].keys.shape[2] == max(left)


def test_it_is_reported_and_counted() -> None:
    batch, model = collate(samples("images", "clip")), build_model("clip", "llama")
    events: list[Event] = []
    with vtc.patch(model, "full") as full, torch.no_grad():
        model(**batch, use_cache=True)
    patch = vtc.patch(model, Lightest(keep=0.25))
    with patch, patch.listen(events.append), torch.no_grad():
        model(**batch, use_cache=True)
    chosen = [e for e in events if isinstance(e, Selected)]
    assert [(e.stage, e.sample) for e in chosen] == [("cache", b) for b in range(3)]
    assert patch.report.tokens_out == patch.report.tokens_in
    assert patch.report.kv_bytes < 0.6 * full.report.kv_bytes
    assert patch.report.flops == full.report.flops
    assert Lightest(keep=0.25).token_schedule(36, 4) == (36,) * 4


def test_a_second_turn() -> None:
    """The first turn's tokens stay evicted, the second image is evicted from in its turn."""
    batch, model = collate(samples("one", "clip")), build_model("clip", "llama")
    words = torch.randint(5, 30, (1, 3), generator=_seeded())
    with vtc.patch(model, Lightest(keep=0.4)), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        found = _second(model, cache, batch, batch["attention_mask"])
        held = cache.layers[0].keys.shape[2]
        steps = _steps(model, cache, batch["attention_mask"].repeat(1, 2), words)
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        mask = _masked(model, batch, cache, 0.4)
        expected = _second(model, cache, batch, mask)
        assert (found - expected).abs().max() < TOLERANCE
        later = _masked(model, batch, cache, 0.4, batch["input_ids"].shape[1])
        mask = torch.cat([mask, later], dim=1)
        assert held == int(mask.sum())
        assert (steps - _steps(model, cache, mask, words)).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl", "gemma3", "paligemma"])
def test_families_take_a_new_stage_without_a_declaration(name: str) -> None:
    family = FAMILIES[name]
    model, batch = family.build("eager"), family.collate(family.rows("one"))
    with vtc.patch(model, Lightest(keep=0.25)) as patch, torch.no_grad():
        model(**batch, use_cache=True)
    (sample,) = patch.report.prefills[0].samples
    assert sample.cached is not None
    assert max(sample.cached) < min(sample.lengths)


def test_what_the_runner_cannot_do_it_refuses_itself() -> None:
    model = build_model("clip", "llama")
    with pytest.raises(ArgumentError, match="same tokens") as caught:
        vtc.patch(model, vtc.FastV(keep=0.5) | Lightest(keep=0.25))
    assert caught.value.argument == "method"
    assert not hasattr(model.model, "_vtc_patch")


def _second(model: Any, cache: Any, batch: dict[str, Tensor], mask: Tensor) -> Tensor:
    """(b, s, v) logits of the same prompt as a further turn on a cache."""
    mask = torch.cat([mask, batch["attention_mask"]], dim=1)
    return model(**{**batch, "attention_mask": mask}, **{CACHE: cache}).logits


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


def _masked(model: Any, batch: dict[str, Tensor], cache: Any, keep: float, past: int = 0) -> Tensor:
    """The mask of a prompt after `past` cached tokens, without the evicted ones."""
    mask = batch["attention_mask"].clone()
    for b, ids in enumerate(batch["input_ids"]):
        places = (ids == model.config.image_token_id).nonzero().squeeze(1)
        held = torch.stack([layer.values[b][:, past + places] for layer in cache.layers])
        size = held.pow(2).sum((1, 3)).sqrt().sum(0)
        count = max(1, round(keep * len(places)))
        mask[b, places] = 0
        mask[b, places[size.argsort(descending=True)[:count]]] = 1
    return mask


def test_what_a_stage_keeps_with_a_cache_follows_its_rows() -> None:
    batch, model = collate(samples("images", "clip")), build_model("clip", "llama")
    with vtc.patch(model, Lightest(keep=0.25)), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    cache.vtc_ledger.rows["number"] = torch.arange(3)
    cache.batch_repeat_interleave(2)
    assert cache.vtc_ledger.rows["number"].tolist() == [0, 0, 1, 1, 2, 2]
    cache.reorder_cache(torch.tensor([5, 0, 2, 2, 1, 4]))
    assert cache.vtc_ledger.rows["number"].tolist() == [2, 0, 1, 1, 0, 2]
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert cache.vtc_ledger.rows["number"].tolist() == [2, 1]
    assert len(cache.vtc_ledger.groups[0].valid) == 2
