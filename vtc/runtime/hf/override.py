# SPDX-License-Identifier: Apache-2.0
"""Replaces a method on one instance, and restores it."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

_KEYS = itertools.count()
_LOCK = threading.RLock()
"""Guards replacing and restoring: models of several threads may share an instance."""

WHOLE = (
    "a patched model is no single graph, since how many tokens it keeps depends on their values; "
    "vtc.unpatch(model) first, or compile only the decoder, without fullgraph: "
    "model.model.language_model = torch.compile(model.model.language_model)"
)
"""Why a patched model cannot be compiled with `fullgraph=True`, exported or traced."""


def _eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Exclude `function` from compilation; from torch 2.7 on Dynamo reports the reason."""
    takes = inspect.signature(torch.compiler.disable).parameters
    more: dict[str, Any] = {"reason": WHOLE} if "reason" in takes else {}
    return torch.compiler.disable(function, **more)


def refuse_tracing() -> None:
    """Refuse export and tracing, which would fix the kept tokens to those of the example.

    Raises:
        RuntimeError: torch is exporting or tracing.
    """
    for tracer, on in (
        ("torch.export", getattr(torch.compiler, "is_exporting", bool)()),  # since torch 2.7
        ("torch.jit.trace", torch.jit.is_tracing()),
    ):
        if on:
            raise RuntimeError(f"{tracer}: {WHOLE}")


# If compiled, the lookup of the original method on the instance would find this override again.
# Arguments stay packed; otherwise each new set of arguments would trigger a recompilation.
@_eager
def _run(override: Override, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return override.run(override.target, *args, **kwargs)


class Override:
    """Replaces a method of one instance; `remove` restores it.

    It is an object and not a closure, so that copies and pickles of the model include it. Like a
    method, it has `__self__` and `__func__`, and can be wrapped and bound to another instance.

    Args:
        target: the instance.
        name: of its method.
        replacement: called with the original, then the arguments of the call.
        passes: told the keyword arguments of a call, whether it goes to the original at once. torch
            compiles such calls; all others run as they are.
    """

    def __init__(
        self,
        target: Any,
        name: str,
        replacement: Callable[..., Any],
        passes: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> None:
        self.target, self.name, self.replacement = target, name, replacement
        # To torch a static method is another thing; no model of transformers has one here.
        own = inspect.getattr_static(type(target), name, None)
        self.passes = passes if inspect.isfunction(own) else None
        self.removed = False
        self.key = next(_KEYS)
        with _LOCK:
            self.previous = vars(target).get(name)
            setattr(target, name, self)
            vars(target).setdefault(_NOTED, {})[self.key] = self

    @property
    def original(self) -> Any:
        """What is replaced: the instance's attribute, else the method of its class."""
        return self.original_of(self.target)

    def original_of(self, instance: Any) -> Any:
        """What `instance` would have without this override; `None` if there is no such method."""
        if self.previous is not None:
            return self.previous
        # The lookup of Python: it binds a function, but not a static method.
        found = inspect.getattr_static(type(instance), self.name, None)
        bind = getattr(type(found), "__get__", None)
        return found if bind is None else bind(found, instance, type(instance))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original or self.replacement)

    @property
    def __self__(self) -> Any:
        return self.target

    @property
    def __func__(self) -> Unbound:
        return Unbound(self)

    @property
    def __wrapped__(self) -> Unbound:
        # accelerate unwraps a forward and binds the result, which must not be this object.
        return Unbound(self)

    @property
    def __code__(self) -> Any:
        return Override.__call__.__code__  # torch.export reads where a forward is defined

    # Not excluded itself; otherwise `fullgraph=True` would only report that nothing was compiled.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.passes is not None and not self.removed and self.passes(kwargs):
            if self.previous is not None:
                return self.previous(*args, **kwargs)
            return getattr(type(self.target), self.name)(self.target, *args, **kwargs)
        return _run(self, args, kwargs)

    def run(self, instance: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call the replacement, or the original after `remove`.

        Args:
            instance: the target, or an object that shares its attributes.
            args: of the call.
            kwargs: of the call.

        Returns:
            What the called function returns.

        Raises:
            RuntimeError: torch is exporting or tracing.
        """
        original = self.original_of(instance)
        if self.removed:  # a wrapper still holds it
            return original(*args, **kwargs)
        refuse_tracing()
        return self.replacement(original, *args, **kwargs)

    def remove(self) -> None:
        """Restore the method. Several overrides of one method may be removed in any order."""
        self.removed = True
        with _LOCK:
            self._remove()

    def _remove(self) -> None:
        noted = vars(self.target).get(_NOTED, {})
        noted.pop(self.key, None)
        if not noted:
            vars(self.target).pop(_NOTED, None)
        above = vars(self.target).get(self.name)
        if _override_in(above) is self:
            delattr(self.target, self.name)
            if self.previous is not None:
                setattr(self.target, self.name, self.previous)
            return
        # Other code may have deleted or replaced the attribute; theirs stays.
        while (found := _override_in(above)) is not None:
            if _override_in(found.previous) is self:
                found.previous = self.previous
                return
            above = found.previous


def _override_in(value: Any) -> Override | None:
    """The override in `value`, perhaps bound to another instance, or `None`."""
    if isinstance(value, Override):
        return value
    function = getattr(value, "__func__", None)
    return function.override if isinstance(function, Unbound) else None


class Unbound:
    """The unbound function of an `Override`, which takes the instance first.

    Args:
        override: the override.
    """

    def __init__(self, override: Override) -> None:
        self.override = override
        self.__name__ = override.name

    @property
    def __signature__(self) -> inspect.Signature:
        bound = inspect.signature(self.override)
        this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        return bound.replace(parameters=[this, *bound.parameters.values()])

    @_eager
    def __call__(self, instance: Any, /, *args: Any, **kwargs: Any) -> Any:
        # A copy of the instance has its own override, but bound methods keep their function.
        noted = vars(instance).get(_NOTED, {})
        return noted.get(self.override.key, self.override).run(instance, *args, **kwargs)


_NOTED = "_vtc_overrides"
