# SPDX-License-Identifier: Apache-2.0
"""`patch` binds a method to one model instance, `unpatch` restores the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vtc.core import Method, make, methods
from vtc.core.errors import ArgumentError, ArgumentTypeError, UnsupportedModelError
from vtc.core.events import Listener
from vtc.report import Report
from vtc.runtime.executors import Bound, check_method, executor_of

try:
    import transformers  # noqa: F401
except ImportError:  # other executors do without
    pass
else:
    from vtc.runtime.hf import executor as _executor  # noqa: F401  (registers it)


class Patch:
    """A method bound to a model; as a context manager it unpatches on exit.

    Attributes:
        model: the patched model.
        method: the method.
    """

    def __init__(self, bound: Bound) -> None:
        self.model, self._bound = bound.model, bound
        self._disabled = 0

    @property
    def method(self) -> Method:
        """What runs."""
        return self._bound.method

    @property
    def report(self) -> Report:
        """Tokens, times, FLOPs and bytes of all prefills since patching."""
        return self._bound.report

    @property
    def active(self) -> bool:
        """Whether this patch is currently on the model."""
        return _patch_of(self.model) is self

    def unpatch(self) -> None:
        """Restore the model bit for bit; does nothing if that was done already."""
        if self.active:
            unpatch(self.model)

    @contextmanager
    def disable(self) -> Iterator[Any]:
        """The plain model within a `with` block.

        Raises:
            RuntimeError: the patch is no longer on its model.
        """
        if not self.active:
            raise RuntimeError("this patch is not on its model any more")
        if not self._disabled:
            self._bound.uninstall()
        self._disabled += 1
        try:
            yield self.model
        finally:
            self._disabled -= 1
            # Not if the model was unpatched or patched again in between.
            if self.active and not self._disabled:
                self._bound.install()

    @contextmanager
    def listen(self, listener: Listener) -> Iterator[None]:
        """Report to `listener`, within a `with` block, what methods see and choose and what a
        prefill took.

        Args:
            listener: called with each `vtc.core.events.Event`, in the thread that runs the model;
                its exceptions abort the forward.

        Raises:
            RuntimeError: the patch is no longer on its model.
        """
        if not self.active:
            raise RuntimeError("this patch is not on its model any more; call vtc.patch again")
        self._bound.listeners.append(listener)
        try:
            yield
        finally:
            self._bound.listeners.remove(listener)

    def __enter__(self) -> Patch:
        if not self.active:
            raise RuntimeError("this patch is not on its model any more; call vtc.patch again")
        return self

    def __exit__(self, *exc: object) -> None:
        self.unpatch()

    def __repr__(self) -> str:
        state = "" if self.active else ", removed"
        return f"Patch({type(self.model).__name__}, {self.method}{state})"


def patch(model: Any, method: str | Method | dict[str, Any], **settings: Any) -> Patch:
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
        ArgumentError, ArgumentTypeError: unknown method or setting, a value out of range, or a
            method that this model does not take.
        UnsupportedModelError: not a vision-language model, or an unknown architecture.

    Example:
        >>> vtc.patch(model, "todre", keep=0.1)
        >>> model.generate(**inputs, max_new_tokens=20)
        >>> vtc.unpatch(model)
    """
    chosen = make(method, **settings)
    executor = executor_of(model)
    check_method(chosen, executor)
    made = Patch(executor.bind(model, chosen))
    before = _patch_of(model)
    if before is not None and not before._disabled:
        before._bound.uninstall()
    try:
        made._bound.install()
    except BaseException:
        if before is not None and not before._disabled:
            before._bound.install()
        raise
    if before is not None:
        _forget(before)
    vars(made._bound.holder)["_vtc_patch"] = made
    return made


def refusals(model: Any) -> dict[str, str]:
    """The registered methods that `model` does not take with their default settings, and why.

    The model does not change. It may lie on the meta device, without weights.

    Args:
        model: as for `patch`.

    Returns:
        Reasons by name of the method.

    Raises:
        UnsupportedModelError: a model of no supported family.
    """
    executor = executor_of(model)
    executor.bind(model, make("full"))  # a model of no family
    found: dict[str, str] = {}
    for name, cls in methods().items():
        try:
            method = cls.example()
            check_method(method, executor)
            executor.bind(model, method)
        except (ArgumentError, ArgumentTypeError, UnsupportedModelError) as error:
            found[name] = str(error)
    return found


def unpatch(model: Any) -> None:
    """Restore `model` bit for bit to its state before `patch`; does nothing if it is not patched.

    Args:
        model: the model given to `patch`, or its base model, bare or wrapped.

    Raises:
        UnsupportedModelError: not a model.
    """
    found = _patch_of(model)
    if found is not None:
        if not found._disabled:
            found._bound.uninstall()
        _forget(found)


def _patch_of(model: Any) -> Patch | None:
    """The patch on `model`, or `None`."""
    for part in executor_of(model).holders(model):
        found = getattr(part, "__dict__", {}).get("_vtc_patch")
        if found is not None:
            return found
    return None


def _forget(patch: Patch) -> None:
    del vars(patch._bound.holder)["_vtc_patch"]
