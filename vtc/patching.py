# SPDX-License-Identifier: Apache-2.0
"""`patch` binds a method to one model instance, `unpatch` restores the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vtc.core import Method, make
from vtc.core.events import Listener
from vtc.models import find
from vtc.report import Report, Stopwatch
from vtc.runtime.hf.cross import CrossEngine
from vtc.runtime.hf.engine import Engine
from vtc.runtime.runners import check_stages


class Patch:
    """A method bound to a model; as a context manager it unpatches on exit.

    Attributes:
        model: the patched model.
        method: the method.
    """

    def __init__(self, model: nn.Module, engine: Engine | CrossEngine) -> None:
        self.model, self._engine = model, engine
        self._disabled = 0

    @property
    def method(self) -> Method:
        return self._engine.method

    @property
    def report(self) -> Report:
        """Tokens, times, FLOPs and bytes of all prefills since patching."""
        return self._engine.report

    @property
    def heard(self) -> Stopwatch:
        """Stopwatch of the captures in the vision tower, in the current or last call.

        It is part of the tower's time; subtract it when timing the tower. Empty for a model whose
        tower methods do not read.
        """
        return Stopwatch() if isinstance(self._engine, CrossEngine) else self._engine.vision.heard

    @property
    def active(self) -> bool:
        """Whether this patch is currently on the model."""
        return _patch_of(self.model) is self

    def unpatch(self) -> None:
        """Restore the model bit for bit; does nothing if that was done already."""
        if self.active:
            unpatch(self.model)

    @contextmanager
    def disable(self) -> Iterator[nn.Module]:
        """The plain model within a `with` block.

        Raises:
            RuntimeError: the patch is no longer on its model.
        """
        if not self.active:
            raise RuntimeError("this patch is not on its model any more")
        if not self._disabled:
            self._engine.uninstall()
        self._disabled += 1
        try:
            yield self.model
        finally:
            self._disabled -= 1
            # Not if the model was unpatched or patched again in between.
            if self.active and not self._disabled:
                self._engine.install()

    @contextmanager
    def listen(self, listener: Listener) -> Iterator[None]:
        """Report to `listener` what methods see and choose, within a `with` block.

        Args:
            listener: called with each `vtc.core.events.Event`, in the thread that runs the model;
                its exceptions abort the forward.

        Raises:
            RuntimeError: the patch is no longer on its model.
        """
        if not self.active:
            raise RuntimeError("this patch is not on its model any more; call vtc.patch again")
        self._engine.listeners.append(listener)
        try:
            yield
        finally:
            self._engine.listeners.remove(listener)

    def __enter__(self) -> Patch:
        if not self.active:
            raise RuntimeError("this patch is not on its model any more; call vtc.patch again")
        return self

    def __exit__(self, *exc: object) -> None:
        self.unpatch()

    def __repr__(self) -> str:
        state = "" if self.active else ", removed"
        return f"Patch({type(self.model).__name__}, {self.method}{state})"


def patch(model: nn.Module, method: str | Method | dict[str, Any], **settings: Any) -> Patch:
    """Compress the vision tokens of `model` from now on.

    Only this instance changes: no class, no global function, no weights. A second call on the model
    or its base model replaces the first. `model.generate(...)` and `model(...)` work as before.

    Args:
        model: a vision-language model of transformers, bare or wrapped by peft, torch.compile,
            DistributedDataParallel, FSDP or similar wrappers.
        method: a name (`vtc.methods()` lists them), a method, several joined with `|`, or the
            result of `Method.to_dict`.
        settings: the method's settings, if it is given by name: `keep=0.1`.

    Returns:
        The patch, with its report; also a context manager.

    Raises:
        ValueError, TypeError: unknown method or setting, or a value out of range.
        UnsupportedModelError: not a vision-language model, or an unknown architecture.

    Example:
        >>> vtc.patch(model, "todre", keep=0.1)
        >>> model.generate(**inputs, max_new_tokens=20)
        >>> vtc.unpatch(model)
    """
    chosen = make(method, **settings)
    check_stages(chosen)
    inner = _unwrapped(model)
    adapter = find(inner)
    # All checks precede the engine.
    make_engine: Any = CrossEngine if adapter.crosses else Engine
    engine = make_engine(adapter, chosen)
    made = Patch(inner, engine)
    before = _patch_of(inner)
    if before is not None:
        before._engine.uninstall()
    try:
        engine.install()
    except BaseException:
        if before is not None and not before._disabled:
            before._engine.install()
        raise
    if before is not None:
        _forget(before)
    vars(adapter.base)["_vtc_patch"] = made
    return made


def unpatch(model: nn.Module) -> None:
    """Restore `model` bit for bit to its state before `patch`; does nothing if it is not patched.

    Args:
        model: the model given to `patch`, or its base model, bare or wrapped.

    Raises:
        TypeError: not a model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a model of transformers, got {type(model).__name__}")
    found = _patch_of(_unwrapped(model))
    if found is not None:
        found._engine.uninstall()
        _forget(found)


def _patch_of(model: nn.Module) -> Patch | None:
    """The patch on `model`, stored on the part that merges images in, possibly the model itself."""
    for part in (model, getattr(model, "model", None)):
        found = getattr(part, "__dict__", {}).get("_vtc_patch")
        if found is not None:
            return found
    return None


def _forget(patch: Patch) -> None:
    del vars(patch._engine.adapter.base)["_vtc_patch"]


def _unwrapped(model: Any) -> Any:
    """The model inside wrappers of compilers, adapters and multi-device training."""
    while isinstance(model, nn.Module):
        base: Any = getattr(model, "get_base_model", None)
        inside = [model._modules.get(name) for name in _WRAPPED]
        found = next((part for part in inside if part is not None), None)
        if found is None and base is not None:
            found = base()
        if found is None or isinstance(model, PreTrainedModel):
            break
        model = found
    return model


_WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module")
"""Its attribute in torch.compile, DistributedDataParallel (and similar wrappers) and FSDP."""
