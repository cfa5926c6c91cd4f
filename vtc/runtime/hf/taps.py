# SPDX-License-Identifier: Apache-2.0
"""Attention probabilities of a few query rows, without eager attention.

A tapped attention module gets a private copy of its config that names our attention function. That
function computes the requested rows and then calls the module's own implementation: outputs,
masks and all other modules are unchanged. A module may carry several taps, and two models may share
it. Taps come off in any order; the last one removes the private config.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from vtc.core.prefill import Stopwatch
from vtc.runtime.signals import TowerSignals

TAP = "vtc_tap"
_LOCK = threading.RLock()
"""Every call installs and removes taps, also on modules shared with models of other threads."""

_AT_ONCE = 2**18
"""Probabilities held at once where only their mean is needed: 1 MiB in fp32 fits a CPU cache."""


class _Left(Exception):
    """Leaves the module of a silent tap after the capture."""

    def __init__(self, tap: Tap) -> None:
        super().__init__()
        self.tap = tap


@dataclass(eq=False)
class Tap:
    """A tap on one attention module.

    Attributes:
        module: the attention module.
        armed: called with query (b, h, q, d), key and value (b, h_kv, k, d), the mask and the other
            arguments; may return another mask to attend with. `None` captures nothing.
        captured: what `armed` stored.
        silent: skip attention, and what follows it, after the capture.
        thread: the thread that armed the tap. Another may run the module in its own model.
        handles: hooks that call `hear`, of a module that attends in a way of its own.
    """

    module: Any
    armed: Callable[..., Tensor | None] | None = None
    captured: list[Any] = field(default_factory=list)
    silent: bool = False
    thread: int = 0
    handles: list[Any] = field(default_factory=list)

    def arm(self, heard: Callable[..., Tensor | None]) -> None:
        """Call `heard` at the next attention of this thread, and clear `captured`.

        Args:
            heard: called as `armed`.
        """
        self.captured, self.armed, self.thread = [], heard, threading.get_ident()

    @torch.compiler.disable
    def hear(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]
    ) -> None:
        """Pass on what the module attends with, if the tap is armed for this thread."""
        if self.hears and (heard := self.armed) is not None:
            with torch.no_grad():
                heard(query, key, value, mask, options)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Context in which a call of the module ends as soon as the tap has captured."""
        self.silent = True
        try:
            yield
        except _Left as left:
            if left.tap is not self:
                raise
        finally:
            self.silent, self.armed = False, None

    @property
    def hears(self) -> bool:
        """Whether the tap is armed for this thread."""
        return self.armed is not None and self.thread == threading.get_ident()

    @property
    def config(self) -> Any:
        """The module's own config. It still selects the attention implementation, also when it
        changes later."""
        return self.module._vtc_taps.config

    @property
    def in_place(self) -> bool:
        """Whether the module still uses the private config, so that its attention is captured."""
        return self.module.config is self.module._vtc_taps.private

    def remove(self) -> None:
        """Take the tap off; the last one restores the module's config."""
        for handle in self.handles:
            handle.remove()
        if self.handles:
            return
        with _LOCK:
            shared: _Taps = self.module._vtc_taps
            shared.taps.remove(self)
            if not shared.taps:
                if self.in_place:  # otherwise someone replaced it, and theirs stays
                    self.module.config = shared.config
                del self.module._vtc_taps


@dataclass
class _Taps:
    """All taps on one module, its own config, the private one that leads to them, and its eager
    attention."""

    config: Any
    private: Any
    eager: Callable[..., Any] | None
    taps: list[Tap] = field(default_factory=list)


def install(module: Any) -> Tap:
    """Tap an attention module.

    Args:
        module: an attention module of transformers with a `config`.

    Returns:
        The tap, not armed.
    """
    with _LOCK:
        if not hasattr(module, "_vtc_taps"):
            private = copy.copy(module.config)
            private._attn_implementation_internal = TAP
            module._vtc_taps = _Taps(module.config, private, _eager_attention(module))
            module.config = private
        tap = Tap(module)
        module._vtc_taps.taps.append(tap)
    return tap


def install_in_tower(
    module: Any, watch: Callable[[Any, Callable[..., None]], list[Any] | None]
) -> Tap:
    """Tap an attention module of a vision tower.

    Args:
        module: the attention module.
        watch: `Adapter.watch_attention`.

    Returns:
        The tap, not armed.
    """
    tap = Tap(module)
    handles = watch(module, tap.hear)
    if handles is None:
        return install(module)
    tap.handles = handles
    return tap


