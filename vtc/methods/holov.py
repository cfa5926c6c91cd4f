# SPDX-License-Identifier: Apache-2.0
"""HoloV: a budget for every part of the image, so that no hot spot takes all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtc.core import Method, Positions, Selection, VisionTokens
from vtc.core.errors import ArgumentError
from vtc.core.settings import check_choice, check_keep, check_layer, check_number, check_positions
from vtc.ops import cell_grid, top_k, unit_rows

CHUNK_RATE = (16, 9)
"""Published number of chunks at the published reduction: 16 if one token of 9 is kept."""

_LEAST_VARIANCE = 1e-6


@dataclass(frozen=True)
class HoloV(Method):
    """Split the image into C parts, divide T tokens among them, keep the best of each.

    A is the attention from [CLS] in the tower layer whose output is used; V_i is the variance of
    token i's cosines to the other tokens of its part, by the embeddings after the projector. A part
    gets floor(w_c * T) tokens, w_c its fraction of the sum of (mean score)^tau; the remainder of
    the rounding goes, one each, to the highest w_c.

    "code" is the selection of the released code. Parts are runs of the sequence, tiles and frames
    in turn, the first N mod C one token longer. Its score is A + alpha * V, but V is
    rescaled to the mean A of each part. The mean score then is (1 + alpha) * mean A: V and alpha
    cancel from w_c, and tokens are ranked by A alone. V is therefore not computed. Fixed defects:
    a part with a quota above its size lost tokens to zero vectors; here
    the overflow goes to the parts with room. Parts of one token were scored 1000 times too low. The
    kept tokens came part by part, by descending A; here they ascend.

    "paper" follows the text. Parts are crops of a grid, as square as possible, at most C
    of them, or one per frame and tile if these are more; none spans two frames or tiles. Tokens are
    ranked, and parts weighted, by H = A + alpha * gamma * V, gamma = E|A| / (E|V| + 1e-6). The
    expectations are over the image: over a part, as in the code, V would cancel from w_c again.
    The paper's context fetching in the decoder, which the code lacks too, is left out.

    In both, overflow is divided in proportion to w_c * (M_c - q_c), sizes minus quotas, until less
    than one token is due to each part; the rest goes, one each, to the highest w_c with room.

    Published for LLaVA-1.5: 64 of 576 with C = 16. The Qwen code's rule, C = int(16 / 9 * N / T),
    gives the same there, and 8 and 5 for 128 and 192. Towers without [CLS] use the attention a
    patch receives.

    Args:
        keep: T, as a fraction of an image's tokens or a whole number of tokens per image.
        variant: "code" or "paper".
        chunks: C, at most N; `None` for the rule.
        alpha: weight of V in the paper's score, at least 0 (1 in the paper, 0.09 in the code).
            No effect in "code", as in the released code.
        tau: exponent of a part's mean score, at least 0; 0 weighs all parts equally (1 in the code,
            the paper's value is not known).
        positions: "contiguous" (as in LLaVA) or "original".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "holov"
    title = "HoloV: holistic context over parts of the image"
    paper = "arXiv:2510.02912"
    year = 2025
    needs = frozenset({"cls_attention"})
    vision_layer = -2

    keep: float | int = 0.1111
    variant: Literal["code", "paper"] = "code"
    chunks: int | None = None
    alpha: float = 1.0
    tau: float = 1.0
    positions: Positions = "contiguous"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choice("variant", self.variant, ("code", "paper"))
        check_layer("chunks", self.chunks, lowest=1)
        check_number("alpha", self.alpha, "[0, inf)")
        check_number("tau", self.tau, "[0, inf)")
        check_positions(self.positions)

    @property
    def reads_places(self) -> bool:  # type: ignore[override]
        """Only the crops of the paper are of places."""
        return self.variant == "paper"

    def chunk_count(self, n: int, total: int) -> int:
        """C if `total` of `n` tokens are kept."""
        chunks, reduction = CHUNK_RATE
        wanted = chunks * n // (reduction * total) if self.chunks is None else self.chunks
        return min(max(1, wanted), n)

    def select(self, tokens: VisionTokens) -> Selection:
        """(T,) ascending indices.

        Raises:
            ValueError: `tokens` comes without `cls_attention` or (in "paper") places, or attention
                holds NaN.
        """
        n, device = len(tokens), tokens.features.device
        total = tokens.budget(self.keep)
        if total >= n:
            return Selection(torch.arange(n, device=device))
        if tokens.cls_attention is None:
            raise ValueError("cls_attention: HoloV needs it, got tokens without")
        scores = tokens.cls_attention.float()
        count = self.chunk_count(n, total)
        if self.variant == "code":
            part = _runs(n, count, device)
        else:
            grid = tokens.places(self.name, "divides the grid of tokens into crops")
            part = _crops(grid, tokens.crop, count)
        sizes = torch.bincount(part)
        if self.variant == "paper":
            variance = _variance(tokens.features, part, sizes)
            gamma = scores.mean() / (variance.mean() + _LEAST_VARIANCE)
            scores = scores + self.alpha * gamma * variance
        ranked = top_k(scores, n)
        ranked = ranked[part[ranked].argsort(stable=True)]
        places, filled = _padded(ranked, sizes)
        # In fp64 the sums of equal scores are exact, so that equal parts tie at any size.
        means = (scores.double()[places] * filled).sum(1) / sizes
        weights = (means / means.max().clamp_min(torch.finfo(means.dtype).tiny)) ** self.tau
        quota = quotas(weights.cpu(), sizes.cpu(), total).to(device)
        stays = torch.arange(places.shape[1], device=device) < quota[:, None]
        return Selection(places[stays].sort().values)


