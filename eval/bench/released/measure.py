# SPDX-License-Identifier: Apache-2.0
"""Times vtc's selections and those of released code on the same tensors."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

import vtc
from vtc.core import EncoderState, LayerState, Method, Selection
from vtc.runtime.hf import taps
from vtc.runtime.hf.stages import encoder

from . import layers, tower
from .attention import Ahead, Heard
from .drawn import AFTER, BEFORE, state_of, tokens_of
from .sequence import SEQUENCE

Run = Callable[[], Tensor]
Pairs = dict[str, tuple[Run, Run]]


def _chosen(selection: Selection | None) -> Tensor:
    assert selection is not None
    return selection.indices if selection.features is None else selection.features


def _sequence(n: int, k: int, d: int) -> Pairs:
    tokens = tokens_of(n, d)

    def pair(name: str) -> tuple[Run, Run]:
        method: Method = vtc.make(name, keep=k)

        def ours() -> Tensor:
            found = method.select(tokens)
            return _chosen(found) if name in ("prumerge", "vscan") else found.indices

        return ours, lambda: SEQUENCE[name](tokens, k)

    return {name: pair(name) for name in SEQUENCE}


def _layers(n: int, k: int, d: int) -> Pairs:
    span, share = (BEFORE, BEFORE + n), (k + 0.5) / n
    first, third, eighth = (state_of(n, d, layer) for layer in (2, 3, 8))
    length = len(first.image)
    last, text = torch.tensor([length - 1]), torch.arange(span[1], length)
    heard, ahead = Heard(length, d), Ahead(length, d)
    dart, fastv, pyramid = vtc.DART(keep=k), vtc.FastV(keep=k), vtc.PyramidDrop(keep=share)
    v2drop, sparse = vtc.V2Drop(keep=share), vtc.SparseVLM(keep=(k, k, k))

    def seen(method: Method, state: LayerState, rows: Tensor) -> Tensor:
        attention = {state.layer - 1: rows}
        return _chosen(method.prune(dataclasses.replace(state, attention=attention, ahead=rows)))

    def attending() -> Tensor:
        heard.fused()
        return seen(fastv, first, heard.rows(last))

    def rated(rows: Tensor, start: int) -> Tensor:
        raters = layers.sparsevlm_raters(third, span) - start
        return layers.sparsevlm(rows, raters, third, span, k)

    one = eighth.ahead
    assert one is not None
    return {
        "dart": (lambda: _chosen(dart.prune(first)), lambda: layers.dart(first, k)),
        "fastv": (
            lambda: _chosen(fastv.prune(first)),
            lambda: layers.fastv(first.attention[1][-1], span, k),
        ),
        "fastv, attending": (attending, lambda: layers.fastv_attending(heard, span, k)),
        "pyramiddrop, vscan": (
            lambda: _chosen(pyramid.prune(eighth)),
            lambda: layers.pyramiddrop(one[-1:], span, k),
        ),
        "pyramiddrop, looking ahead": (
            lambda: seen(pyramid, eighth, ahead.rows(eighth.hidden, last)),
            lambda: layers.pyramiddrop(
                ahead.released(eighth.hidden, slice(length - 1, length)), span, k
            ),
        ),
        "v2drop": (lambda: _chosen(v2drop.prune(third)), lambda: layers.v2drop(third, span, k)),
        "sparsevlm": (
            lambda: _chosen(sparse.prune(third)),
            lambda: rated(third.attention[2], span[1]),
        ),
        "sparsevlm, with its rows": (
            lambda: seen(sparse, third, heard.rows(text)),
            lambda: rated(layers.sparsevlm_rows(heard), 0),
        ),
    }


class _Transitions:
    """TransPrune's three cuts, with random states of the tokens that its layers hold."""

    def __init__(self, n: int, d: int, look: bool) -> None:
        self.method = vtc.TransPrune(direction="signed", softmax_scope="sequence")
        self.whole, self.n, self.look = state_of(n, d, 7), n, look
        self.ahead = Ahead(len(self.whole.image), d)
        self.cuts = self.method.prune_layers(32)
        generator = torch.Generator().manual_seed(1)
        shape = (len(self.whole.image), d)
        parts = ("attention_in", "attention_out", "mlp_in", "mlp_out")
        drawn: dict[Any, Tensor] = {
            (layer, part): torch.randn(*shape, generator=generator)
            for layer in self.method.watched(32)
            for part in parts
        }
        # The tokens that each layer holds, by the method's choices.
        self.states, place, memory = [], torch.arange(shape[0]), None
        self.held: dict[int, Tensor] = {}
        for cut in self.cuts:
            before = range(max(self.held, default=self.cuts[0] - 2) + 1, cut)
            self.held.update(dict.fromkeys(before, place))
            state = self._state(cut, place, drawn)
            self.states.append(state)
            rows = self._rows(state, False)
            found = self.method.prune(dataclasses.replace(state, ahead=rows, memory=memory))
            stays = state.image < 0
            stays[state.vision[found.indices]] = True
            place, memory = place[stays], found.memory
        self.own = {key: rows[self.held[key[0]]] for key, rows in drawn.items()}

    def _state(self, cut: int, place: Tensor, drawn: dict[Any, Tensor]) -> LayerState:
        whole = self.whole
        assert whole.ahead is not None
        return dataclasses.replace(
            whole,
            layer=cut,
            hidden=whole.hidden[place],
            image=whole.image[place],
            text=whole.text[place],
            prompt_length=len(place),
            ahead=whole.ahead[:, place],
            recorded={key: rows[place] for key, rows in drawn.items() if key[0] < cut},
        )

    def _rows(self, state: LayerState, released: bool) -> Tensor:
        assert state.ahead is not None
        if not self.look:
            return state.ahead
        length = len(state.image)
        if released:
            return self.ahead.released(state.hidden, slice(length - AFTER, length))
        return self.ahead.rows(state.hidden, torch.arange(length - AFTER, length))

    def ours(self) -> Tensor:
        found: Selection | None = None
        for state in self.states:
            memory = None if found is None else found.memory
            rows = self._rows(state, False)
            found = self.method.prune(dataclasses.replace(state, ahead=rows, memory=memory))
        return _chosen(found)

    def theirs(self) -> Tensor:
        weights: list[Tensor] = []
        chosen, layer = torch.empty(0), self.cuts[0] - 1
        for state, share in zip(self.states, self.method.shares, strict=True):
            for at in range(layer, state.layer):
                pair = [
                    layers.transition(self.own[at, f"{part}_in"], self.own[at, f"{part}_out"])
                    for part in ("attention", "mlp")
                ]
                weights.append(pair[0] + pair[1])
            layer, span = state.layer, (BEFORE, len(state.image) - AFTER)
            rows = self._rows(state, True)
            chosen, weights = layers.transprune(weights, rows, span, int(self.n * share))
        return chosen


