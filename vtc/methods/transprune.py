# SPDX-License-Identifier: Apache-2.0
"""TransPrune: rank tokens by how decoder layers rotate and scale them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vtc.core import LayerState, Method, Positions, Record, Rows, Selection
from vtc.core.errors import ArgumentError, ArgumentTypeError
from vtc.core.settings import (
    check_choice,
    check_fraction,
    check_layers,
    check_number,
    check_positions,
    scale_layers,
)
from vtc.ops import top_k

SCHEDULES: dict[str, tuple[float, float, float]] = {
    "high": (0.875, 0.625, 0.125),
    "low": (0.5, 0.25, 0.0625),
    "after_selection": (0.5, 0.25, 0.125),
}
"""Fractions left after the published layers 7, 9 and 12."""

_PARTS: tuple[tuple[Record, Record], ...] = (
    ("attention_in", "attention_out"),
    ("mlp_in", "mlp_out"),
)


@dataclass(frozen=True)
class TransPrune(Method):
    """Token transition variation, summed over layers, and instruction-guided attention.

    For the attention and the MLP of a layer, T_in is the input (after the norm) and T_out the
    output (before the residual): m = |T_out| / |T_in|, c = cos(T_out, T_in), and the variation of
    token i is softmax_i(1 - |c_i|) * m_i (eqs. 1-2), summed over both parts and over the layers
    7 to 12 that have run (eqs. 3-4). A layer's softmax is over the tokens it held, and a cut does
    not change weights: survivors keep those of earlier layers, as in the code. (Tokens that another
    method dropped since the last cut are missing from it.) The attention term is the look-ahead
    attention from the text after the image to each token in the layer about to run, mean over rows
    and heads (eq. 5). Each term is divided by its sum over the vision tokens, as in the code but
    not the paper, and `alpha` mixes the two (eq. 6). After layers 7, 9 and 12 int(N * fraction)
    tokens of an image of N are left.

    The code uses 1 - c without the absolute value, and a softmax over the whole sequence;
    `direction="signed"` and `softmax_scope="sequence"` do the same. All vision tokens of a sample
    compete for the sum of its images' budgets. "after_selection" is meant for tokens that
    another method has left: each cut halves what it finds.

    Args:
        schedule: "high" (1.557 of 3.817 TFLOPs on LLaVA-1.5-7B), "low", "after_selection", or the
            fractions of an image's tokens that the three cuts leave, in (0, 1], not ascending;
            (1, 1, 1) drops nothing.
        keep: factor of all fractions of the schedule, in (0, 1].
        alpha: weight of the variation, in [0, 1].
        direction: "abs" or "signed".
        softmax_scope: "image" (all vision tokens held) or "sequence".
        layers: three ascending 0-based layers before which it cuts; by default those after layers
            7, 9 and 12 of 32, scaled to the depth.
        positions: "contiguous" (as in the code) or "original".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "transprune"
    title = "TransPrune: token transition pruning"
    paper = "arXiv:2507.20630"
    year = 2026

    schedule: Literal["high", "low", "after_selection"] | tuple[float, float, float] = "high"
    keep: float = 1.0
    alpha: float = 0.5
    direction: Literal["abs", "signed"] = "abs"
    softmax_scope: Literal["image", "sequence"] = "image"
    layers: tuple[int, int, int] | None = None
    positions: Positions = "contiguous"

    def __post_init__(self) -> None:
        if isinstance(self.schedule, str):
            check_choice("schedule", self.schedule, tuple(SCHEDULES))
        else:
            object.__setattr__(self, "schedule", _three_shares(self.schedule))
        check_fraction("keep", self.keep)
        check_number("alpha", self.alpha, "[0, 1]")
        check_choice("direction", self.direction, ("abs", "signed"))
        check_choice("softmax_scope", self.softmax_scope, ("image", "sequence"))
        layers = check_layers("layers", self.layers, lowest=1)
        if layers is not None and len(layers) != len(self.shares):
            raise ArgumentError("layers", f"expected three layers, got {self.layers}")
        object.__setattr__(self, "layers", layers)
        check_positions(self.positions)

    @property
    def shares(self) -> tuple[float, float, float]:
        """Fractions that the three cuts leave, before `keep` scales them."""
        return SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule

    @property
    def keeps_all(self) -> bool:
        """Whether the schedule, scaled by `keep`, drops nothing."""
        return self.keep == 1.0 and self.shares == (1.0, 1.0, 1.0)

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        """After layers 7, 9 and 12 of 32 (1-based), scaled to the depth, or those that are set.

        Raises:
            ArgumentError: `layers` that the model does not have.
        """
        return scale_layers(self.layers, (0.21875, 0.28125, 0.375), num_layers)

    def watched(self, num_layers: int) -> range:
        """0-based layers whose variation counts: from that before the first cut to the last."""
        cuts = self.prune_layers(num_layers)
        return range(cuts[0] - 1, cuts[-1]) if cuts else range(0)

    def peeks(self, num_layers: int) -> dict[int, Rows]:
        """The text rows of the layers after the cuts."""
        return dict.fromkeys(self.prune_layers(num_layers), "text")

    def records(self, num_layers: int) -> dict[int, frozenset[Record]]:
        """Inputs and outputs of attention and MLP in the watched layers."""
        names = frozenset(name for part in _PARTS for name in part)
        return dict.fromkeys(self.watched(num_layers), names)

    def leaves(self, sizes: tuple[int, ...], held: int, cut: int, cuts: int) -> int:
        """What the schedule leaves of the images, or of the tokens held."""
        share = self.keep * self.shares[cut]
        if self.counts_found:
            # What entered the decoder is unknown here; each cut takes a fraction of what it finds.
            sizes = (held,)
            share = share if cut == 0 else self.shares[cut] / self.shares[cut - 1]
        return max(1, sum(int(n * share) for n in sizes))

    @property
    def counts_found(self) -> bool:
        """Whether the schedule is "after_selection"."""
        return self.schedule == "after_selection"

    def prune(self, state: LayerState) -> Selection:
        """Ascending indices among the sample's vision tokens.

        Raises:
            ValueError: `state` comes without `ahead`.
        """
        cuts, vision = self.prune_layers(state.num_layers), state.vision
        k = self.leaves(state.original, len(vision), cuts.index(state.layer), len(cuts))
        if state.ahead is None and k < len(vision):
            raise ValueError("ahead: TransPrune needs it, got a state without")
        variation, sums = self._measured(state)
        if state.ahead is None or k >= len(vision):
            best = torch.arange(len(vision), device=vision.device)
        else:
            score = self.alpha * _shares(variation)
            if state.ahead.shape[0]:
                score = score + (1 - self.alpha) * _shares(state.ahead[:, vision].mean(0))
            best = top_k(score, k).sort().values
        return Selection(best, memory=torch.cat([sums, variation[best]]))

    def variation(self, state: LayerState) -> Tensor:
        """(n,) the accumulated variation of the vision tokens still held."""
        return self._measured(state)[0]

    def _measured(self, state: LayerState) -> tuple[Tensor, Tensor]:
        """The variation, and (p,) the logarithms of its p softmax denominators, in the order of
        layers and parts. Both pass from cut to cut: dropped tokens count in the logarithms, and
        unless another method dropped tokens, the sum continues from the last cut."""
        vision, total = state.vision, state.hidden.new_zeros(len(state.vision)).float()
        # An answer being scored is not part of the prompt.
        scope = vision if self.softmax_scope == "image" else slice(state.prompt_length)
        parts = self._parts(state, state.layer)
        sums: list[Tensor] = []
        done = 0
        if state.memory is not None:
            cuts = self.prune_layers(state.num_layers)
            known = len(self._parts(state, max(cut for cut in cuts if cut < state.layer)))
            memory = state.memory.to(total)
            sums = [*memory[:known]]
            if len(memory) == known + len(vision):  # tokens are only dropped, so these are the same
                total, done = memory[known:], known
        for at, (layer, (into, out)) in enumerate(parts[done:], done):
            turned, stretched = self._transition(
                state.recorded[layer, into].float(), state.recorded[layer, out].float()
            )
            if at == len(sums):
                sums.append(turned[scope].logsumexp(0))
            total = total + (turned[vision] - sums[at]).exp() * stretched[vision]
        return total, torch.stack(sums)

    def _parts(self, state: LayerState, end: int) -> list[tuple[int, tuple[Record, Record]]]:
        """The (layer, part) pairs that count before layer `end`, in order."""
        layers = [layer for layer in self.watched(state.num_layers) if layer < end]
        return [(layer, part) for layer in layers for part in _PARTS]

    def _transition(self, entered: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """(s,) 1 - c and m, from the (s, d) input and output of a part."""
        before = torch.linalg.vector_norm(entered, dim=1)
        after = torch.linalg.vector_norm(left, dim=1)
        # Like `torch.cosine_similarity`, without its two normalised copies.
        lengths = before.clamp_min(1e-8) * after.clamp_min(1e-8)
        cosine = torch.linalg.vecdot(entered, left) / lengths
        turned = 1 - (cosine.abs() if self.direction == "abs" else cosine)
        return turned, after / before.clamp_min(1e-12)


def _three_shares(given: Any) -> tuple[float, float, float]:
    """The checked fractions of a user-defined schedule."""
    wanted = f"expected one of {', '.join(map(repr, SCHEDULES))}, or three fractions in (0, 1]"
    if not isinstance(given, (tuple, list)):
        raise ArgumentTypeError("schedule", f"{wanted}, got {given!r}")
    numbers = [v for v in given if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(given) != 3 or len(numbers) != 3 or not 1 >= numbers[0] >= numbers[1] >= numbers[2] > 0:
        raise ArgumentError("schedule", f"{wanted}, not ascending, got {given!r}")
    first, second, third = map(float, numbers)
    return (first, second, third)


def _shares(values: Tensor) -> Tensor:
    return values / (values.sum() + 1e-8)
