# SPDX-License-Identifier: Apache-2.0
"""A method of one instance, shadowed and restored."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable
from typing import Any

import torch

_KEYS = itertools.count()
_LOCK = threading.RLock()
"""Of shadowing and bringing back: models of several threads may share what is shadowed."""

WHOLE = (
    "a patched model is no single graph, since how many tokens it keeps depends on their values; "
    "vtc.unpatch(model) first, or compile only the decoder, without fullgraph: "
    "model.model.language_model = torch.compile(model.model.language_model)"
)
"""Why a patched model cannot be compiled with `fullgraph=True`, exported or traced."""


def _eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` left out of what is compiled, which Dynamo then explains, from torch 2.7 on."""
    takes = inspect.signature(torch.compiler.disable).parameters
    more: dict[str, Any] = {"reason": WHOLE} if "reason" in takes else {}
    return torch.compiler.disable(function, **more)


def refuse_tracing() -> None:
    """
    Raises:
        RuntimeError: the model is being exported or traced, which would fix the tokens that are
            kept to those of the example.
    """
    for tracer, on in (
        ("torch.export", getattr(torch.compiler, "is_exporting", bool)()),  # since torch 2.7
        ("torch.jit.trace", torch.jit.is_tracing()),
    ):
        if on:
            raise RuntimeError(f"{tracer}: {WHOLE}")


# Compiled, the method that is shadowed would be looked up on the instance, and be this again.
# Arguments are not taken apart, or every other set of them would be compiled anew.
@_eager
def _run(override: Override, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return override.run(override.target, *args, **kwargs)


class Override:
    """Shadows a method of one instance; `remove` brings the instance back as it was.

    An object and not a closure, so that copies and pickles of the model take it along. Like a
    method, it can be taken apart into an instance and a function, wrapped, and bound anew.
    """

    def __init__(self, target: Any, name: str, replacement: Callable[..., Any]) -> None:
        self.target, self.name, self.replacement = target, name, replacement
        self.removed = False
        self.key = next(_KEYS)
        with _LOCK:
            self.previous = vars(target).get(name)
            setattr(target, name, self)
            vars(target).setdefault(_NOTED, {})[self.key] = self

    @property
    def original(self) -> Any:
        """What is shadowed: an attribute of the instance, else the method of its class."""
        return self.original_of(self.target)

    def original_of(self, instance: Any) -> Any:
        """What `instance` would have without this."""
        if self.previous is not None:
            return self.previous
        # As Python looks it up, which binds a function and leaves a static method alone.
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
        # Whoever takes off wrappers and binds what is left (accelerate) must not bind this.
        return Unbound(self)

    @property
    def __code__(self) -> Any:
        return Override.__call__.__code__  # torch.export asks where a forward is defined

    # Not disabled itself, or `fullgraph=True` would only find that nothing was compiled.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self, args, kwargs)

    def run(self, instance: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call it for `instance`, which is the target or shares its attributes."""
        original = self.original_of(instance)
        if self.removed:  # somebody wrapped it in between
            return original(*args, **kwargs)
        refuse_tracing()
        return self.replacement(original, *args, **kwargs)

    def remove(self) -> None:
        """Several may shadow one method, and come off in any order."""
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
        # Others may have deleted it, or put something of theirs in its place, which stays.
        while (found := _override_in(above)) is not None:
            if _override_in(found.previous) is self:
                found.previous = self.previous
                return
            above = found.previous


def _override_in(value: Any) -> Override | None:
    """The override that `value` is, perhaps bound anew."""
    if isinstance(value, Override):
        return value
    function = getattr(value, "__func__", None)
    return function.override if isinstance(function, Unbound) else None


class Unbound:
    """An `Override` as the function that a method is before it is bound."""

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
        # A copy of the instance has an override of its own, but methods keep their function.
        noted = vars(instance).get(_NOTED, {})
        return noted.get(self.override.key, self.override).run(instance, *args, **kwargs)


_NOTED = "_vtc_overrides"
