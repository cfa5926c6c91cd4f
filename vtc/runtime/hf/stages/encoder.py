# SPDX-License-Identifier: Apache-2.0
"""The encoder stage: patches merged or dropped inside the vision tower."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vtc.core import EncoderState, Merging, Method
from vtc.models import Adapter, UnsupportedModelError
from vtc.runtime.choices import no_autocast
from vtc.runtime.forward import Forward
from vtc.runtime.hf import taps
from vtc.runtime.hf.override import Override
from vtc.runtime.hf.stages.base import Runner, Shortened

if TYPE_CHECKING:
    from vtc.runtime.hf.vision import Encoding


@dataclass
class Patches:
    """The tokens of one image in the tower, without [CLS].

    Attributes:
        original: patches before anything was merged or dropped.
        size: (n,) number of patches that each token represents.
        source: (n,) the first of these patches.
        memory: (n,) what the method passes from layer to layer.
        counts: tokens that entered each layer, and those that left the last.
    """

    original: int
    size: Tensor
    source: Tensor
    memory: Tensor | None
    counts: list[int]


class EncoderRunner(Runner):
    """Runs the tower image by image, so that each image may keep its own number of patches.

    The tower is modified only during a call: other models may share it, and its modules may be
    replaced between calls.
    """

    stage: ClassVar[str] = "encoder"
    shortens: ClassVar[bool] = True
    changes_tower: ClassVar[bool] = True

    def __init__(
        self, adapter: Adapter, method: Method, current: Callable[[], Forward | None]
    ) -> None:
        super().__init__(adapter, method, current)
        (self.merger,) = (part for _, part in self.parts)
        MergingTower(self.merger, adapter, {}, lambda: True)

    def encode(
        self, encoding: Encoding, original: Callable[..., Any], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Shortened]]:
        """Run `get_image_features` image by image; see `Runner.encode`.

        Raises:
            UnsupportedModelError: no layer runs before the one that is read, or [CLS] is a vision
                token.
            ValueError: the method returns an invalid merging.
            RuntimeError: the projector returns another number of tokens, or the method weighs
                attention and the tower uses flash attention.
        """
        if self.merger.keeps_all:
            return original(**kwargs), []
        tower = MergingTower(
            self.merger, encoding.adapter, encoding.given, lambda: encoding.current
        )
        with tower.installed():
            return tower.encode(original, kwargs)


class MergingTower:
    """The tower during one call.

    Args:
        method: what merges the patches.
        adapter: bound to the model.
        given: the arguments of the call.
        current: whether the call is the innermost of this thread.

    Raises:
        UnsupportedModelError: no layer runs before the one that is read, or [CLS] is a vision
            token, and the method does not keep all patches.
    """

    def __init__(
        self,
        method: Method,
        adapter: Adapter,
        given: Mapping[str, Any],
        current: Callable[[], bool],
    ) -> None:
        self.method, self.current = method, current
        self.layers = adapter.encoder_layers()
        self.used = adapter.encoder_depth(given)
        if self.used < 1 and not method.keeps_all:
            raise UnsupportedModelError(
                "vision_feature_layer: no layer of the tower runs before the one that is read, "
                f"and {method.name} merges patches in them"
            )
        self.has_cls = adapter.has_cls()
        kept = not adapter.prefix(given)
        if self.has_cls and kept and not method.keeps_all:
            raise UnsupportedModelError(
                "vision_feature_select_strategy: got 'full', in which [CLS] is a vision token, and "
                f"{method.name} merges patches into tokens that have a place; accepted is "
                "'default'"
            )
        self.taps: list[taps.Tap] = []
        self.patches: Patches | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Context in which the layers of the tower merge."""
        overrides: list[Override] = []
        try:
            for i, layer in enumerate(self.layers[: self.used]):
                self.taps.append(taps.install(layer.self_attn))
                overrides.append(Override(layer, "forward", functools.partial(self._layer, i)))
            yield
        finally:
            for override in reversed(overrides):
                override.remove()
            for tap in self.taps:
                tap.remove()

    def encode(
        self, original: Callable[..., Any], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Shortened]]:
        """Run `original` for each image; see `Runner.encode`."""
        kwargs = dict(kwargs)
        pixels = kwargs.pop("pixel_values")
        features, shortened, out = [], [], None
        for image in pixels.split(1):
            self.patches = Patches(0, pixels.new_empty(0), pixels.new_empty(0), None, [])
            out = original(pixel_values=image, **kwargs)
            patches = self.patches
            (found,) = out.pooler_output
            places, order = patches.source.sort()
            if len(found) != len(places):
                raise RuntimeError(
                    f"the projector made {len(found)} vision tokens of {len(places)} patches: "
                    f"{self.method} cannot tell their places"
                )
            features.append(found[order])
            kept = places if len(places) < patches.original else None
            shortened.append(Shortened(patches.original, kept, tuple(patches.counts)))
        assert out is not None
        out.pooler_output = features
        return out, shortened

    def _layer(
        self,
        i: int,
        original: Callable[..., Any],
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        patches = self.patches
        if patches is None or not self.current():  # of a nested call, or another thread
            return original(hidden_states, attention_mask, **kwargs)
        layer: Any = self.layers[i]
        prefix = int(self.has_cls)
        if i == 0:
            n = hidden_states.shape[1] - prefix
            patches.original = n
            patches.size = torch.ones(n, device=hidden_states.device)
            patches.source = torch.arange(n, device=hidden_states.device)
        patches.counts.append(len(patches.size))
        heard: dict[str, Tensor] = {}

        def capture(
            query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]
        ) -> None:
            rows = query[:, :, :1] if self.has_cls else query
            bias = None if mask is None else mask[:, :, : rows.shape[2]]
            received = taps.mean_attention(rows, key, None, bias, taps.Options.of(options))
            heard["attention"] = received[0, 0].mean(0)
            heard["keys"], heard["values"] = key[0].transpose(0, 1), value[0].transpose(0, 1)

        self.taps[i].arm(capture)
        normed = layer.layer_norm1(hidden_states)
        attended, _ = layer.self_attn(
            hidden_states=normed, attention_mask=self._sizes(patches, normed), **kwargs
        )
        self.taps[i].armed = None
        hidden = hidden_states + attended
        state = EncoderState(
            layer=i,
            num_layers=self.used,
            original=patches.original,
            has_cls=self.has_cls,
            attention=heard["attention"][prefix:],
            keys=heard["keys"][prefix:],
            values=heard["values"][prefix:],
            cls_value=heard["values"][0] if prefix else None,
            size=patches.size,
            memory=patches.memory,
        )
        with no_autocast(hidden):
            merging = self.method.merge(state)
        if merging is not None:
            rows = merge_rows(self.method, merging, patches, hidden[0, prefix:])
            hidden = torch.cat([hidden[:, :prefix], rows[None]], dim=1)
        if i == self.used - 1:
            patches.counts.append(len(patches.size))
        return hidden + layer.mlp(layer.layer_norm2(hidden))

    def _sizes(self, patches: Patches, hidden: Tensor) -> Tensor | None:
        """(1, 1, t, t) log sizes of the tokens, added to the attention logits."""
        if not self.method.weighs_sizes or len(patches.size) == patches.original:
            return None
        if "flash" in (self.taps[0].config._attn_implementation or ""):
            raise RuntimeError(
                f"attn_implementation: {self.method} weighs attention in the vision tower, which "
                "flash attention cannot; load the model with attn_implementation='sdpa'"
            )
        sizes = torch.cat([patches.size.new_ones(int(self.has_cls)), patches.size]).log()
        return sizes.to(hidden.dtype)[None, None, None].expand(1, 1, len(sizes), -1)