def _tower(n: int, k: int, d: int) -> Pairs:
    drawn, tome, flow = tower.TowerLayer.drawn(n, d), vtc.ToMe(keep=k), vtc.FlowCut(keep=k)
    keys, values = (x[0].transpose(0, 1) for x in (drawn.key, drawn.value))
    generator = torch.Generator().manual_seed(2)
    attention, memory = ((4 * torch.randn(n, generator=generator)).softmax(0) for _ in range(2))
    state = EncoderState(
        layer=1,
        num_layers=23,
        original=n,
        has_cls=True,
        attention=attention,
        keys=keys[1:],
        values=values[1:],
        cls_value=values[0],
        size=torch.ones(n),
        memory=memory,
    )
    r = tome.pairs(n, k, 22)

    def merged() -> Tensor:
        merging = tome.merge(state)
        assert merging is not None
        units = torch.arange(1, n + 1)[:, None]
        tile = encoder.Tile(0, torch.zeros(1), units, torch.ones(n), torch.arange(n), None, [])
        rows = encoder.merge_rows(tome, merging, tile, drawn.hidden[1:])
        return torch.cat([drawn.hidden[:1], rows])

    def cut(received: Tensor) -> Tensor:
        merging = flow.merge(dataclasses.replace(state, attention=received))
        assert merging is not None
        return (merging.target >= 0).nonzero().squeeze(1)

    def attending() -> Tensor:
        torch.nn.functional.scaled_dot_product_attention(drawn.query, drawn.key, drawn.value)
        rows = taps.mean_attention(drawn.query[:, :, :1], drawn.key, None, None, taps.Options())
        return cut(rows[0, 0, 0, 1:])

    return {
        "tome": (merged, lambda: tower.tome(drawn, r)),
        "flowcut": (lambda: cut(attention), lambda: tower.flowcut(drawn, state, k)),
        "flowcut, attending": (
            attending,
            lambda: tower.flowcut(
                drawn, dataclasses.replace(state, attention=tower.flowcut_attention(drawn)), k
            ),
        ),
    }


def pairs(n: int, k: int, d: int) -> Pairs:
    """For each method, vtc's selection and that of the released code, on the same tensors.

    Both return the kept tokens, or their contents if tokens are merged.
    """
    given, looking = _Transitions(n, d, False), _Transitions(n, d, True)
    return {
        **_sequence(n, k, d),
        **_layers(n, k, d),
        "transprune": (given.ours, given.theirs),
        "transprune, looking ahead": (looking.ours, looking.theirs),
        **_tower(n, k, d),
    }


def measure(
    n: int, k: int, d: int, repeats: int, only: str = ""
) -> dict[str, tuple[float, float, float]]:
    """Median milliseconds of vtc's and the released code, and the median ratio of their pairs.

    Times are process time, so that other load counts less; the two are interleaved.

    Args:
        n: number of tokens.
        k: number of tokens to keep.
        d: width of the tokens.
        repeats: number of rounds.
        only: measure only names that contain this.

    Returns:
        By name: (vtc, released, ratio of released to vtc).
    """
    found = {}
    with torch.no_grad():
        for name, runs in pairs(n, k, d).items():
            if only not in name:
                continue
            taken: list[list[float]] = [[], []]
            for turn in range(repeats + 1):
                for times, run in zip(taken, runs, strict=True):
                    since = time.process_time()
                    run()
                    if turn:
                        times.append((time.process_time() - since) * 1e3)
            ratios = [theirs / ours for ours, theirs in zip(*taken, strict=True)]
            ours, theirs = map(statistics.median, taken)
            found[name] = ours, theirs, statistics.median(ratios)
    return found


def show(n: int, k: int, d: int, repeats: int, only: str = "") -> None:
    """Print the results of `measure`."""
    title = f"{k} of {n} tokens, d = {d}, float32, process time"
    table = Table("ms", box=SIMPLE_HEAD, title=title, collapse_padding=True, pad_edge=False)
    for header in ("vtc", "released", "speed-up"):
        table.add_column(header, justify="right")
    for name, (ours, theirs, ratio) in measure(n, k, d, repeats, only).items():
        shown = (f"{ms:.{1 if ms >= 10 else 2}f}" for ms in (ours, theirs))
        table.add_row(name, *shown, f"{ratio:.2f}")
    Console().print(table)
