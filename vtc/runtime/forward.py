# SPDX-License-Identifier: Apache-2.0
"""The state of one forward of a patched model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtc.core import Record
from vtc.core.images import Modality
from vtc.core.prefill import Stopwatch
from vtc.runtime.choices import Choices
from vtc.runtime.counts import TokenCounts
from vtc.runtime.layout import Layout, gather_last, gather_tokens
from vtc.runtime.ledger import Ledger
from vtc.runtime.prompt import Prompt
from vtc.runtime.signals import Heard


@dataclass
class Captured:
    """What was captured in the decoder layers that have run.

    Attributes:
        attention: by layer, the requested attention rows.
        records: by layer and name, the requested states (b, k, d) and the layout they are in.
        paused: a look-ahead is running, which is not part of the forward.
    """

    attention: dict[int, Heard] = field(default_factory=dict)
    records: dict[tuple[int, Record], tuple[Layout, Tensor]] = field(default_factory=dict)
    paused: bool = False


@dataclass
class Places:
    """Positions of the tokens of a forward.

    Attributes:
        given: (b, s) positions that the model gives them, or (axes, b, s) with M-RoPE.
        gap: (b, s) bool, dropped tokens whose gap in the positions closes.
        offset: (b, 1) how far padding moves the positions of a row.
        past_shift: by layer group, how far positions of the cached tokens were moved, or `None`.
    """

    given: Tensor
    gap: Tensor
    offset: Tensor
    past_shift: list[Tensor | None]


@dataclass
class Forward:
    """One call of the model.

    Attributes:
        given: the arguments of the base model.
        labels: (b, s) labels, or `None`.
        logits_to_keep: this argument of the model, 0 by default; `None` if the base model runs
            alone.
        generating: the executor's record of the `generate` call of which this is a step, or `None`.
        images_seen: the call has pixels or vision features.
        features: what is scattered into the sequence, by modality: a list of (n, d), one per image,
            or (images, n, d).
        vision: (b, s) bool by modality, True at the placeholders of the features.
        reached: the language model's own forward runs, where it is hooked as well.
        phase: "plain" leaves the model alone; "prefill" compresses; "decode" continues a
            compressed cache.
        choices: the selections.
        prompt: the sequence before compression; set at prefill.
        layout: the tokens held at the current layer; set at prefill.
        entered: the tokens that entered the decoder; set at prefill.
        entering: the arguments of the decoder before compression; set at prefill.
        deepstack: (b, s) bool, True at tokens to which DeepStack adds features, or `None`.
        injected: by layer, the (n, d) features that are added before it to the tokens of
            `deepstack`, where these enter as zeros.
        captured: what was captured in decoder layers.
        counts: tokens by layer.
        places: positions; set whenever a compressed cache is written.
        ledger: of the cache that is written.
        memo: masks and rotations by layer group, computed once.
        selector, lm: clocks of the methods and of the language model.
        lm_started: when the latter started.
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None
    logits_to_keep: Any = None
    generating: Any = None
    images_seen: bool = False
    features: dict[Modality, Any] = field(default_factory=dict)
    vision: dict[Modality, Tensor] = field(default_factory=dict)
    reached: bool = False
    phase: str = "plain"
    choices: Choices = field(default_factory=Choices)

    prompt: Prompt = None  # type: ignore[assignment]
    layout: Layout = None  # type: ignore[assignment]
    entered: Layout | None = None
    entering: Mapping[str, Any] = field(default_factory=dict)
    deepstack: Tensor | None = None
    injected: dict[int, Tensor] = field(default_factory=dict)
    captured: Captured = field(default_factory=Captured)
    counts: TokenCounts = field(default_factory=TokenCounts)

    places: Places = None  # type: ignore[assignment]
    ledger: Ledger = None  # type: ignore[assignment]
    memo: dict[Any, Any] = field(default_factory=dict)

    selector: Stopwatch = field(default_factory=Stopwatch)
    lm: Stopwatch = field(default_factory=Stopwatch)
    lm_started: Any = None

    @property
    def whole(self) -> bool:
        """Whether no token has been dropped so far."""
        valid, layout = self.prompt.valid, self.layout
        return layout.index.shape == valid.shape and torch.equal(layout.valid, valid)

    def drop(self, keep: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hold fewer tokens from now on.

        Args:
            keep: (b, k) bool over the current layout.
            hidden: (b, k, d) their states.

        Returns:
            The (b, k', d) states of the tokens that are kept, zeros at padding, and the (b, k')
            places of these in the layout before.
        """
        self.layout, place = self.layout.compact(keep)
        hidden = gather_tokens(hidden, place.to(hidden.device))
        pads = ~self.layout.valid[..., None].to(hidden.device)
        return hidden.masked_fill(pads, 0), place

    def deepstack_left(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens of `deepstack`, those still held.

        Args:
            features: (n, d) one for each token of `deepstack`, in their order.

        Returns:
            (b, k) bool, where these tokens are in the current layout, and (m, d) their features.
        """
        every, index = self.deepstack, self.layout.index
        assert every is not None
        if self.whole:  # those that the user masked are there too
            return every, features
        left = every.gather(1, index) & self.layout.valid
        row = (every.flatten().cumsum(0) - 1).view_as(every).gather(1, index)[left]
        return left, features[row.to(features.device)]

    def rotary_positions(self, number: int) -> Tensor:
        """Rotary positions of this forward's tokens in a layer group.

        Args:
            number: the layer group.

        Returns:
            (b, k), or (axes, b, k) with M-RoPE.
        """
        places = self.places
        if self.phase == "decode":
            shift = self.ledger.groups[number].shift
            return places.given if shift is None else places.given - shift
        index = self.layout.index
        positions = gather_last(places.given, index)
        if positions.dim() == 3:
            return positions  # M-RoPE: gaps never close
        positions = positions - gather_last(places.gap.cumsum(1), index)
        shift = places.past_shift[number]
        positions = positions if shift is None else positions - shift
        return positions.clamp_min(0)

    def gather_blocks(self, length: int) -> Tensor | None:
        """Block numbers of all tokens that a layer group holds.

        Args:
            length: number of tokens that the group holds, those of this forward last.

        Returns:
            (b, length), -1 at cached tokens and padding; `None` if the family has no blocks.
        """
        if self.prompt.blocks is None:
            return None
        blocks = self.prompt.blocks.gather(1, self.layout.index)
        blocks = blocks.masked_fill(~self.layout.valid, -1)
        return torch.nn.functional.pad(blocks, (length - blocks.shape[1], 0), value=-1)