def merge_rows(method: Method, merging: Merging, patches: Patches, rows: Tensor) -> Tensor:
    """Carry out a merging.

    Args:
        method: named in errors.
        merging: what it returned.
        patches: the tokens before; becomes those after.
        rows: (n, d) their states.

    Returns:
        (m, d) means of the merged states, weighted by size.

    Raises:
        ValueError: the merging is not one of n tokens into m.
    """
    target, n = merging.target, rows.shape[0]
    if target.dtype != torch.long or target.shape != (n,):
        raise ValueError(
            f"{method.name}: target must be an int64 tensor of shape ({n},), got {target.dtype} "
            f"{tuple(target.shape)}"
        )
    stays = target >= 0
    m = int(target.max()) + 1
    if m < 1 or len(target[stays].unique()) != m:
        raise ValueError(f"{method.name}: target must use every index from 0 on, at least one")
    if merging.memory is not None and merging.memory.shape != (m,):
        raise ValueError(
            f"{method.name}: memory must be of shape ({m},), got {tuple(merging.memory.shape)}"
        )
    chosen, weights = target[stays], patches.size[stays]
    size = weights.new_zeros(m).index_add(0, chosen, weights)
    first = torch.full((m,), patches.original, device=rows.device)
    patches.source = first.scatter_reduce(0, chosen, patches.source[stays], "amin")
    patches.size, patches.memory = size, merging.memory
    return _means(rows, stays.nonzero().squeeze(1), chosen, weights, size)


def _means(rows: Tensor, members: Tensor, group: Tensor, weights: Tensor, size: Tensor) -> Tensor:
    """(m, d) weighted means of the rows (n, d) at `members` (k,) per `group` (k,); `weights` (k,)
    sum to `size` (m,). Groups of one, the most common, are copied."""
    count = torch.bincount(group, minlength=len(size))
    one = torch.empty_like(count).scatter(0, group, members)
    means = rows.index_select(0, one)
    several = count > 1
    if not bool(several.any()):
        return means
    within = several[group]
    number = several.cumsum(0)[group[within]] - 1
    contents = rows[members[within]].float() * weights[within, None]
    sums = contents.new_zeros(int(several.sum()), rows.shape[1]).index_add(0, number, contents)
    means[several] = (sums / size[several, None]).to(rows.dtype)
    return means
