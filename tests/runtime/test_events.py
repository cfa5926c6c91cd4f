# SPDX-License-Identifier: Apache-2.0
"""Who listens to a patch is told what methods are shown and choose, and changes nothing."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import vtc
from tests.reference.families import FAMILIES
from tests.reference.models import build_model, collate, samples
from vtc.core import make
from vtc.core.events import Encoded, Event, Prefilled, Selected, Shown


def run(name: str, method: Any, kind: str = "images") -> tuple[list[Event], torch.Tensor, Any]:
    family = FAMILIES[name]
    model, events = family.build("eager"), list[Event]()
    batch = family.collate(family.rows(kind))
    with vtc.patch(model, method) as patch, torch.no_grad():
        plain = model(**batch).logits
        with patch.listen(events.append):
            heard = model(**batch).logits
        assert torch.equal(plain, heard)
        model(**batch)
    return events, plain, patch


@pytest.mark.parametrize("name", ["internvl", "idefics3", "qwen2_vl", "paligemma"])
def test_events_tell_what_the_report_counts(name: str) -> None:
    method = vtc.DivPrune(keep=0.5) | vtc.FastV(keep=0.25, layer=2)
    events, _, patch = run(name, method)
    shown = [e for e in events if isinstance(e, Shown)]
    chosen = [e for e in events if isinstance(e, Selected)]
    samples = patch.report.prefills[1].samples
    assert [len(e.tokens) for e in shown] == [
        image.original for sample in samples for image in sample.images
    ]
    first = [e for e in chosen if e.layer is None]
    assert [(e.sample, e.image) for e in first] == [
        (b, i) for b, sample in enumerate(samples) for i in range(len(sample.images))
    ]
    assert all(isinstance(e.method, vtc.DivPrune) for e in first)
    assert [len(e.selection.indices) for e in first] == [
        image.steps[0][1] for sample in samples for image in sample.images
    ]
    later = [e for e in chosen if e.layer is not None]
    assert {e.layer for e in later} == {2}
    left = [sum(i.steps[-1][1] for i in sample.images) for sample in samples if sample.images]
    assert [len(e.selection.indices) for e in later] == left
    assert all(e.among >= len(e.selection.indices) for e in chosen)


@pytest.mark.parametrize(
    "method",
    [
        "full",
        "fastv",
        "tome:keep=0.5",
        "downsample:how=pixels",
        "divprune",
        "divprune:keep=0.5|fastv:keep=0.25",
    ],
)
def test_images_are_shown_whatever_the_stage(method: str) -> None:
    model, events = build_model("clip", "llama"), list[Event]()
    batch = collate(samples("images", "clip"))
    patch = vtc.patch(model, make(method))
    with patch, patch.listen(events.append), torch.no_grad():
        model(**batch)
    (prefill,) = patch.report.prefills
    shown = [e for e in events if isinstance(e, Shown)]
    assert [(e.sample, len(e.tokens)) for e in shown] == [
        (b, image.encoded) for b, sample in enumerate(prefill.samples) for image in sample.images
    ]
    kinds = [type(e) for e in events]
    assert kinds[0] is Encoded
    assert kinds[1 : 1 + len(shown)].count(Shown) >= 1
    assert kinds[-1] is Prefilled
    stages = {e.stage for e in events if isinstance(e, Selected)}
    assert stages == {*make(method).stages} & {"sequence", "layers"}


def test_cross_attention_tells_as_well() -> None:
    from tests.runtime.test_mllama import FAMILY

    model, events = FAMILY.build("eager"), list[Event]()
    batch = FAMILY.collate(FAMILY.rows("images"))
    patch = vtc.patch(model, vtc.DivPrune(keep=0.5))
    with patch, patch.listen(events.append), torch.no_grad():
        model(**batch)
    shown = sum(isinstance(e, Shown) for e in events)
    assert shown == sum(len(s.images) for s in patch.report.prefills[0].samples) > 0
    assert len(events) == 2 * shown + 1
    (last,) = (e for e in events if isinstance(e, Prefilled))
    assert last is events[-1]
    assert last.prefill is patch.report.prefills[0]


def test_generation_without_a_cache_tells_once_and_copies_do_not_tell() -> None:
    family = FAMILIES["paligemma"]
    model, events = family.build("eager"), list[Event]()
    batch = family.collate(family.rows("one"))
    with vtc.patch(model, "divprune", keep=0.5) as patch, patch.listen(events.append):
        model.generate(**batch, max_new_tokens=3, min_new_tokens=3, use_cache=False)
        told = [Encoded, Shown, Selected, Prefilled]
        assert [type(e) for e in events if not isinstance(e, Encoded)] == told[1:]
        before = len(events)
        copied = copy.deepcopy(model)
        copied(**batch)
        assert len(events) == before
        (patched,) = (m for m in copied.modules() if "_vtc_patch" in vars(m))
        assert len(patched._vtc_patch.report.prefills) == len(patch.report.prefills) + 1


def test_what_a_listener_raises_ends_the_forward_and_nothing_is_left() -> None:
    family = FAMILIES["paligemma"]
    model, batch = family.build("eager"), family.collate(family.rows("one"))

    def refuse(event: Event) -> None:
        if not isinstance(event, Encoded):
            raise KeyError(type(event).__name__)

    with vtc.patch(model, "divprune", keep=0.5) as patch, torch.no_grad():
        expected = model(**batch).logits
        with patch.listen(refuse), pytest.raises(KeyError, match="Shown"):
            model(**batch)
        assert torch.equal(model(**batch).logits, expected)


def test_a_patch_that_is_gone_is_not_listened_to() -> None:
    model = FAMILIES["paligemma"].build("eager")
    patch = vtc.patch(model, "divprune", keep=0.5)
    patch.unpatch()
    with pytest.raises(RuntimeError, match="not on its model any more"), patch.listen(print):
        pass


def test_a_method_that_writes_to_the_models_tensors_is_stopped() -> None:
    family = FAMILIES["paligemma"]
    model, batch = family.build("eager"), family.collate(family.rows("one"))
    stopped = pytest.raises(RuntimeError, match="writing: prune wrote to tensors of its state")
    with vtc.patch(model, Writing()), torch.no_grad(), stopped:
        model(**batch)


@dataclass(frozen=True)
class Writing(vtc.Method):
    """Centres the hidden states where they lie."""

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        return (2,)

    def prune(self, state: vtc.LayerState) -> vtc.Selection | None:
        hidden = state.hidden.float()
        hidden -= hidden.mean(0)
        return None


Writing.name = "writing"
