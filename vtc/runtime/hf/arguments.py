# SPDX-License-Identifier: Apache-2.0
"""Helpers for the arguments of forwards: names, per-token tensors and masks."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vtc.core.errors import ArgumentError


def by_name(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = "forward"
) -> dict[str, Any]:
    """The arguments of a call by name.

    Args:
        module: whose method is called.
        args: positional arguments.
        kwargs: keyword arguments.
        name: of the method.

    Returns:
        All arguments by name; `kwargs` itself if `args` is empty.
    """
    if not args:
        return kwargs
    names = inspect.signature(getattr(type(module), name)).bind_partial(module, *args).arguments
    names.pop("self", None)
    return {**names, **kwargs}


def is_per_token(value: Any, rows: int, length: int) -> bool:
    """Whether `value` is a tensor of shape (rows, length, ...)."""
    return isinstance(value, Tensor) and value.dim() >= 2 and value.shape[:2] == (rows, length)


def take(value: Tensor, place: Tensor) -> Tensor:
    """Gather tokens.

    Args:
        value: (b, s, ...).
        place: (b, k) places on the second axis.

    Returns:
        (b, k, ...).
    """
    place = place.to(value.device)
    trailing = value.shape[2:]
    index = place.view(*place.shape, *([1] * len(trailing))).expand(*place.shape, *trailing)
    return value.gather(1, index)


def keep_all_states(kwargs: dict[str, Any]) -> None:
    """Set `logits_to_keep` to 0 in place, if present.

    Layers that share keys with earlier ones may otherwise run for the last tokens only, but masks
    and positions of a compressed sequence cover all tokens.

    Args:
        kwargs: the arguments of the decoder.
    """
    if "logits_to_keep" in kwargs:
        kwargs["logits_to_keep"] = 0


def ones(like: Tensor, length: int) -> Tensor:
    """A (b, length) mask of True, with the rows and the device of `like` (b, ...)."""
    return torch.ones(like.shape[0], length, dtype=torch.bool, device=like.device)


def split_mask(mask: Any, past: int, rows: int, length: int) -> tuple[Tensor | None, Tensor | None]:
    """Split a 2-D mask into cached and new tokens.

    Args:
        mask: (rows, past + length), or `None` for all valid.
        past: number of cached tokens.
        rows: batch size.
        length: number of new tokens.

    Returns:
        (rows, past) and (rows, length) bool, or two `None` if `mask` is `None`.

    Raises:
        ArgumentError: `mask` is not a tensor of that shape.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = f"a tensor of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask)
        raise ArgumentError(
            "attention_mask", f"a patched model takes a mask of shape (batch, tokens), got {got}"
        )
    if mask.shape != (rows, past + length):
        raise ArgumentError(
            "attention_mask",
            f"expected shape {(rows, past + length)} for {past} cached and "
            f"{length} new tokens, got {tuple(mask.shape)}",
        )
    mask = mask.bool()
    return mask[:, :past], mask[:, past:]
