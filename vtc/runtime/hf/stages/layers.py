# SPDX-License-Identifier: Apache-2.0
"""The layers stage: methods choose among the tokens that enter a decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.core import Method
from vtc.models import Adapter
from vtc.runtime.forward import Forward
from vtc.runtime.hf import taps
from vtc.runtime.hf.plan import Plan
from vtc.runtime.hf.reading import LayerReader
from vtc.runtime.hf.stages.base import Runner
from vtc.runtime.stages import prune_between_layers


class LayersRunner(Runner):
    """Runs `prune` before the layers that a method names, on what it reads in those before."""

    stage: ClassVar[str] = "layers"

    def __init__(
        self, adapter: Adapter, method: Method, current: Callable[[], Forward | None]
    ) -> None:
        super().__init__(adapter, method, current)
        self.plan = Plan(adapter, method)
        self.starts = tuple(sorted(self.plan.pruners))
        self.reader = LayerReader(adapter, self.plan, current)

    def install(self) -> None:
        """Tap and hook the layers that are read."""
        self.reader.install()

    def uninstall(self) -> None:
        """Remove taps and hooks."""
        self.reader.uninstall()

    def check_in_place(self) -> None:
        """See `Runner.check_in_place`."""
        self.reader.check_in_place()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """See `Runner.suspended`."""
        with taps.suspended(self.reader.taps.values()):
            before, self.reader.running = self.reader.running, True
            try:
                yield
            finally:
                self.reader.running = before

    def before_layer(self, forward: Forward, layer: int, hidden: Tensor, cache: Any) -> Tensor:
        """Drop tokens; see `Runner.before_layer`."""
        num_layers = len(self.adapter.layers)
        for number, method in self.plan.pruners[layer]:
            rows, ahead = method.peeks(num_layers).get(layer), None
            if rows is not None and not forward.choices.replay:
                ahead = self.reader.peek(forward, layer, rows, hidden, cache, method.by_head)
            hidden, keep = prune_between_layers(
                forward, (number, method), layer, num_layers, hidden, ahead
            )
            if not torch.equal(keep, forward.layout.valid):
                hidden, _ = forward.drop(keep, hidden)
        return hidden

    def watches(self, layer: int) -> bool:
        """Whether something is captured in this layer."""
        return layer in self.plan.tapped or layer in self.plan.recorded

    def watch(self, forward: Forward, layer: int, hidden: Tensor) -> None:
        """Capture; see `Runner.watch`."""
        self.reader.listen(forward, layer, hidden)
