# SPDX-License-Identifier: Apache-2.0
"""VisionZip: patches with the most [CLS] attention, and a few that represent the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtc.core import Method, Positions, Selection, VisionTokens
from vtc.core.settings import check_choice, check_keep, check_number, check_positions
from vtc.ops import top_k
from vtc.ops.merging import sums


@dataclass(frozen=True)
class VisionZip(Method):
    """Dominant tokens by attention from [CLS], contextual ones by merging the rest.

    Of T tokens, D are dominant: [CLS] itself and the D - 1 patches that it attends to most, in the
    tower layer whose output is used. Of the other patches, C at even steps are targets; each
    remaining patch joins the target with the most similar key (cosine, keys averaged over heads),
    and a target becomes its own state plus the mean state of those that joined it. The code adds,
    which increases the norms; `merge_by="mean"` halves the sum instead. Merged states and [CLS] go
    through the projector.

    Published splits of 192, 128 and 64: 162 + 30, 108 + 20 and 54 + 10, [CLS] counted as dominant;
    `contextual` is the fraction of the second part. The language model sees [CLS], the dominant
    patches in raster order, then the contextual tokens, as in the code; with original positions
    every token keeps its patch's place, [CLS] takes that of the first patch not kept. Towers
    without [CLS] rank by the attention a patch receives (appendix A.2), and all D are patches.

    Args:
        keep: T, as a fraction of an image's tokens or a whole number of tokens per image.
        contextual: C / T, in [0, 1); unless it is 0 or T is 1, C is at least 1.
        merge_by: "sum" (as in the code) or "mean".
        positions: "contiguous" (as in LLaVA) or "original".

    Raises:
        ArgumentError, ArgumentTypeError: a setting that is not accepted.
    """

    name = "visionzip"
    title = "VisionZip: dominant and contextual tokens"
    paper = "arXiv:2412.04467"
    year = 2024
    needs = frozenset({"cls_attention", "keys", "encoder"})
    vision_layer = -2

    keep: float | int = 0.1111
    contextual: float = 10 / 64
    merge_by: Literal["sum", "mean"] = "sum"
    positions: Positions = "contiguous"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_number("contextual", self.contextual, "[0, 1)")
        check_choice("merge_by", self.merge_by, ("sum", "mean"))
        check_positions(self.positions)

    def split(self, total: int) -> tuple[int, int]:
        """Dominant ([CLS] included) and contextual tokens out of `total`."""
        if self.contextual == 0 or total == 1:
            return total, 0
        contextual = min(max(1, round(total * self.contextual)), total - 1)
        return total - contextual, contextual

    def select(self, tokens: VisionTokens) -> Selection:
        """(T,) ascending indices and (T, d) contents.

        Raises:
            ValueError: `tokens` comes without the signals in `needs`.
        """
        n, device = len(tokens), tokens.features.device
        total = tokens.budget(self.keep)
        if total >= n:
            return Selection(torch.arange(n, device=device))
        attention, keys = tokens.cls_attention, tokens.keys
        if attention is None or keys is None or tokens.encoder is None:
            raise ValueError(
                "cls_attention, keys, encoder: VisionZip needs them, got tokens without"
            )
        states, project = tokens.mergeable
        cls = None if tokens.project is None else tokens.encoder_cls
        dominant_count, contextual_count = self.split(total)
        patches = dominant_count - (cls is not None)
        dominant = top_k(attention, patches).sort().values
        rest = _others(dominant, n)
        # Evenly spaced; `rest` is long enough, as fewer tokens are kept than exist.
        step = max(1, len(rest) // max(contextual_count, 1))
        targets = rest[::step][:contextual_count]
        joining = rest[~torch.isin(rest, targets)]
        nearest = _nearest(keys.view(n, tokens.heads, -1).mean(1), joining, targets)
        merged = self._merged(states, joining, nearest, targets)
        new = [] if cls is None else [project(cls[None])]
        if contextual_count:
            new.append(project(merged.to(states.dtype)))
        own = torch.cat([dominant, targets])
        if cls is None:
            slots = own
            contents = torch.cat([tokens.features[dominant], *new])
        else:
            slots = torch.cat([_others(own.sort().values, n)[:1], own])
            contents = torch.cat([new[0], tokens.features[dominant], *new[1:]])
        order = slots.argsort()
        place = torch.arange(len(slots), device=device)
        if self.positions == "original":
            contents, place = contents[order], order.argsort()
        place = place[len(slots) - len(own) :]  # [CLS] has no patch
        sources = rest.new_full((n,), -1)
        sources[own] = place
        if len(targets):
            sources[joining] = place[len(dominant) :][nearest]
        return Selection(slots[order], contents, sources=sources)

    def _merged(self, states: Tensor, joining: Tensor, nearest: Tensor, targets: Tensor) -> Tensor:
        """(C, d_v) states of the targets, after merging patches (m,) into the `nearest` (m,)."""
        held = states[targets].float()
        if not len(joining) or not len(targets):
            return held
        # Patches that join no target get their own group: copying all others would take longer.
        group = joining.new_full((len(states),), len(targets)).index_copy_(0, joining, nearest)
        count = torch.bincount(nearest, minlength=len(targets)).to(held.dtype)
        total = sums(states.float(), group, len(targets) + 1)[:-1]
        mean = total / count.clamp(min=1)[:, None]
        if self.merge_by == "sum":
            return held + mean
        return torch.where(count[:, None] > 0, (held + mean) / 2, held)


def _nearest(keys: Tensor, joining: Tensor, targets: Tensor) -> Tensor:
    """(m,) for each patch of `joining` the number of the target with the most similar key."""
    if not len(targets):
        return joining[:0]
    metric = normalize(keys.float(), dim=1)
    return (metric[joining] @ metric[targets].T).argmax(1)


def _others(chosen: Tensor, n: int) -> Tensor:
    """(n - k,) ascending indices not in the (k,) `chosen`."""
    free = torch.ones(n, dtype=torch.bool, device=chosen.device)
    free[chosen] = False
    return free.nonzero().squeeze(1)
