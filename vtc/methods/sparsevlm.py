# SPDX-License-Identifier: Apache-2.0
"""SparseVLM: text tokens relevant to the image rate its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vtc.core import LayerState, Method, Positions, Record, Rows, Selection
from vtc.core.errors import ArgumentError
from vtc.core.settings import (
    budget,
    check_choice,
    check_flag,
    check_keep,
    check_layers,
    check_number,
    check_positions,
    scale_layers,
)
from vtc.ops import density_peaks, top_k


@dataclass(frozen=True)
class SparseVLM(Method):
    """After three decoder layers, keep the vision tokens with the most attention from the raters.

    Raters are chosen once, from the embeddings that enter the decoder: each vision token spreads a
    softmax of inner products over the text after the image, and a text token is a rater if its mean
    weight is above average (the paper has "at least"). If none is, all text tokens rate. A vision
    token's score is its mean attention from the raters in the layer that just ran.

    "v1.5": of the q dropped tokens, the int(tau q) + 1 with the best scores are recycled: clustered
    by density peaks on the hidden states into int(theta t) + 1 means, which follow the kept tokens,
    the densest peak first. The paper sums clusters and assigns by cosine; this follows the code,
    without the random noise on its densities. "v2" (SparseVLM+) recycles nothing, divides attention
    by what rotary positions alone give two vectors of ones, so that distant tokens count more, and
    averages the half of the heads with the most attention to the image. Its factor changes sign on
    long prompts if the rotary base is small; `floor` bounds it.

    The authors tuned the paper's number of deletions (by the rank of the attention matrix) to
    targets, and their code has lists of tokens, as has this: (300, 200, 110) of 576 for their 192,
    (303, 110, 36) for 128, (66, 30, 17) for 64, without recycled tokens. Layers actually process
    206.5, 145.4 and 82.2 tokens on average. All vision tokens of a sample compete for the sum of
    its images' budgets. A list that keeps at least as many tokens as there are drops one, as in
    the code ("v1.5" recycles it, as the last token). Without text after the image, evenly spaced
    tokens stay.

    Args:
        keep: what each cut leaves: a fraction of an image's original tokens or a number per image,
            one for each cut; or one for the last cut, to which fractions fall by equal factors.
            Only a fraction of 1.0 keeps all.
        layers: ascending 0-based layers after which tokens are dropped; by default after 2, 6 and
            15 of 32, scaled to the depth.
        version: "v1.5" (also the paper's 1.0) or "v2".
        tau: fraction of the dropped tokens that is recycled, in [0, 1]. "v1.5" only.
        theta: clusters per recycled token, in [0, 1]. "v1.5" only.
        recycle: whether tokens are recycled; by default in "v1.5" and not in "v2".
        floor: lower bound of the rotary factor, above 0. "v2" only.
        positions: by default "contiguous" in "v1.5" and "original" in "v2", as in the code. With
            "original" a mean stands at its cluster's centre.

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "sparsevlm"
    title = "SparseVLM: text-guided sparsification with recycling"
    paper = "arXiv:2410.04417"
    year = 2024

    keep: float | int | tuple[float | int, ...] = (300 / 576, 200 / 576, 110 / 576)
    layers: tuple[int, ...] | None = None
    version: Literal["v1.5", "v2"] = "v1.5"
    tau: float = 0.3
    theta: float = 0.1
    recycle: bool | None = None
    floor: float = 0.5
    positions: Positions = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_choice("version", self.version, ("v1.5", "v2"))
        # Lists come from JSON; some defaults depend on the version.
        if isinstance(self.keep, (list, tuple)):
            object.__setattr__(self, "keep", tuple(self.keep))
        object.__setattr__(self, "layers", check_layers("layers", self.layers))
        if self.recycle is None:
            object.__setattr__(self, "recycle", self.version == "v1.5")
        if self.positions is None:
            positions = "contiguous" if self.version == "v1.5" else "original"
            object.__setattr__(self, "positions", positions)
        for keep in self.keep if isinstance(self.keep, tuple) else (self.keep,):
            check_keep(keep)
        check_flag("recycle", self.recycle)
        check_number("tau", self.tau, "[0, 1]")
        check_number("theta", self.theta, "[0, 1]")
        check_number("floor", self.floor, "(0, inf)")
        check_positions(self.positions)

    # ---- where it acts ------------------------------------------------------------------------
    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers after those of `layers`.

        Raises:
            ArgumentError: layers that do not ascend, or without a layer after them, or a `keep`
                with another number of entries than `layers`.
        """
        found = scale_layers(self.layers, (0.09375, 0.21875, 0.5), num_layers, after=True)
        if (
            self.layers is not None
            and isinstance(self.keep, tuple)
            and len(self.keep) != len(found)
        ):
            raise ArgumentError(
                "keep",
                f"expected one number, or one for each of the {len(found)} layers, got {self.keep}",
            )
        return found

    def taps(self, num_layers: int) -> dict[int, Rows]:
        """The text rows of the layers after which tokens are dropped."""
        return {layer - 1: "text" for layer in self.prune_layers(num_layers)}

    @property
    def by_head(self) -> bool:
        """Whether the version is "v2", which selects heads."""
        return self.version == "v2"

    def records(self, num_layers: int) -> dict[int, frozenset[Record]]:
        """The embeddings that enter the decoder, and for "v2" the rotation of each token."""
        wanted: dict[int, set[Record]] = {0: {"input"}}
        if self.version == "v2":
            for layer in self.prune_layers(num_layers):
                wanted.setdefault(layer - 1, set()).add("rotary")
        return {layer: frozenset(names) for layer, names in wanted.items()}

    def left(self, n: int, stage: int, stages: int) -> int:
        """Tokens of an image of n that stage 0, 1, ... of `stages` keeps, without recycled ones."""
        if isinstance(self.keep, tuple):
            return budget(self.keep[stage], n)
        share = budget(self.keep, n) / n
        return max(1, round(n * share ** ((stage + 1) / stages)))

    def stays(self, held: int, original: tuple[int, ...], stage: int, stages: int) -> int:
        """Tokens that a stage keeps, without recycled ones: at most all but one of the `held`,
        unless `keep` is a fraction of 1.0.

        Args:
            held: vision tokens left before the stage.
            original: original tokens of each image.
            stage: 0-based stage, out of `stages`.
        """
        keep = self.keep[stage] if isinstance(self.keep, tuple) else self.keep
        most = held if isinstance(keep, float) and keep == 1.0 else max(1, held - 1)
        return min(most, sum(self.left(n, stage, stages) for n in original))

    def leaves(self, sizes: tuple[int, ...], held: int, cut: int, cuts: int) -> int:
        """The kept tokens and the means of recycled ones."""
        kept = self.stays(held, sizes, cut, cuts)
        if kept == held or not self.recycle:
            return kept
        return kept + _some(self.theta, _some(self.tau, held - kept))

    @property
    def counts_found(self) -> bool:
        """Always `True`: what it recycles depends on what it finds."""
        return True

    # ---- what it does -------------------------------------------------------------------------
    def prune(self, state: LayerState) -> Selection:
        """Ascending indices among the sample's vision tokens, and contents if it recycles."""
        layers = self.prune_layers(state.num_layers)
        stage, vision = layers.index(state.layer), state.vision
        raters = self._raters(state) if state.memory is None else state.memory
        n = vision.shape[0]
        k = self.stays(n, state.original, stage, len(layers))
        if k == n:
            return Selection(torch.arange(n, device=vision.device), memory=raters)
        if not raters.shape[0]:
            even = torch.arange(k, device=vision.device) * n // k
            return Selection(even, memory=raters)
        ranked = top_k(self._scores(state, raters), n)
        kept = ranked[:k].sort().values
        if not self.recycle:
            return Selection(kept, memory=raters)
        hidden = state.of_vision(state.hidden)
        gone = ranked[k:]
        recycled = gone[: _some(self.tau, len(gone))].sort().values
        centres, means = self._recycled(hidden[recycled])
        # With original positions a mean stands at its centre; otherwise only the order matters, and
        # means take the last free places.
        slots = recycled[centres]
        if self.positions == "contiguous":
            slots = gone.sort().values[-len(centres) :]
        order = torch.cat([kept, slots]).argsort()
        contents = torch.cat([hidden[kept], means.to(hidden.dtype)])
        if self.positions == "original":
            contents = contents[order]
        return Selection(torch.cat([kept, slots])[order], contents, raters)

    def _raters(self, state: LayerState) -> Tensor:
        """(m,) bool, which text tokens after the image are raters."""
        entered = state.recorded[0, "input"].float()
        text = entered[state.text]
        if not text.shape[0]:
            return state.text[:0]
        share = (state.of_vision(entered) @ text.T).softmax(1).mean(0)
        raters = share > share.mean()
        return raters | ~raters.any()

    def _scores(self, state: LayerState, raters: Tensor) -> Tensor:
        """(n,) mean attention from the raters to each vision token."""
        vision, layer = state.vision, state.layer - 1
        rows = state.attention[layer][..., raters, :][..., vision]
        if self.version == "v1.5":
            return rows.mean(0)
        turned = state.recorded[layer, "rotary"].float()
        rotary = turned[state.text][raters] @ state.of_vision(turned).T / turned.shape[1] ** 0.5
        rows = rows / rotary.clamp_min(self.floor)
        heads = top_k(rows.sum((1, 2)), max(1, rows.shape[0] // 2))
        return rows[heads].mean((0, 1))

    def _recycled(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(c,) centres among the (t, d) tokens to recycle, and (c, d) means of their clusters."""
        clusters = _some(self.theta, hidden.shape[0])
        centres, joins = density_peaks(hidden, clusters, clusters)
        # A matrix product, as the order of scattered additions is not fixed on a GPU.
        member = one_hot(joins, clusters).T.float()
        return centres, member @ hidden.float() / member.sum(1, keepdim=True)


def _some(share: float, n: int) -> int:
    """int(share * n) + 1, at most n."""
    return min(int(share * n) + 1, n)
