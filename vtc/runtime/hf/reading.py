# SPDX-License-Identifier: Apache-2.0
"""Captures what methods read in decoder layers."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtc.core import Record, Rows
from vtc.models import CACHE, Adapter
from vtc.runtime.forward import Forward
from vtc.runtime.hf import taps
from vtc.runtime.hf.in_place import REPLACED, check_same
from vtc.runtime.hf.plan import Plan
from vtc.runtime.signals import Heard
from vtc.runtime.stages import rows_of


class LayerReader:
    """Captures what a plan reads in decoder layers: attention rows, inputs, outputs and keys.

    Args:
        adapter: bound to the model.
        plan: what to capture, by layer.
        current: returns the forward in progress in this thread, or `None`.
    """

    def __init__(self, adapter: Adapter, plan: Plan, current: Callable[[], Forward | None]) -> None:
        self.adapter, self.plan, self.current = adapter, plan, current
        self.taps: dict[int, taps.Tap] = {}
        self.handles: list[Any] = []
        self.parts: list[tuple[int, str, Any]] = []
        # Asked first: torch compiles steps of decoding, and cannot look up a thread's forward.
        self.running = False

    def install(self) -> None:
        """Install the taps and hooks of the plan."""
        for layer in self.plan.tapped:
            self.taps[layer] = taps.install(self._part(layer, self.adapter.attention_name(layer)))
        for layer, names in self.plan.recorded.items():
            for name in sorted(names - {"input", "keys", "rotary"}):
                self.handles.append(self._hook(layer, name))

    def _hook(self, layer: int, name: Record) -> Any:
        attribute, enters = self.adapter.recorded_at(layer, name)
        module: Any = self.adapter.layers[layer]
        if attribute:
            module = self._part(layer, attribute)
        if enters:
            hook = functools.partial(self._entering, layer, name)
            return module.register_forward_pre_hook(hook, with_kwargs=True)
        return module.register_forward_hook(functools.partial(self._leaving, layer, name))

    def _part(self, layer: int, name: str) -> Any:
        module = getattr(self.adapter.layers[layer], name)
        self.parts.append((layer, name, module))
        return module

    def check_in_place(self) -> None:
        """Refuse a model with captured modules that were replaced.

        Raises:
            RuntimeError: a captured module, or the config of a tapped one, was replaced.
        """
        for layer, name, module in self.parts:
            now = getattr(self.adapter.layers[layer], name)
            if now is not module:
                check_same(f"{name} of decoder layer {layer}", module, now)
        for layer, tap in self.taps.items():
            if not tap.in_place:
                name = self.adapter.attention_name(layer)
                raise RuntimeError(REPLACED.format(f"config of {name} of decoder layer {layer}"))

    def uninstall(self) -> None:
        """Remove all taps and hooks."""
        for handle in self.handles:
            handle.remove()
        for tap in self.taps.values():
            tap.remove()
        self.handles, self.taps, self.parts = [], {}, []

    # ---- records ------------------------------------------------------------------------------
    def _entering(
        self, layer: int, name: Record, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self.running:
            self._note(layer, name, args[0] if args else kwargs["hidden_states"])

    def _leaving(
        self, layer: int, name: Record, module: Any, args: tuple[Any, ...], output: Any
    ) -> None:
        if self.running:
            self._note_output(layer, name, args, output)

    @torch.compiler.disable
    def _note_output(self, layer: int, name: Record, args: tuple[Any, ...], output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if args and value.numel() == args[0].numel():
            value = value.view(args[0].shape)  # experts return the tokens of all samples in one row
        value = self.adapter.join_streams(value)
        if name == "normed" and self._listening() is not None:
            with torch.no_grad():
                value = self.adapter.normed(value)
        self._note(layer, name, value)

    @torch.compiler.disable
    def _note(self, layer: int, name: Record, value: Tensor) -> None:
        forward = self._listening()
        if forward is not None:
            forward.captured.records[layer, name] = (forward.layout, value.detach())

    def _listening(self) -> Forward | None:
        """The forward to which what a layer computes now belongs, or `None`."""
        forward = self.current()
        if forward is None or forward.phase != "prefill" or forward.captured.paused:
            return None
        return forward

    # ---- attention ----------------------------------------------------------------------------
    def listen(self, forward: Forward, layer: int, hidden: Tensor) -> None:
        """Arm the tap of a decoder layer and record its input, before it runs.

        Args:
            forward: the forward in progress; `captured` receives what is read.
            layer: 0-based decoder layer.
            hidden: (b, s, d) the layer's input.
        """
        recorded = self.plan.recorded.get(layer, ())
        if "input" in recorded:
            self._note(layer, "input", hidden)
        if "rotary" in recorded:
            self._note(layer, "rotary", self._turned_ones(forward, layer, hidden))
        if layer not in self.plan.tapped:
            return
        with forward.selector.measure(forward.prompt.valid.device):
            rows = rows_of(forward, self.plan.tapped[layer])
            wide = [
                nn.utils.rnn.pad_sequence(per_sample, batch_first=True)
                for per_sample in rows.values()
            ]
            group = forward.ledger.groups[forward.ledger.group_of(layer)]
            past = group.length - forward.layout.index.shape[1]
        wide.append(forward.layout.index[:, :0])
        tap, places = self.taps[layer], torch.cat(wide, dim=1)
        tap.captured = []
        layout = forward.layout

        def note(keys: Tensor) -> None:
            keys = self._turned_back(forward, layer, keys).transpose(1, 2).flatten(2)
            forward.captured.records[layer, "keys"] = (layout, keys)

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
        forward.captured.attention[layer] = Heard(layout, rows, tap.captured, past)

    def _blocks(self, forward: Forward, layer: int, length: int) -> Tensor | None:
        blocks = forward.gather_blocks(length)
        return self.adapter.layer_blocks(layer, blocks)

    def _turned_back(self, forward: Forward, layer: int, keys: Tensor) -> Tensor:
        """Keys (b, h, k, d) as if every sample began at position 0.

        Padding that counts in the positions rotates all keys of a sample equally. Attention is
        invariant to that, but a method that reads the keys is not.
        """
        if not bool(forward.places.offset.any()):
            return keys
        return self._rotate(layer, keys, -forward.places.offset.to(keys.device))

    def _turned_ones(self, forward: Forward, layer: int, hidden: Tensor) -> Tensor:
        """(b, k, d_head) fp32 ones, rotated to each token's position in its sample."""
        positions = forward.rotary_positions(forward.ledger.group_of(layer)) - forward.places.offset
        attention = self.adapter.attention_of(layer)
        ones = torch.ones(*hidden.shape[:2], attention.head_dim, device=hidden.device)
        return self._rotate(layer, ones[:, None], positions.to(hidden.device))[:, 0]

    def _rotate(self, layer: int, states: Tensor, positions: Tensor) -> Tensor:
        """`states` (b, h, k, d) rotated by `positions` (b, k) or (b, 1), perhaps with leading axes;
        unchanged if the layer has no rotation."""
        if not self.adapter.rotates(layer):
            return states
        rotation = self.adapter.rotary(layer, states, positions)
        return self.adapter.rotate(layer, states, rotation)

    def peek(
        self, forward: Forward, layer: int, kind: Rows, hidden: Tensor, cache: Any, by_head: bool
    ) -> Heard:
        """Look-ahead: the attention rows that a decoder layer would compute on `hidden`.

        The cache state and the captures of the forward do not change.

        Args:
            forward: the forward in progress.
            layer: 0-based decoder layer.
            kind: the rows to compute.
            hidden: (b, s, d) the layer's input.
            cache: the cache, or `None`.
            by_head: keep the heads apart instead of averaging them.

        Returns:
            The rows and their attention.
        """
        rows = rows_of(forward, {kind})
        places = nn.utils.rnn.pad_sequence(rows[kind], batch_first=True)
        group = forward.ledger.groups[forward.ledger.group_of(layer)]
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
            positions = forward.rotary_positions(forward.ledger.group_of(layer)).to(hidden.device)
            attention = self.adapter.attention_of(layer)
            own = self.adapter.attention_arguments(layer)
            if "position_ids" in inspect.signature(attention.forward).parameters:
                own["position_ids"] = positions
            # The look-ahead is not part of the forward, so its inputs are not recorded.
            forward.captured.paused = True
            try:
                with tap.alone(), torch.no_grad():
                    attention(
                        hidden_states=self.adapter.attention_input(layer, hidden),
                        position_embeddings=self.adapter.rotary(layer, hidden, positions),
                        attention_mask=None,
                        **{CACHE: _ReadOnly(cache) if past else None},
                        **own,
                    )
            finally:
                forward.captured.paused = False
            captured, tap.captured = tap.captured, []
        return Heard(forward.layout, rows, captured, past)


class _ReadOnly:
    """Returns what a cache layer's update would, without changing it: quantized, offloaded, static
    and sliding layers each store their keys differently."""

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