def quotas(weights: Tensor, sizes: Tensor, total: int) -> Tensor:
    """Divide `total` tokens among parts by weight, none above its size.

    First floor(w * total) with w the weights over their sum; the remainder goes, one each, to the
    highest weights. What exceeds a part's size goes to the others in proportion to w times their
    room, rounded down and repeated; once this is less than a token for each, one each to the
    highest weights with room. Ties go to the lowest index. If all weights are 0, parts count
    equally; if only parts with weight 0 have room, their room decides.

    Args:
        weights: (c,) finite numbers of at least 0, on the CPU.
        sizes: (c,) integers, on the CPU.
        total: tokens, from 0 to the sum of `sizes`.

    Returns:
        (c,) integers up to `sizes` whose sum is `total`.

    Raises:
        ArgumentError: `total` out of range, or weights that are negative or not finite.
    """
    if not 0 <= total <= int(sizes.sum()):
        raise ArgumentError(
            "total", f"expected 0 to the {int(sizes.sum())} tokens there, got {total}"
        )
    wide = weights.double()
    if not bool((torch.isfinite(wide) & (wide >= 0)).all()):
        raise ArgumentError("weights", "expected finite numbers of at least 0, got others")
    if not bool(wide.any()):
        wide = torch.ones_like(wide)
    wide = wide / wide.sum()
    quota = (wide * total).floor().long()
    best = wide.argsort(descending=True, stable=True)
    quota[best[: total - int(quota.sum())]] += 1
    quota = quota.minimum(sizes)
    while left := total - int(quota.sum()):
        room = sizes - quota
        due = wide * room
        if not bool(due.any()):
            due = room.double()
        more = (due / due.sum() * left).floor().long().minimum(room)
        if not bool(more.any()):
            more[best[room[best] > 0][:left]] = 1
        quota = quota + more
    return quota


def _runs(n: int, count: int, device: torch.device) -> Tensor:
    """(n,) the run of each token, out of `count`, the first n mod `count` one token longer."""
    short, longer = divmod(n, count)
    place = torch.arange(n, device=device)
    ahead = longer * (short + 1)
    return torch.where(place < ahead, place // (short + 1), longer + (place - ahead) // short)


def _crops(grid: Tensor, crop: Tensor | None, count: int) -> Tensor:
    """(n,) the crop of each token, out of about `count`, numbered without gaps.

    Frames and tiles are separate planes; each has crops in proportion to its tokens.
    """
    n, device = grid.shape[0], grid.device
    frame, place = grid[:, :1].long(), grid[:, 1:].long()
    planes = frame if crop is None else torch.cat([crop[:, None].long(), frame], 1)
    plane = torch.unique(planes, dim=0, return_inverse=True)[1]
    members = torch.bincount(plane)
    pairs = plane[:, None].expand(-1, 2)
    ends = place.new_zeros(len(members), 2)
    low = ends.scatter_reduce(0, pairs, place, "amin", include_self=False)
    high = ends.scatter_reduce(0, pairs, place, "amax", include_self=False)
    extent = high - low + 1
    # The sizes of all planes go to the host in one transfer; the division is cached there.
    divisions = torch.tensor(
        [
            cell_grid(rows, cols, max(1, count * held // n))
            for (rows, cols), held in zip(extent.tolist(), members.tolist(), strict=True)
        ],
        device=device,
    )
    # Twice the tokens' centres as integers, as in `pool_grid`.
    cell = (2 * (place - low[plane]) + 1) * divisions[plane] // (2 * extent[plane])
    held = divisions.prod(1)
    number = (held.cumsum(0) - held)[plane] + cell[:, 0] * divisions[plane, 1] + cell[:, 1]
    return torch.unique(number, return_inverse=True)[1]


def _padded(grouped: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """(c, m) tokens of each part, from (n,) tokens ordered by part, and a mask without padding."""
    slot = torch.arange(int(sizes.max()), device=sizes.device)
    starts = sizes.cumsum(0) - sizes
    places = grouped[(starts[:, None] + slot).clamp_max(len(grouped) - 1)]
    return places, slot < sizes[:, None]


def _variance(features: Tensor, part: Tensor, sizes: Tensor) -> Tensor:
    """(n,) variance of each token's cosines to the others of its part, 0 for a single token."""
    places, filled = _padded(part.argsort(stable=True), sizes)
    rows = unit_rows(features)
    blocks = rows[places]
    cosines = blocks @ blocks.transpose(1, 2)
    itself = torch.eye(places.shape[1], dtype=torch.bool, device=part.device)
    others = (filled[:, None, :] & ~itself).to(rows.dtype)
    count = (sizes - 1).clamp_min(1)[:, None]
    mean = (cosines * others).sum(2) / count
    spread = ((cosines - mean[..., None]).square() * others).sum(2) / count
    found = rows.new_zeros(len(part))
    found[places[filled]] = spread[filled]
    return found
