# SPDX-License-Identifier: Apache-2.0
"""Methods that exist only to test the engine: they use every part of the contract at once.

They are not registered, so that `vtc.methods()` lists what it would list without the tests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtc.core import LayerState, Method, Positions, Record, Rows, Selection, VisionTokens


class Probe(Method):
    """Base of the probes. Its name is set below, where it does not register."""


Probe.name = "probe"


def _varying(tensor: Tensor, lowest: int, choices: int) -> int:
    """A number in [lowest, lowest + choices) that depends on what the sample holds."""
    return lowest + int((tensor.float() > 0).sum()) % choices


@dataclass(frozen=True)
class Ragged(Probe):
    """Sequence stage: keeps a number of tokens that differs from image to image."""

    positions: Positions = "original"

    def select(self, tokens: VisionTokens) -> Selection:
        count = _varying(tokens.features, 3, 11)
        chosen = tokens.features[:, 0].topk(min(count, len(tokens))).indices
        return Selection(chosen.sort().values)


@dataclass(frozen=True)
class Merge(Probe):
    """Sequence stage: reads every signal there is and gives the kept tokens new contents."""

    keep: int = 8
    positions: Positions = "original"
    needs = frozenset(
        {"cls_attention", "low_attention", "cls_query", "keys", "encoder", "text", "segment"}
    )
    vision_layer = -2
    low_layer = 0.4

    def select(self, tokens: VisionTokens) -> Selection:
        assert tokens.cls_attention is not None
        assert tokens.keys is not None
        assert tokens.text is not None
        assert tokens.low_attention is not None
        assert tokens.encoder is not None
        assert tokens.project is not None
        assert tokens.segment is not None
        score = tokens.cls_attention * (1 + tokens.image) + 0.01 * tokens.keys[:, 0].tanh()
        score = score + tokens.low_attention
        if tokens.cls_query is not None:
            assert tokens.cls_key is not None
            keys = tokens.keys - tokens.cls_key
            score = score + 0.01 * (keys @ tokens.cls_query / tokens.heads).sigmoid()
        chosen = score.topk(min(self.keep, len(tokens))).indices.sort().values
        nearest = (tokens.keys @ tokens.keys[chosen].T).softmax(1)
        merged = nearest.T @ tokens.features / nearest.sum(0)[:, None]
        hint = tokens.text.mean(0) if len(tokens.text) else 0.0
        if len(tokens.segment):
            hint = hint + tokens.segment[0]
        assert tokens.grid is not None
        row = tokens.grid[chosen, 1:2].to(merged.dtype)
        states = tokens.encoder[chosen]
        if tokens.encoder_cls is not None:
            states = states + tokens.encoder_cls
        projected = tokens.project(states)
        return Selection(chosen, merged + 0.1 * hint + 0.01 * row + 0.3 * projected)


@dataclass(frozen=True)
class Stairs(Probe):
    """Layers stage: reads every signal there is, drops twice, a number that differs from row to
    row, and rewrites what stays."""

    first: int = 2
    second: int = 5
    positions: Positions = "original"
    heads: bool = False

    @property
    def by_head(self) -> bool:
        return self.heads

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        return (self.first, self.second)

    def taps(self, num_layers: int) -> dict[int, Rows]:
        return {0: "vision_text", self.first - 1: "last", self.second - 1: "text"}

    def peeks(self, num_layers: int) -> dict[int, Rows]:
        return {self.first: "text", self.second: "last"}

    def records(self, num_layers: int) -> dict[int, frozenset[Record]]:
        return {
            0: frozenset({"input", "attention_in", "attention_out"}),
            self.first - 1: frozenset({"keys", "mlp_in", "mlp_out"}),
            self.second - 1: frozenset({"output", "normed", "keys", "rotary"}),
        }

    def prune(self, state: LayerState) -> Selection | None:
        vision = state.vision
        assert state.ahead is not None
        score = self._sum(state.attention[state.layer - 1])[vision] + self._sum(state.ahead)[vision]
        score = score + self._sum(state.attention[0])[vision] / len(vision)
        score = score + 0.001 * state.grid[vision].sum(1)
        # every record counts, and the sum says how many there have to be
        assert len(state.recorded) == (6 if state.layer == self.first else 10)
        assert (state.memory is None) == (state.layer == self.first)
        if state.memory is not None:
            score = score + 0.01 * state.memory.tanh()
        for kept in state.recorded.values():
            score = score + 0.01 * kept[vision].mean(1).tanh()
        if state.layer == self.first:
            count = _varying(state.hidden[vision], len(vision) // 2, max(1, len(vision) // 4))
        else:
            count = len(vision) // 2
        chosen = score.topk(count).indices.sort().values
        if state.layer == self.first:
            return Selection(chosen, memory=score[chosen])
        contents = state.hidden[vision]
        return Selection(chosen, 0.8 * contents[chosen] + 0.2 * contents.mean(0))

    def _sum(self, rows: Tensor) -> Tensor:
        """(s,) attention received from (r, s) rows, or from (h, r, s) where each head counts more
        than the one before."""
        assert rows.dim() == 2 + self.heads
        if self.heads:
            rows = (rows * torch.arange(1, len(rows) + 1)[:, None, None]).mean(0)
        return rows.sum(0)


@dataclass(frozen=True)
class Nothing(Probe):
    """Acts in both stages and drops nothing."""

    def select(self, tokens: VisionTokens) -> Selection:
        return Selection(torch.arange(len(tokens)))

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        return (num_layers // 2,)

    def prune(self, state: LayerState) -> Selection | None:
        return None


@dataclass(frozen=True)
class Fixed(Probe):
    """Keeps every `stride`-th vision token, before `layer`; by `select` if `layer` is `None`."""

    stride: int = 3
    layer: int | None = None
    positions: Positions = "original"

    @property
    def stages(self) -> tuple[str, ...]:
        return ("sequence",) if self.layer is None else ("layers",)

    def select(self, tokens: VisionTokens) -> Selection:
        return Selection(torch.arange(0, len(tokens), self.stride))

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        return () if self.layer is None else (self.layer,)

    def prune(self, state: LayerState) -> Selection | None:
        return Selection(torch.arange(0, len(state.vision), self.stride))


@dataclass(frozen=True)
class Spy(Probe):
    """Passes everything on to another method, and writes down what it was shown and answered."""

    inner: Method = field(default_factory=Nothing)
    notes: list[tuple[Any, Any]] = field(default_factory=list, compare=False)

    @property
    def positions(self) -> Positions:  # type: ignore[override]
        return self.inner.positions

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.needs

    @property
    def vision_layer(self) -> int | float:  # type: ignore[override]
        return self.inner.vision_layer

    @property
    def low_layer(self) -> int | float:  # type: ignore[override]
        return self.inner.low_layer

    @property
    def by_head(self) -> bool:
        return self.inner.by_head

    def peeks(self, num_layers: int) -> dict[int, Rows]:
        return self.inner.peeks(num_layers)

    def records(self, num_layers: int) -> dict[int, frozenset[Record]]:
        return self.inner.records(num_layers)

    @property
    def stages(self) -> tuple[str, ...]:
        return self.inner.stages

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        return self.inner.prune_layers(num_layers)

    def taps(self, num_layers: int) -> dict[int, Rows]:
        return self.inner.taps(num_layers)

    def select(self, tokens: VisionTokens) -> Selection:
        chosen = self.inner.select(tokens)
        self.notes.append((tokens, chosen))
        return chosen

    def prune(self, state: LayerState) -> Selection | None:
        chosen = self.inner.prune(state)
        self.notes.append((state, chosen))
        return chosen


@dataclass(frozen=True)
class Broken(Probe):
    """Keeps everything, and fails while `fails` holds anything."""

    fails: list[bool] = field(default_factory=list)

    def select(self, tokens: VisionTokens) -> Selection:
        if self.fails:
            raise ArithmeticError("broken on purpose")
        return Selection(torch.arange(len(tokens)))


@dataclass(frozen=True)
class Answers(Probe):
    """Answers with the indices it was told, and the first `contents` features."""

    indices: tuple[int, ...] = ()
    contents: int | None = None

    def select(self, tokens: VisionTokens) -> Selection:
        features = None if self.contents is None else tokens.features[: self.contents]
        return Selection(torch.tensor(self.indices), features)