@contextmanager
def suspended(found: Iterable[Tap]) -> Iterator[None]:
    """Context of a nested call, in which taps capture nothing; afterwards they are as before.

    Args:
        found: the taps of the outer call.
    """
    before = [(tap, tap.armed, tap.captured, tap.silent) for tap in found]
    for tap, *_ in before:
        tap.armed, tap.captured, tap.silent = None, [], False
    try:
        yield
    finally:
        for tap, armed, captured, silent in before:
            tap.armed, tap.captured, tap.silent = armed, captured, silent


_OPTIONS = {
    *("attention_mask", "dropout", "kwargs", "scaling"),
    *("softcap", "s_aux", "position_bias", "sliding_window", "is_causal", "output_attentions"),
}
"""Arguments of attention functions that `row_attention` supports, or that change no probability."""


def foreign_options(module: nn.Module) -> list[str]:
    """Options of a module's attention that `row_attention` does not support, such as the indices of
    sparse attention.

    Args:
        module: an attention module of transformers.

    Returns:
        Their names, sorted; empty if the module's file defines no eager attention.
    """
    eager = _eager_attention(module)
    if eager is None:
        return []
    _, _, _, _, *names = inspect.signature(eager).parameters  # module, query, key and value
    return sorted(set(names) - _OPTIONS)


def _eager_attention(module: nn.Module) -> Callable[..., Any] | None:
    """The eager attention that the class of `module` names, or a base class, or its file."""
    usual = "eager_attention_forward"
    for cls in type(module).__mro__:
        code = getattr(inspect.unwrap(cls.__dict__.get("forward", object)), "__code__", None)
        named = [] if code is None else [n for n in code.co_names if n.endswith(usual)]
        for name in (*named, usual):
            found = getattr(sys.modules.get(cls.__module__), name, None)
            if found is not None:
                return found
    return None


def _default_attention(module: Any) -> Callable[..., Any]:
    shared: _Taps | None = getattr(module, "_vtc_taps", None)
    found = _eager_attention(module) if shared is None else shared.eager
    if found is None:
        raise TypeError(f"{type(module).__name__}: its file defines no eager_attention_forward")
    return found


def _tapped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    # Another thread may have removed the last tap meanwhile.
    shared: _Taps | None = getattr(module, "_vtc_taps", None)
    silent: Tap | None = None
    for tap in () if shared is None else tuple(shared.taps):
        if tap.hears and (heard := tap.armed) is not None:
            silent = tap if tap.silent else silent
            with torch.no_grad():
                other = heard(query, key, value, attention_mask, kwargs)
            attention_mask = attention_mask if other is None else other
    if silent is not None:
        raise _Left(silent)
    own = module.config if shared is None else shared.config
    default = _default_attention(module)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(own._attn_implementation, default)
    return attend(module, query, key, value, attention_mask, **kwargs)


# A separate name in the table of implementations; no existing entry changes.
AttentionInterface.register(TAP, _tapped_attention)


