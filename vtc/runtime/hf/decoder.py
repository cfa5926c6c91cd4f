# SPDX-License-Identifier: Apache-2.0
"""The decoder side of a patched model: what methods read of decoder layers."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from vtc.core import Record, Rows
from vtc.models import CACHE, Adapter
from vtc.runtime.forward import Forward
from vtc.runtime.hf import taps
from vtc.runtime.hf.plan import Plan
from vtc.runtime.signals import Heard
from vtc.runtime.stages import rows_of


@dataclass(frozen=True)
class _UnderWay:
    """A forward, and the state of the taps in it."""

    forward: Forward | None
    taps: list[Any]


def check_in_place(adapter: Adapter, layers: list[Any]) -> None:
    """Raise `RuntimeError` if modules of `adapter`, or the decoder `layers` that were hooked, are
    not those that run now."""
    found = adapter.bind(adapter.model)
    same = found.base is adapter.base and found.decoder is adapter.decoder
    if same and len(layers) == len(found.layers) and all(map(is_, layers, found.layers)):
        return
    pairs = [
        ("base model", adapter.base, found.base),
        ("language model", adapter.decoder, found.decoder),
        *(
            (f"decoder layer {i}", was, now)
            for i, (was, now) in enumerate(zip(layers, found.layers, strict=False))
        ),
    ]
    for name, was, now in pairs:
        check_same(name, was, now)
    if len(layers) != len(found.layers):
        raise RuntimeError(_REPLACED.format(f"number of decoder layers ({len(found.layers)})"))


def check_same(name: str, was: Any, now: Any) -> None:
    """Raise `RuntimeError` if the module `was`, called `name`, was replaced by `now`."""
    # What torch.compile made of a module calls it, hooks and all.
    if _uncompiled(was) is not _uncompiled(now):
        raise RuntimeError(_REPLACED.format(f"{name}, now a {type(now).__name__},"))


def _uncompiled(module: Any) -> Any:
    return vars(module)["_modules"].get("_orig_mod", module)


_REPLACED = (
    "model: its {} is not the one that was patched, and would run without the patch; unpatch "
    "before modules are replaced (adapters that save whole modules do that), and patch afterwards"
)


class DecoderSide:
    """Listens to decoder layers for what `plan` says is read of them."""

    def __init__(self, adapter: Adapter, plan: Plan) -> None:
        self.adapter, self.plan = adapter, plan
        self.taps: dict[int, taps.Tap] = {}
        self.handles: list[Any] = []
        self.parts: list[tuple[int, str, Any]] = []
        self.forget()

    def forget(self) -> None:
        """Start with nothing under way."""
        self.forward: Forward | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["forward"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    def install(self) -> None:
        for layer in self.plan.tapped:
            self.taps[layer] = taps.install(self._part(layer, "self_attn"))
        for layer, names in self.plan.recorded.items():
            for name in sorted(names - {"input", "keys", "rotary"}):
                self.handles.append(self._hook(layer, name))

    def _hook(self, layer: int, name: Record) -> Any:
        part, _, end = name.partition("_")
        attribute = {"attention": "self_attn", "mlp": "mlp"}.get(part)
        module: Any = self.adapter.layers[layer]
        if attribute is not None:
            module = self._part(layer, attribute)
        if end == "in":
            hook = functools.partial(self._entering, layer, name)
            return module.register_forward_pre_hook(hook, with_kwargs=True)
        return module.register_forward_hook(functools.partial(self._leaving, layer, name))

    def _part(self, layer: int, name: str) -> Any:
        module = getattr(self.adapter.layers[layer], name)
        self.parts.append((layer, name, module))
        return module

    def check_in_place(self) -> None:
        """Raise `RuntimeError` if what is listened to is not what runs now."""
        for layer, name, module in self.parts:
            now = getattr(self.adapter.layers[layer], name)
            if now is not module:
                check_same(f"{name} of decoder layer {layer}", module, now)
        for layer, tap in self.taps.items():
            if not tap.in_place:
                raise RuntimeError(
                    _REPLACED.format(f"config of self_attn of decoder layer {layer}")
                )

    def uninstall(self) -> None:
        for handle in self.handles:
            handle.remove()
        for tap in self.taps.values():
            tap.remove()
        self.handles, self.taps, self.parts = [], {}, []
        self.forget()

    def begin(self, forward: Forward) -> None:
        """Record what decoder layers do from now on as part of `forward`."""
        self.forward = forward

    def exchange(self, under_way: _UnderWay | None) -> _UnderWay:
        """Go on with what was under way here, `None` for nothing, and return what now is: a call
        within a call leaves the outer one as it was."""
        kept = [(tap.armed, tap.captured, tap.silent) for tap in self.taps.values()]
        left = _UnderWay(self.forward, kept)
        for i, tap in enumerate(self.taps.values()):
            tap.armed, tap.captured, tap.silent = (
                under_way.taps[i] if under_way else (None, [], False)
            )
        self.forward = None if under_way is None else under_way.forward
        return left

    # ---- records ------------------------------------------------------------------------------
    @torch.compiler.disable
    def _entering(
        self, layer: int, name: Record, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._note(layer, name, args[0] if args else kwargs["hidden_states"])

    @torch.compiler.disable
    def _leaving(
        self, layer: int, name: Record, module: Any, args: tuple[Any, ...], output: Any
    ) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if name == "normed" and self.forward is not None:
            with torch.no_grad():
                value = self.adapter.decoder.norm(value)
        self._note(layer, name, value)

    def _note(self, layer: int, name: Record, value: Tensor) -> None:
        if self.forward is not None:
            self.forward.recorded[layer, name] = (self.forward.layout, value.detach())

    # ---- attention ----------------------------------------------------------------------------
    def listen(self, forward: Forward, layer: int, hidden: Tensor) -> None:
        """Before decoder layer `layer` runs on `hidden`: arm its tap, note what enters it."""
        recorded = self.plan.recorded.get(layer, ())
        if "input" in recorded:
            self._note(layer, "input", hidden)
        if "rotary" in recorded:
            self._note(layer, "rotary", self._turned_ones(forward, layer, hidden))
        if layer not in self.plan.tapped:
            return
        with forward.selector.measure(forward.valid.device):
            rows = rows_of(forward, self.plan.tapped[layer])
            wide = [
                nn.utils.rnn.pad_sequence(per_sample, batch_first=True)
                for per_sample in rows.values()
            ]
            group = forward.ledger.groups[self.plan.group_of[layer]]
            past = group.length - forward.layout.index.shape[1]
        wide.append(forward.layout.index[:, :0])
        tap, places = self.taps[layer], torch.cat(wide, dim=1)
        tap.captured = []
        layout = forward.layout

        def note(keys: Tensor) -> None:
            keys = self._turned_back(forward, layer, keys).transpose(1, 2).flatten(2)
            forward.recorded[layer, "keys"] = (layout, keys)

        wanted = "keys" in recorded
        if places.shape[1] or wanted:
            taps.listen_rows(
                tap,
                places,
                group.valid,
                past,
                forward.selector,
                keys=note if wanted else None,
                by_head=layer in self.plan.by_head,
                blocks=self._blocks(forward, layer, group.length),
                chunk=self.adapter.chunk(layer),
            )
        forward.attention[layer] = Heard(layout, rows, tap.captured, past)

    def _blocks(self, forward: Forward, layer: int, length: int) -> Tensor | None:
        blocks = forward.gather_blocks(length)
        return self.adapter.layer_blocks(layer, blocks)

    def _turned_back(self, forward: Forward, layer: int, keys: Tensor) -> Tensor:
        """Keys (b, h, k, d) as if every sample began at position 0.

        Padding that counts in the positions turns all keys of a sample alike. Attention does not
        notice, but a method that looks at the keys themselves would.
        """
        if not bool(forward.offset.any()):
            return keys
        return self._rotate(layer, keys, -forward.offset.to(keys.device))

    def _turned_ones(self, forward: Forward, layer: int, hidden: Tensor) -> Tensor:
        """(b, k, d_head) ones, rotated to where each token stands in its sample, in fp32."""
        positions = forward.rotary_positions(self.plan.group_of[layer]) - forward.offset
        attention: Any = self.adapter.layers[layer].self_attn
        ones = torch.ones(*hidden.shape[:2], attention.head_dim, device=hidden.device)
        return self._rotate(layer, ones[:, None], positions.to(hidden.device))[:, 0]

    def _rotate(self, layer: int, states: Tensor, positions: Tensor) -> Tensor:
        """`states` (b, h, k, d) turned by `positions` (b, k), (b, 1) or with axes before; as they
        are, where the layer turns none."""
        if not self.adapter.rotates(layer):
            return states
        rotation = self.adapter.rotary(layer, states, positions)
        return self.adapter.rotate(layer, states, rotation)

    def peek(
        self, forward: Forward, layer: int, kind: Rows, hidden: Tensor, cache: Any, by_head: bool
    ) -> Heard:
        """Attention rows of decoder layer `layer`, were it run on `hidden` as it is."""
        rows = rows_of(forward, {kind})
        places = nn.utils.rnn.pad_sequence(rows[kind], batch_first=True)
        group = forward.ledger.groups[self.plan.group_of[layer]]
        past, valid = group.length, forward.layout.valid
        tap = self.taps[layer]
        captured: list[Tensor] = []
        if places.shape[1]:
            before = group.valid
            if before is None:
                before = valid.new_ones(valid.shape[0], past)
            visible = torch.cat([before.to(valid.device), valid], dim=1)
            taps.listen_rows(
                tap,
                places,
                visible,
                past,
                forward.selector,
                by_head=by_head,
                blocks=self._blocks(forward, layer, visible.shape[1]),
                chunk=self.adapter.chunk(layer),
            )
            positions = forward.rotary_positions(self.plan.group_of[layer]).to(hidden.device)
            decoder: Any = self.adapter.layers[layer]
            # What runs now is not the forward: its inputs are not to be recorded.
            self.forward = None
            try:
                with tap.alone(), torch.no_grad():
                    decoder.self_attn(
                        hidden_states=decoder.input_layernorm(hidden),
                        position_embeddings=self.adapter.rotary(layer, hidden, positions),
                        attention_mask=None,
                        **{CACHE: _ReadOnly(cache) if past else None},
                    )
            finally:
                self.forward = forward
            captured, tap.captured = tap.captured, []
        return Heard(forward.layout, rows, captured, past)


class _ReadOnly:
    """What a layer's cache would return on an update, without the update: quantized, offloaded,
    static and sliding layers each hold their keys in a way of their own."""

    def __init__(self, cache: Any) -> None:
        self.layers = cache.layers

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        held = copy.copy(self.layers[layer_idx])
        for name, value in vars(held).items():
            if isinstance(value, Tensor):  # static layers write into these
                setattr(held, name, value.detach().clone())
        held.prefetch()
        return held.update(keys, values, *args, **kwargs)
