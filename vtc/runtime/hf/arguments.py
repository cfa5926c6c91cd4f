# SPDX-License-Identifier: Apache-2.0
"""Arguments of forwards: by name, by token, and masks of them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def by_name(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = "forward"
) -> dict[str, Any]:
    """The arguments of a method, whether they were named or not."""
    if not args:
        return kwargs
    names = inspect.signature(getattr(type(module), name)).bind_partial(module, *args).arguments
    names.pop("self", None)
    return {**names, **kwargs}


def is_per_token(value: Any, rows: int, length: int) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 2 and value.shape[:2] == (rows, length)


def take(value: Tensor, place: Tensor) -> Tensor:
    """`value` (b, s, ...) at the (b, k) places `place`."""
    place = place.to(value.device)
    trailing = value.shape[2:]
    index = place.view(*place.shape, *([1] * len(trailing))).expand(*place.shape, *trailing)
    return value.gather(1, index)


def keep_all_states(kwargs: dict[str, Any]) -> None:
    """Layers that share keys with earlier ones may run for the last tokens only; masks and
    positions of a compressed sequence are made for all of them."""
    if "logits_to_keep" in kwargs:
        kwargs["logits_to_keep"] = 0


def ones(like: Tensor, length: int) -> Tensor:
    return torch.ones(like.shape[0], length, dtype=torch.bool, device=like.device)


def split_mask(mask: Any, past: int, rows: int, length: int) -> tuple[Tensor | None, Tensor | None]:
    """The 2-D mask of the past and of the new tokens, `None` for all valid."""
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = f"a tensor of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask)
        raise ValueError(
            f"attention_mask: a patched model takes a mask of shape (batch, tokens), got {got}"
        )
    if mask.shape != (rows, past + length):
        raise ValueError(
            f"attention_mask: expected shape {(rows, past + length)} for {past} cached and "
            f"{length} new tokens, got {tuple(mask.shape)}"
        )
    mask = mask.bool()
    return mask[:, :past], mask[:, past:]
