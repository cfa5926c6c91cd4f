# SPDX-License-Identifier: Apache-2.0
"""Runs the plain model on a short sequence, and times its tower."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vtc.core.events import Encoded, Event

if TYPE_CHECKING:
    import torch


class Tower:
    """Replaces `get_image_features` of the plain model: times it, and truncates its output."""

    def __init__(self, base: Any, device: torch.device, always: Mapping[str, Any]) -> None:
        from vtc.core.prefill import Stopwatch

        self.base, self.device, self.always = base, device, dict(always)
        self.original, self.clock = base.get_image_features, Stopwatch()
        self.keep: int | None = None
        self.heard = Stopwatch()

    def reset(self) -> None:
        self.clock.reset()
        self.heard.reset()

    @property
    def ms(self) -> float:
        """Milliseconds of tower and projector, without captures for a method."""
        return self.clock.ms - self.heard.ms

    @property
    def __signature__(self) -> inspect.Signature:  # vtc inspects it
        return inspect.signature(self.original)

    def hear(self, event: Event) -> None:
        """Listen to a patch: captures while the tower runs are not the tower's time."""
        if isinstance(event, Encoded):
            # Later captures run on the same clock. Copied, as reading milliseconds would wait for
            # the device.
            self.heard = event.heard.copy()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        started = self.clock.start(self.device)
        given = inspect.signature(self.original).bind_partial(*args).arguments
        out = self.original(**{**given, **kwargs, **self.always})
        self.clock.stop(started, self.device)
        if self.keep is not None:
            out.pooler_output = [features[: self.keep] for features in out.pooler_output]
        return out


class Cut:
    """Truncates the sequence before decoder layers to `lengths`, keeping the last tokens."""

    def __init__(self, layers: Any, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.memo: dict[Any, Any] = {}
        self.handles = [
            layers[i].register_forward_pre_hook(self._hook(i), with_kwargs=True)
            for i in range(first_cut(lengths) or len(lengths), len(lengths))
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            prefill = hidden.shape[1] > 1
            n = self.lengths[layer] if prefill else 1
            mask: Any = kwargs.get("attention_mask")
            if getattr(mask, "ndim", 0) == 4:
                keys = n if prefill else cache_of(kwargs).layers[layer].get_seq_length() + 1
                kwargs["attention_mask"] = mask[..., -n:, -keys:]
            if prefill:
                hidden = hidden[:, -n:]
                if n not in self.memo:
                    place, turns = kwargs.get("position_ids"), kwargs["position_embeddings"]
                    self.memo[n] = (
                        None if place is None else place[..., -n:],
                        tuple(turn[..., -n:, :].contiguous() for turn in turns),
                    )
                kwargs["position_ids"], kwargs["position_embeddings"] = self.memo[n]
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return hook


def first_cut(lengths: Sequence[int]) -> int | None:
    """The first layer with fewer tokens than layer 0, or `None`."""
    return next((i for i, n in enumerate(lengths) if n < lengths[0]), None)


def longest(seen: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(max(column) for column in zip(*seen, strict=True))


def cache_of(given: Mapping[str, Any]) -> Any:
    found = given.get("cache")
    return given.get("past_key_values") if found is None else found
