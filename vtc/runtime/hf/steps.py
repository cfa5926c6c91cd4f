# SPDX-License-Identifier: Apache-2.0
"""Steps of decoding that torch can compile.

`generate` prepares the inputs of a step outside the compiled forward. There the engine counts the
new token in the ledger and makes what layers need, in tensors of a fixed shape: a mask per group,
as wide as the static cache, and rotations. The forward that follows finds them on its cache and
only puts them in place: nothing in it reads a count, which would compile every step anew, or leaves
the graph. A cache that is not compressed gets a step without changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.runtime.forward import Forward, Places
from vtc.runtime.hf.cache import cache_in, ledger_of
from vtc.runtime.hf.groups import LayerGroups


@dataclass
class Step:
    """What the decoder layers take at one step, in place of what the decoder computes.

    Attributes:
        positions: (b, 1) positions of the first group; `None` for those that the model gives.
        masks: by decoder layer, its mask; `None` for the decoder's own.
        rotations: by decoder layer, its position embeddings; `None` for the decoder's own.
    """

    positions: Tensor | None
    masks: tuple[Any, ...]
    rotations: tuple[Any, ...]


def pending(given: Mapping[str, Any]) -> Step | None:
    """The step that is prepared for the cache among the arguments of a call, or `None`."""
    found: Step | None = getattr(cache_in(given), "vtc_step", None)
    return found


def prepare(groups: LayerGroups, inputs: dict[str, Any]) -> None:
    """Count the token of a step, and leave with its cache what the layers need for it.

    Args:
        groups: of the patched model.
        inputs: the arguments of the model, as `generate` prepared them, with `position_ids`;
            receives the mask of the first group.

    Raises:
        ArgumentError: the cache was compressed at other layers.
    """
    adapter, cache, ids = groups.adapter, cache_in(inputs), inputs["input_ids"]
    discard(cache)
    ledger = ledger_of(cache)
    if ledger is None:
        nothing = (None,) * groups.num_layers
        cache.vtc_step = Step(None, nothing, nothing)
        return
    groups.check(ledger)
    for group in ledger.groups:
        group.extend(None, 1)
    ledger.logical += 1
    ledger.croppable += 1
    ledger.may_write = True
    positions = inputs["position_ids"]
    empty = positions.new_empty(0)
    forward = Forward(
        given=inputs, phase="decode", ledger=ledger, places=Places(positions, empty, empty, [])
    )
    # Of the embeddings only rows, type and device are read.
    words = adapter.model.get_input_embeddings().weight
    kind = words.dtype if words.is_floating_point() else adapter.model.dtype  # quantised to bytes
    hidden = torch.empty(*ids.shape, 0, dtype=kind, device=ids.device)
    masks: list[Any] = []
    rotations: list[Any] = []
    for layer in range(groups.num_layers):
        given: dict[str, Any] = {"past_key_values": cache}
        groups.adapt_layer(forward, layer, hidden, given)
        masks.append(given.get("attention_mask"))
        rotations.append(given.get("position_embeddings"))
    shifted = ledger.groups[0].shift is not None
    cache.vtc_step = Step(
        forward.rotary_positions(0) if shifted else None, tuple(masks), tuple(rotations)
    )
    inputs["attention_mask"] = groups.of_decoder(forward, hidden, cache)


def take(cache: Any) -> None:
    """The prepared step has run."""
    cache.vtc_step = None
    ledger = ledger_of(cache)
    if ledger is not None:
        ledger.may_write = False


def discard(cache: Any) -> None:
    """Uncount the token of a step that was prepared and never ran."""
    if getattr(cache, "vtc_step", None) is not None:
        take(cache)
        ledger = ledger_of(cache)
        if ledger is not None:
            ledger.shrink(1)
