# SPDX-License-Identifier: Apache-2.0
"""What both engines share: installing and removing hooks, tracking calls, and wrapping the
model's forward."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from vtc.core import Method
from vtc.core.errors import ArgumentError
from vtc.core.events import Listener, Prefilled
from vtc.core.prefill import Prefill
from vtc.models import Adapter, UnsupportedModelError
from vtc.report import Report
from vtc.runtime.choices import Choices
from vtc.runtime.executors import Bound
from vtc.runtime.hf.arguments import by_name
from vtc.runtime.hf.calls import Calls
from vtc.runtime.hf.guards import refuse_hidden_answers
from vtc.runtime.hf.in_place import check_in_place
from vtc.runtime.hf.override import Override
from vtc.runtime.hf.plan import check_hooks, reads_prompt
from vtc.runtime.idle import warn_of_idle


class Hooked(Bound):
    """A method bound to one model instance by hooks.

    The object holds no state of a call; that is in `calls`, per thread.

    Args:
        adapter: bound to the model.
        method: what to run.

    Attributes:
        adapter: bound to the model.
        method: what runs.
        report: the figures of all prefills, from their events.
        calls: the calls in progress, per thread.
        lock: admits one forward at a time, since the threads of a server share the tapped modules.
        warned: numbers of the parts that a warning has named.
        listeners: called with every event of a selection.

    Raises:
        ArgumentError: the method acts in a stage or at a layer that the model lacks.
        UnsupportedModelError: the method reads what vtc cannot capture in this model.
    """

    def __init__(self, adapter: Adapter, method: Method) -> None:
        self.adapter, self.method = adapter, method
        for stage in method.stages:
            if self._refuses(stage):
                raise ArgumentError("method", self._lacks(stage))
        for part in method.parts:
            if part.reads_places and not adapter.places:
                raise UnsupportedModelError(
                    f"model: {part.name} reads the places of vision tokens, and those of "
                    f"{type(adapter.model).__name__} come from a resampler and have none"
                )
        reason = self._no_gaps()
        if reason is not None and any(part.closes_gaps_by_choice for part in method.parts):
            warnings.warn(
                f"{method}: positions='contiguous' has no meaning for "
                f"{type(adapter.model).__name__}, {reason}",
                stacklevel=5,
            )
        self.report = Report(adapter.model.config)
        self.num_layers = len(adapter.layers)
        check_hooks(method, self.num_layers)
        self.reads_prompt = reads_prompt(method, self.num_layers)
        self.handles: list[Any] = []
        self.overrides: list[Override] = []
        self.warned: set[int] = set()
        self.listeners: list[Listener] = []
        self._forget()

    def _refuses(self, stage: str) -> bool:
        """Whether the family has not this stage. Families declare some; the runners of others look
        at the model themselves."""
        return stage in Adapter.stages and stage not in self.adapter.stages

    def _lacks(self, stage: str) -> str:
        """Why a method that acts in `stage` is refused."""
        # What keeps the patches of a token from being told apart keeps them from being merged.
        reason = self.adapter.unread or self.adapter.unmerged
        why = f": {reason}" if stage == "encoder" and reason else ""
        return (
            f"{self.method} acts in the stage {stage!r}, which the family {self.adapter.name} does "
            f"not support{why}; supported are {', '.join(self.adapter.stages)}"
        )

    def _no_gaps(self) -> str | None:
        """Why gaps in the positions cannot close, or `None` if they can."""
        if self.adapter.positions == "none":
            return "which has no positions"
        if not self.adapter.axial:
            return None
        return "whose positions are places in the picture; tokens keep theirs"

    def _forget(self) -> None:
        """Start with no call in progress."""
        self.lock = threading.RLock()
        self.calls = Calls()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("lock", "calls"):
            del state[name]
        state["listeners"] = []  # they listen to this model, not to its copies
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def model(self) -> Any:
        """The model that is patched."""
        return self.adapter.model

    @property
    def holder(self) -> Any:
        """The part that merges images in."""
        return self.adapter.base

    # ---- on and off ---------------------------------------------------------------------------
    def install(self) -> None:
        """Hook the model; if this fails half-way, restore the model.

        Raises:
            RuntimeError: the hooks are already installed.
        """
        if self.overrides:
            raise RuntimeError("this patch is on its model already")
        try:
            self._install()
        except BaseException:
            self.uninstall()
            raise

    def _install(self) -> None:
        b = self.adapter
        # Not hooks: torch skips forward hooks when the forward is interrupted.
        self.overrides.append(Override(b.base, "forward", self._run_base, self._passes))
        if b.model is not b.base:
            self.overrides.append(Override(b.model, "forward", self._run_model, self._passes))
        for part in {id(b.base): b.base, id(b.model): b.model}.values():
            refuse = Override(part, "_replicate_for_data_parallel", self._refuse_replicas)
            self.overrides.append(refuse)
        if hasattr(b.model, "generate"):
            self.overrides += [
                Override(b.model, "generate", self._generate),
                Override(b.generator, "prepare_inputs_for_generation", self._prepare_step),
                Override(b.generator, "create_masks_for_generate", self._create_masks),
            ]
        if not b.merges_in_decoder:
            self.handles += [
                b.decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True),
                b.decoder.register_forward_hook(self._leave_decoder, with_kwargs=True),
            ]
        self.layers = list(b.layers)

    def uninstall(self) -> None:
        """Restore the model, once forwards of other threads have ended.

        Raises:
            RuntimeError: called in the middle of a forward of this thread.
        """
        self.calls.refuse_in_forward()
        with self.lock:  # wait for the forward of another thread
            self._uninstall()

    def _uninstall(self) -> None:
        for handle in self.handles:
            handle.remove()
        for override in reversed(self.overrides):
            override.remove()
        self.handles, self.overrides = [], []

    def _refuse_replicas(self, original: Callable[..., Any]) -> Any:
        raise RuntimeError(
            "DataParallel: its replicas share the hooks of a patched model, which lead to the "
            "first device; copy.deepcopy the patched model for each, or use one process for each"
        )

    # ---- the model ----------------------------------------------------------------------------
    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _create_masks(self, original: Callable[..., Any] | None, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _run_base(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _enter_decoder(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _leave_decoder(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        raise NotImplementedError

    def _passes(self, given: Mapping[str, Any]) -> bool:
        """Whether the model's own forward takes these arguments, and torch may compile it."""
        return False

    def _prepare_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Mark the next call of the model as a step of `generate`, which prepares its inputs."""
        out = original(*args, **kwargs)
        if self.calls.generating is not None:
            self.calls.generating.asked = True
        return out

    def _run_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model with its head: record the arguments that its base model does not receive."""
        self._check_in_place()
        shown = kwargs.pop("prompt_labels", None)
        given = by_name(self.adapter.model, args, kwargs)
        labels = given.get("labels") if shown is None else shown
        if labels is None and self.calls.generating is None and self.reads_prompt:
            refuse_hidden_answers(self.adapter.model, self.method, given)
        with self.lock, self.calls.model(labels, given.get("logits_to_keep", 0)):
            return original(*args, **kwargs)

    def _choices(self) -> Choices:
        """The selections of a forward that begins."""
        return Choices((self.report.hear, *self.listeners), shows=bool(self.listeners))

    def _finish(self, choices: Choices, prefill: Prefill) -> None:
        """Report a prefill, unless it repeats an earlier step, and warn of idle parts."""
        if not choices.replay:
            choices.emit(Prefilled(prefill))
            warn_of_idle(self.method, choices.dropped, self.warned, self.num_layers, stacklevel=2)

    def _check_in_place(self) -> None:
        """Refuse a model with modules that were replaced under the patch."""
        check_in_place(self.adapter, self.layers)
