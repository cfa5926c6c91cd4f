# SPDX-License-Identifier: Apache-2.0
"""Features of vision tokens that enter between decoder layers, of which methods may drop tokens.

Where vision tokens enter as zeros (Granite 4 Vision), methods see the first of these features, and
what they make of them is what that layer adds. The others are added as they are, to the tokens that
are left then.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vtc.models import Adapter
from vtc.runtime.forward import Forward
from vtc.runtime.hf.guards import HOOKS_INSIDE, refuse_checkpoint


def take(adapter: Adapter, forward: Forward, kwargs: dict[str, Any]) -> Tensor:
    """Take the features off the arguments of the decoder.

    Args:
        adapter: bound to the model.
        forward: the forward in progress; receives the features.
        kwargs: the arguments of the decoder, changed in place.

    Returns:
        (b, s, d) what enters, with the first features of vision tokens that enter as zeros.
    """
    embeds: Tensor = kwargs["inputs_embeds"]
    found = adapter.take_injected(kwargs)
    if found is None:
        return embeds
    forward.deepstack, forward.injected = found
    first = forward.injected[min(forward.injected)].to(embeds)
    return embeds.masked_scatter(forward.deepstack[..., None], first)


def put(forward: Forward, embeds: Tensor) -> Tensor:
    """Keep what methods made of the first features for its layer.

    Args:
        forward: the forward in progress.
        embeds: (b, s, d) what enters.

    Returns:
        (b, s, d) the same, with zeros for the vision tokens that get their features later.
    """
    if not forward.injected:
        return embeds
    assert forward.deepstack is not None
    forward.injected = {**forward.injected, min(forward.injected): embeds[forward.deepstack]}
    return embeds.masked_fill(forward.deepstack[..., None], 0)


def add(forward: Forward, number: int, layer: nn.Module, hidden: Tensor) -> Tensor:
    """Add the features of a layer to the vision tokens that are left, as the decoder would.

    Args:
        forward: the forward in progress.
        number: of the layer, from 0.
        layer: the layer.
        hidden: (b, k, d) its input.

    Returns:
        (b, k, d); `hidden` itself if the layer gets none.

    Raises:
        RuntimeError: the layer is checkpointed where that would not replay this.
    """
    if number not in forward.injected:
        return hidden
    if HOOKS_INSIDE:
        refuse_checkpoint(layer, "features enter between layers")
    left, features = forward.deepstack_left(forward.injected[number].to(hidden))
    left, hidden = left.to(hidden.device), hidden.clone()
    hidden[left] = hidden[left] + features
    return hidden
