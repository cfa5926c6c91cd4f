# SPDX-License-Identifier: Apache-2.0
"""Keys and rotations that a method records, in families that rotate in ways of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import vtc
from tests.reference.families import FAMILIES
from tests.reference.probes import Probe
from tests.runtime.test_families import shared
from vtc.core import LayerState, Method, Selection
from vtc.models import find

NAMES = ("llama4", "llama4_short", "gemma4", "gemma4_short", "gemma4_device")


@dataclass(frozen=True)
class Records(Probe):
    """Notes the keys and the rotations of layers 0 to `before` - 1, and keeps all."""

    before: int = 4

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        return (self.before,)

    def records(self, num_layers: int) -> Any:
        return {i: frozenset({"keys", "rotary"}) for i in range(self.before)}

    def prune(self, state: LayerState) -> Selection | None:
        SHOWN.append(state)
        return None


SHOWN: list[LayerState] = []


def shown(name: str, batch: Any) -> list[LayerState]:
    SHOWN.clear()
    method = Records(2) if "device" in name else Records()
    with vtc.patch(shared(name, "eager"), method), torch.no_grad():
        shared(name, "eager")(**batch)
    return [*SHOWN]


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_no_key_and_no_rotation(name: str) -> None:
    """Position ids count padding where the user gives them so; keys are turned back."""
    family = FAMILIES[name]
    rows = family.rows("ragged")
    batch = family.collate(rows)
    length = batch["input_ids"].shape[1]
    batch["position_ids"] = torch.arange(length).expand(len(rows), -1)
    together = shown(name, batch)
    turned = []
    for row, state in zip(rows, together, strict=True):
        (alone,) = shown(name, family.collate([row]))
        for (layer, what), value in alone.recorded.items():
            assert (state.recorded[layer, what] - value).abs().max() < 1e-4, (layer, what)
        turned.append(length - len(row.input_ids))
    assert max(turned) > 0


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_turned_as_the_model_turns_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, model = FAMILIES[name], shared(name, "eager")
    adapter, batch = find(model), family.collate(family.rows("one"))
    (state,) = shown(name, batch)
    for layer in {layer for layer, _ in state.recorded}:
        attention = adapter.attention_of(layer)
        before: list[torch.Tensor] = []
        last = getattr(attention, "k_norm", attention.k_proj)
        handle = last.register_forward_hook(lambda m, a, output, s=before: s.append(output))
        with torch.no_grad():
            model(**batch)
        handle.remove()
        found = before[0].view(1, -1, state.recorded[layer, "keys"].shape[-1])
        found = found.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        places = torch.arange(found.shape[2])[None]
        if adapter.rotates(layer):
            found = adapter.rotate(layer, found, adapter.rotary(layer, found, places))
        if hasattr(attention, "qk_norm"):
            found = attention.qk_norm(found)
        keys = found.transpose(1, 2).flatten(2)[0]
        assert (state.recorded[layer, "keys"] - keys).abs().max() < 1e-5
        ones = state.recorded[layer, "rotary"]
        assert bool((ones == 1).all()) != adapter.rotates(layer)


@pytest.mark.parametrize(
    "method",
    [vtc.DART(layer=3, keep=6, image_pivots=2, text_pivots=1), vtc.TransPrune()],
    ids=["dart", "transprune"],
)
@pytest.mark.parametrize("name", [n for n in NAMES if "device" not in n])
@pytest.mark.parametrize("seed", range(2))
def test_padding_before_a_row_changes_no_choice(name: str, method: Method, seed: int) -> None:
    family = FAMILIES[name]
    model, rows = family.build("sdpa", seed=seed), family.rows("ragged")
    with vtc.patch(model, method) as patch, torch.no_grad():
        together = patch.model(**family.collate(rows)).logits
        for i, row in enumerate(rows):
            alone = patch.model(**family.collate([row])).logits[0]
            assert (together[i, -len(alone) :] - alone).abs().max() < 1e-4