@dataclass(frozen=True)
class Options:
    """Options of an attention function that change its probabilities.

    Attributes:
        scaling: factor on the logits; `d ** -0.5` if `None`.
        softcap: logits saturate at plus and minus this value; `None` for no cap.
        sinks: (h,) attention-sink logits (gpt-oss), which make rows sum to less than 1; or `None`.
    """

    scaling: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Read the options.

        Args:
            given: keyword arguments of an attention function.

        Returns:
            Its options.
        """
        return cls(given.get("scaling"), given.get("softcap"), given.get("s_aux"))

    def of_heads(self, start: int, end: int) -> Options:
        """The options of the heads `start` to `end`, end excluded."""
        return self if self.sinks is None else replace(self, sinks=self.sinks[start:end])


def row_attention(
    query: Tensor,
    key: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> Tensor:
    """Attention probabilities of some query rows, in fp32.

    Args:
        query: (b, h, r, d) the rows, after rotation.
        key: (b, h_kv, k, d) after rotation; h is a multiple of h_kv.
        allowed: (b or 1, 1 or h, r, k) bool, True where a row sees a key; `None` for everywhere.
        bias: additive mask of that shape, or `None`.
        options: of the attention function.

    Returns:
        (b, h, r, k) fp32; zeros in rows that see no key.
    """
    b, h, r, d = query.shape
    h_kv = key.shape[1]
    grouped = query.reshape(b, h_kv, (h // h_kv) * r, d)
    scaling = d**-0.5 if options.scaling is None else options.scaling
    exact = math.frexp(scaling)[0] == 0.5  # a power of two causes no rounding
    if exact:
        grouped = grouped * scaling
    # In place from here on: allocating this much memory costs more than the arithmetic.
    logits = (grouped @ key.transpose(-1, -2)).view(b, h, r, key.shape[2]).float()
    if not exact:
        logits.mul_(scaling)
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)
    if bias is not None:
        logits.add_(bias)
    if allowed is not None:
        logits.masked_fill_(~allowed, float("-inf"))
    if options.sinks is None:
        found = logits.softmax(-1)
        return found if _sees_something(allowed, bias) else found.nan_to_num_()
    sinks = options.sinks.float().view(1, h, 1, 1)
    share = (logits.logsumexp(-1, keepdim=True) - sinks).sigmoid()
    return logits.softmax(-1).mul_(share).nan_to_num_()


def _sees_something(allowed: Tensor | None, bias: Tensor | None) -> bool:
    """Whether every row surely sees a key, so that its softmax is finite; no GPU sync."""
    if bias is not None:
        return False
    return allowed is None or (allowed.device.type == "cpu" and bool(allowed.any(-1).all()))


def mean_attention(
    query: Tensor, key: Tensor, allowed: Tensor | None, bias: Tensor | None, options: Options
) -> Tensor:
    """`row_attention` averaged over the heads; large ones go one key head at a time.

    Args:
        query: as in `row_attention`.
        key: as in `row_attention`.
        allowed: as in `row_attention`.
        bias: as in `row_attention`.
        options: as in `row_attention`.

    Returns:
        (b, 1, r, k) fp32.
    """
    b, h, r = query.shape[:3]
    h_kv = key.shape[1]
    if h * r * key.shape[2] <= _AT_ONCE:  # per sample: independent of the batch
        return row_attention(query, key, allowed, bias, options).mean(1, keepdim=True)
    total = query.new_zeros(b, 1, r, key.shape[2], dtype=torch.float32)
    step = h // h_kv
    for i, own in enumerate(key.split(1, 1)):
        heads = slice(i * step, (i + 1) * step)
        seen, added = (m if m is None or m.shape[1] == 1 else m[:, heads] for m in (allowed, bias))
        of_heads = options.of_heads(heads.start, heads.stop)
        found = row_attention(query[:, heads], own, seen, added, of_heads)
        total += found if step == 1 else found.sum(1, keepdim=True)
    return total.div_(h)


def listen_rows(
    tap: Tap,
    rows: Tensor,
    visible: Tensor | None,
    past: int,
    clock: Stopwatch,
    keys: Callable[[Tensor], None] | None = None,
    by_head: bool = False,
    blocks: Tensor | None = None,
    chunk: int | None = None,
) -> None:
    """Arm a tap for some rows of a causal decoder layer; `tap.captured` receives the result.

    Args:
        tap: on the layer's attention module.
        rows: (b, r) places in this forward's sequence; padding rows may hold any place.
        visible: (b, k) bool, True at keys that are not padding; `None` for all.
        past: number of keys from the cache.
        clock: measures the capture.
        keys: called with the (b, h_kv, s, d) keys of this forward's tokens; `None` for no call.
        by_head: capture (b, h, r, k) instead of the mean over heads, (b, 1, r, k).
        blocks: (b, k) block numbers; tokens of one block attend in both directions, -1 for none.
        chunk: number of tokens in the chunks within which the layer attends; `None` for no chunks.
    """

    def capture(
        query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]
    ) -> None:
        with clock.measure(query.device):
            b, h, q, d = query.shape
            first = min(past, key.shape[2] - q)
            if keys is not None:
                keys(key[:, :, first : first + q])
            if not rows.shape[1]:
                tap.armed = None
                return
            places = rows.to(query.device)
            picked = query.gather(2, places[:, None, :, None].expand(-1, h, -1, d))
            allowed = bias = None
            if isinstance(mask, Tensor) and mask.dim() == 4:
                cut = _rows_at(mask, places)
                allowed, bias = (cut, None) if cut.dtype == torch.bool else (None, cut)
            else:
                # A sliding-window cache lacks its first keys; a static cache has spare room.
                lost = max(past + q - key.shape[2], 0)
                place = torch.arange(key.shape[2], device=query.device) + lost
                now = (places + past)[:, None, :, None]
                allowed = place <= now
                if blocks is not None:
                    own = blocks.to(query.device)
                    mine = own.gather(1, places + past)[..., None]
                    theirs = own[:, lost:][:, None]
                    spare = key.shape[2] - theirs.shape[2]
                    theirs = nn.functional.pad(theirs, (0, spare), value=-1)
                    allowed = allowed | ((mine == theirs) & (mine >= 0))[:, None]
                if chunk is not None:
                    # Chunks count from the first token of the row, not from its padding.
                    start: Any = 0
                    if visible is not None:
                        start = visible.to(query.device).long().argmax(1)[:, None, None, None]
                    allowed = allowed & ((place - start) // chunk == (now - start) // chunk)
                if (window := options.get("sliding_window")) is not None:
                    allowed = allowed & (place > now - window)
                if visible is not None:
                    seen = visible.to(query.device)[:, lost:]
                    room = seen.new_zeros(b, key.shape[2] - seen.shape[1])
                    allowed = allowed & torch.cat([seen, room], dim=1)[:, None, None]
            if (added := options.get("position_bias")) is not None:
                added = _rows_at(added, places)
                bias = added if bias is None else bias + added
            attend = row_attention if by_head else mean_attention
            tap.captured.append(attend(picked, key, allowed, bias, Options.of(options)))
        tap.armed = None

    tap.arm(capture)


def _rows_at(mask: Tensor, places: Tensor) -> Tensor:
    """(b, h or 1, r, k): the rows `places` (b, r) of a mask (b or 1, h or 1, q, k)."""
    at = places[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
    return mask.expand(len(places), -1, -1, -1).gather(2, at)


def listen_tower(
    tap: Tap, cls: int | None, clock: Stopwatch, tokens: Callable[[int], slice] = slice
) -> None:
    """Arm a tap in a vision tower; `tap.captured` receives one `TowerSignals` per batch row.

    The attention is the [CLS] row if the tower has one. Otherwise it is what each token receives,
    averaged over the tokens that see it; other packed images and padding do not count.

    Args:
        tap: on an attention module of the tower.
        cls: the place of [CLS] in the tower's sequence, negative from the end; `None` without.
        clock: measures the capture.
        tokens: `Adapter.tokens_in`, the rows of some number that count; by default all.
    """

    def capture(
        query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]
    ) -> None:
        ends = options.get("cu_seq_lens_q")
        causal = options.get("is_causal", getattr(tap.module, "is_causal", False))
        if mask is None and causal and tap.config._attn_implementation != "eager":
            # What is causal only without a mask, and not in eager attention: Phi-4 multimodal.
            mask = torch.ones(query.shape[2], query.shape[2], device=query.device).bool().tril()
            mask = mask[None, None]
        if ends is None:
            hear(query, key, mask, options)
            return
        for start, end in pairwise(ends.tolist()):  # packed for flash attention
            hear(query[:, :, start:end], key[:, :, start:end], None, options)

    def hear(query: Tensor, key: Tensor, mask: Any, options: Mapping[str, Any]) -> None:
        bias = options.get("position_bias")
        with clock.measure(query.device):
            columns = tokens(key.shape[2])
            keys = key.detach()[:, :, columns].transpose(1, 2).flatten(2)
            size = query.shape[2]
            at = tokens(size) if cls is None else slice(cls % size, cls % size + 1)
            for i in range(query.shape[0]):
                rows = query[i : i + 1, :, at]
                seen, added = _visible(mask, i, at)
                if bias is not None:
                    of_row = bias[i % len(bias)][None, :, at]
                    added = of_row if added is None else added + of_row
                found = mean_attention(rows, key[i : i + 1], seen, added, Options.of(options))
                received = found[0, 0, :, columns]
                if cls is not None or seen is None:
                    received = received.mean(0)
                else:
                    see = seen[0, 0, :, columns]
                    see = see & see.diagonal()[:, None]
                    received = (received * see).sum(0) / see.sum(0).clamp_min(1)
                tap.captured.append(
                    TowerSignals(
                        attention=received,
                        keys=keys[i],
                        cls_query=None if cls is None else rows.detach().flatten(),
                        cls_key=None if cls is None else keys[i, cls],
                        heads=key.shape[1],
                    )
                )

    tap.arm(capture)


def _visible(mask: Any, row: int, queries: slice) -> tuple[Tensor | None, Tensor | None]:
    """Which keys the rows `queries` of one sample see, (1, 1, q', k) bool, `None` if all, and what
    is added to their logits, (1, 1 or h, q', k) or `None`; of a mask (b, 1 or h, q, k), or of a
    padding mask (b, k)."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        mask = mask[:, None, None].bool().expand(-1, -1, mask.shape[1], -1)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None, None
    own = mask[min(row, mask.shape[0] - 1)][None, :, queries]
    if own.dtype == torch.bool:
        return own[:, :1], None
    return own[:, :1] > torch.finfo(own.dtype).min / 2, own
