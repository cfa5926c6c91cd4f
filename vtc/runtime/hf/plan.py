# SPDX-License-Identifier: Apache-2.0
"""Where a method acts between decoder layers and what it reads there, checked when patching."""

from __future__ import annotations

import inspect
from typing import get_args

from vtc.core import Method, Record, Rows
from vtc.core.errors import ArgumentError
from vtc.models import Adapter, UnsupportedModelError
from vtc.runtime.hf.taps import foreign_options


def check_hooks(method: Method, num_layers: int) -> None:
    """Refuse a method whose hooks do not fit together, whatever the model.

    Args:
        method: the method, or a composition.
        num_layers: number of decoder layers.

    Raises:
        ArgumentError: a part has `prune` without `prune_layers`, or the reverse.
    """
    for part in method.parts:
        layers = part.prune_layers(num_layers)
        if ("layers" in part.stages) != bool(layers) and (layers or part.stages == ("layers",)):
            raise ArgumentError(
                "method",
                f"{part.name}: prune and prune_layers belong together; it has "
                f"{'no prune' if layers else 'a prune that is called before no layer'}",
            )


def reads_prompt(method: Method, num_layers: int) -> bool:
    """Whether the selection may depend on the text, or on where the prompt ends.

    Args:
        method: the method, or a composition.
        num_layers: number of decoder layers.
    """
    for part in method.parts:
        rows = {*part.taps(num_layers).values(), *part.peeks(num_layers).values()}
        if rows - {"vision"} or part.needs & {"text", "segment"} or part.records(num_layers):
            return True
    return False


class Plan:
    """The layers at which a method acts and reads; refuses what this model cannot do.

    Args:
        adapter: bound to the model.
        method: the method, or a composition.

    Attributes:
        pruners: by decoder layer, the methods that act before it, with their number in the
            composition.
        tapped: by tapped decoder layer, the kinds of attention rows to capture.
        by_head: the layers of `tapped` whose attention is captured per head.
        recorded: by decoder layer, the names of the records to capture.

    Raises:
        ArgumentError: the method acts at a layer that the model lacks, or reads a layer or an
            unknown signal that is not available where it acts.
        UnsupportedModelError: a decoder layer lacks a module that the method reads, or its
            attention has options or rotations that vtc does not support.
    """

    def __init__(self, adapter: Adapter, method: Method) -> None:
        self.adapter, self.method = adapter, method
        self.num_layers = len(adapter.layers)
        self.pruners: dict[int, list[tuple[int, Method]]] = {}
        self.tapped: dict[int, set[Rows]] = {}
        self.by_head: set[int] = set()
        self.recorded: dict[int, set[Record]] = {}
        self._read()

    def _read(self) -> None:
        kind = type(self.adapter.model).__name__
        cut = {n for m in self.method.parts for n in m.prune_layers(self.num_layers)}
        self.adapter.check_layers(sorted(cut))
        for number, method in enumerate(self.method.parts):
            layers = method.prune_layers(self.num_layers)
            for layer in layers:
                if not 1 <= layer < self.num_layers:
                    raise ArgumentError(
                        "method",
                        f"{method.name} cannot act before decoder layer {layer} of {kind}; "
                        f"accepted are 1 to {self.num_layers - 1}",
                    )
                self.pruners.setdefault(layer, []).append((number, method))
            last = max(layers, default=0) - 1
            self._read_records(method, last)
            for layer, rows in method.peeks(self.num_layers).items():
                if layer not in layers:
                    raise ArgumentError(
                        "method",
                        f"{method.name} peeks at decoder layer {layer}, before which it does not "
                        f"act; it acts before {', '.join(map(str, layers)) or 'none'}",
                    )
                self._check_rows(method, layer, rows, "peeks")
                self.tapped.setdefault(layer, set())
            for layer, rows in method.taps(self.num_layers).items():
                if not 0 <= layer <= last:
                    raise ArgumentError(
                        "method",
                        f"{method.name} cannot read attention of decoder layer {layer} of {kind}; "
                        f"accepted are 0 to {last}, those that run before it acts",
                    )
                self._check_rows(method, layer, rows, "taps")
                self.tapped.setdefault(layer, set()).add(rows)
                if method.by_head:
                    self.by_head.add(layer)

    def _check_rows(self, method: Method, layer: int, rows: Rows, where: str) -> None:
        if rows not in get_args(Rows):
            raise ArgumentError(
                "method",
                f"{method.name} requests unknown rows {rows!r} in {where}; accepted are "
                f"{', '.join(get_args(Rows))}",
            )
        attention = self.adapter.attention_of(layer)
        hidden = where == "peeks" and not self.adapter.can_peek(layer)
        if hidden or not self.adapter.attends(layer):
            there = [i for i in range(self.num_layers) if self.adapter.attends(i)]
            has = f"; layers {', '.join(map(str, there))} have one" if there else ""
            raise UnsupportedModelError(
                f"model: decoder layer {layer} of {type(self.adapter.model).__name__} has no "
                f"attention that {method.name} could read{has}"
            )
        if foreign := foreign_options(attention):
            raise UnsupportedModelError(
                f"model: {type(attention).__name__} attends with {', '.join(foreign)}, which vtc "
                f"does not follow, and {method.name} reads its attention"
            )
        if where == "peeks":
            needed = {
                name
                for name, value in inspect.signature(type(attention).forward).parameters.items()
                if value.default is value.empty and value.kind is value.POSITIONAL_OR_KEYWORD
            }
            given = {"self", "hidden_states", "position_embeddings", "attention_mask"}
            given |= {
                "cache",
                "past_key_values",
                "position_ids",
                *self.adapter.attention_arguments(layer),
            }
            if unmet := needed - given:
                raise UnsupportedModelError(
                    f"model: attention of {type(self.adapter.model).__name__} takes "
                    f"{', '.join(sorted(unmet))}, so {method.name} cannot look ahead at it"
                )

    def _read_records(self, method: Method, last: int) -> None:
        """Collect the records of `method`; refuse those that the model cannot provide."""
        kind = type(self.adapter.model).__name__
        for layer, names in method.records(self.num_layers).items():
            if not 0 <= layer <= last:
                raise ArgumentError(
                    "method",
                    f"{method.name} cannot record decoder layer {layer} of {kind}; "
                    f"accepted are 0 to {last}, those that run before it acts",
                )
            if unknown := names - set(get_args(Record)):
                raise ArgumentError(
                    "method",
                    f"{method.name} requests unknown records {', '.join(sorted(unknown))}; "
                    f"accepted are {', '.join(get_args(Record))}",
                )
            for name in names:
                module, part = self.adapter.layers[layer], name.split("_")[0]
                attribute, _ = self.adapter.recorded_at(layer, name)
                lacks = {
                    "normed": not hasattr(self.adapter.decoder, self.adapter.decoder_parts[2]),
                    "attention": not hasattr(module, attribute),
                    "keys": not self.adapter.attends(layer),
                    "rotary": not self.adapter.attends(layer),
                    "mlp": not hasattr(module, attribute),
                }
                if lacks.get(part, False):
                    raise UnsupportedModelError(
                        f"model: decoder layer {layer} of {kind} has no {part} that "
                        f"{method.name} could record"
                    )
            if names & {"keys", "rotary"}:
                self.adapter.check_rotate()
            self.recorded.setdefault(layer, set()).update(names)
            if "keys" in names:
                self.tapped.setdefault(layer, set())
