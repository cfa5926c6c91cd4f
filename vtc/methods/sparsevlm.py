# SPDX-License-Identifier: Apache-2.0
"""SparseVLM: the words that the image concerns say which of its tokens go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vtc.core import (
    LayerState,
    Method,
    Positions,
    Record,
    Rows,
    Selection,
    budget,
    check_choice,
    check_keep,
    check_layer,
    scale_layers,
)
from vtc.ops import density_peaks, top_k


@dataclass(frozen=True)
class SparseVLM(Method):
    """After three decoder layers, keep the vision tokens that the prompt's raters look at most.

    Raters are chosen once, at the embeddings that enter the decoder: each vision token spreads a
    softmax of inner products over the text after the image, and a text token is a rater if its mean
    share is above the average one (the paper has "at least"). If none is, all text rates. A vision
    token's score is the mean attention it gets from the raters in the layer that has just run.

    "v1.5": of the q tokens that go, the int(tau q) + 1 with the best scores are recycled: clustered
    by density peaks on the hidden states into int(theta t) + 1 means, which follow the kept tokens,
    the densest peak first. The paper sums clusters and assigns by cosine; this is the code, less
    the random noise on its densities. "v2" (SparseVLM+) recycles nothing, divides attention by what
    rotary positions alone would give two vectors of ones, so that distant tokens count more, and
    averages the half of the heads that look at the image most. Its factor changes sign on long
    prompts where the rotary base is small; `floor` bounds it.

    The paper's count of deletions by the rank of the attention matrix was tuned to targets by the
    authors, whose code has lists of tokens; so has this: (300, 200, 110) of 576 for their 192,
    (303, 110, 36) for 128, (66, 30, 17) for 64, recycled tokens not counted. Layers really process
    206.5, 145.4 and 82.2 tokens on average. All vision tokens of a sample compete for the sum of
    the budgets of its images. A list that asks for as many as there are, or more, drops one, as in
    the code ("v1.5" recycles it, as the last token). Without text after the image, evenly spaced
    tokens stay.

    Args:
        keep: what each layer leaves: a share of an image's original tokens or a number per image,
            for each; or one for the last, before which shares fall by equal factors. Only a share
            of 1.0 leaves all.
        layers: 0-based layers after which tokens go, ascending; by default after 2, 6 and 15 of
            32, scaled to the depth.
        version: "v1.5" (also the paper's 1.0) or "v2".
        tau: share of the tokens that go which is recycled, in [0, 1]. "v1.5" only.
        theta: clusters for each recycled token, in [0, 1]. "v1.5" only.
        recycle: whether anything is recycled; by default in "v1.5" and not in "v2".
        floor: least rotary factor. "v2" only.
        positions: by default "contiguous" in "v1.5" and "original" in "v2", as in the code. With
            "original" a mean stands at its cluster's centre.
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
        # Lists come from JSON; what is left open depends on the version.
        if isinstance(self.keep, (list, tuple)):
            object.__setattr__(self, "keep", tuple(self.keep))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.recycle is None:
            object.__setattr__(self, "recycle", self.version == "v1.5")
        if self.positions is None:
            positions = "contiguous" if self.version == "v1.5" else "original"
            object.__setattr__(self, "positions", positions)
        for keep in self.keep if isinstance(self.keep, tuple) else (self.keep,):
            check_keep(keep)
        for layer in self.layers or ():
            check_layer("layers", layer)
        if not isinstance(self.recycle, bool):
            raise TypeError(f"recycle: expected True, False or None, got {self.recycle!r}")
        for name, highest in (("tau", 1.0), ("theta", 1.0), ("floor", float("inf"))):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: expected a number, got {value!r}")
            if not 0 <= value <= highest or (name == "floor" and value == 0):
                raise ValueError(f"{name}: expected 0 to {highest:g}, got {value!r}")
        check_choice("positions", self.positions, ("original", "contiguous"))

    # ---- where it acts ------------------------------------------------------------------------
    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers after those of `layers`.

        Raises:
            ValueError: layers that do not ascend, or after which there is none; or as many numbers
                in `keep` as there are not layers.
        """
        found = scale_layers(self.layers, (0.09375, 0.21875, 0.5), num_layers, after=True)
        if (
            self.layers is not None
            and isinstance(self.keep, tuple)
            and len(self.keep) != len(found)
        ):
            raise ValueError(
                f"keep: expected one number, or one for each of the {len(found)} layers, "
                f"got {self.keep}"
            )
        return found

    def taps(self, num_layers: int) -> dict[int, Rows]:
        """The text rows of the layers after which tokens go."""
        return {layer - 1: "text" for layer in self.prune_layers(num_layers)}

    @property
    def by_head(self) -> bool:
        """Only "v2" chooses among heads."""
        return self.version == "v2"

    def records(self, num_layers: int) -> dict[int, frozenset[Record]]:
        """The embeddings that enter the decoder, and for "v2" the rotation of each token."""
        wanted: dict[int, set[Record]] = {0: {"input"}}
        if self.version == "v2":
            for layer in self.prune_layers(num_layers):
                wanted.setdefault(layer - 1, set()).add("rotary")
        return {layer: frozenset(names) for layer, names in wanted.items()}

    def left(self, n: int, stage: int, stages: int) -> int:
        """Tokens of an image of n that stage 0, 1, ... of `stages` keeps, recycled ones apart."""
        if isinstance(self.keep, tuple):
            return budget(self.keep[stage], n)
        share = budget(self.keep, n) / n
        return max(1, round(n * share ** ((stage + 1) / stages)))

    def stays(self, held: int, original: tuple[int, ...], stage: int, stages: int) -> int:
        """Tokens, out of those held, that a stage keeps of images of so many, recycled ones apart:
        all but one at most, unless it is told to keep a share of 1.0."""
        keep = self.keep[stage] if isinstance(self.keep, tuple) else self.keep
        most = held if isinstance(keep, float) and keep == 1.0 else max(1, held - 1)
        return min(most, sum(self.left(n, stage, stages) for n in original))

    def leaves(self, sizes: tuple[int, ...], held: int, cut: int, cuts: int) -> int:
        """What stays, and the means of what is recycled."""
        kept = self.stays(held, sizes, cut, cuts)
        if kept == held or not self.recycle:
            return kept
        return kept + _some(self.theta, _some(self.tau, held - kept))

    @property
    def counts_found(self) -> bool:
        """As what it drops and recycles does."""
        return True

    # ---- what it does -------------------------------------------------------------------------
    def prune(self, state: LayerState) -> Selection:
        """Ascending indices among the sample's vision tokens, and contents where it recycles."""
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
        # With the positions of their own, means stand where their centres did; else all but order
        # is lost, and they take the last of the places that become free.
        slots = recycled[centres]
        if self.positions == "contiguous":
            slots = gone.sort().values[-len(centres) :]
        order = torch.cat([kept, slots]).argsort()
        contents = torch.cat([hidden[kept], means.to(hidden.dtype)])
        if self.positions == "original":
            contents = contents[order]
        return Selection(torch.cat([kept, slots])[order], contents, raters)

    def _raters(self, state: LayerState) -> Tensor:
        """(m,) bool, which rows of the text after the image rate it."""
        entered = state.recorded[0, "input"].float()
        text = entered[state.text]
        if not text.shape[0]:
            return state.text[:0]
        share = (state.of_vision(entered) @ text.T).softmax(1).mean(0)
        raters = share > share.mean()
        return raters | ~raters.any()

    def _scores(self, state: LayerState, raters: Tensor) -> Tensor:
        """(n,) mean attention of the raters to each vision token."""
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
        # A matrix product, not scattered additions, whose order is not fixed on a GPU.
        member = one_hot(joins, clusters).T.float()
        return centres, member @ hidden.float() / member.sum(1, keepdim=True)


def _some(share: float, n: int) -> int:
    """A share of n, and one more, but not more than there are."""
    return min(int(share * n) + 1, n)
