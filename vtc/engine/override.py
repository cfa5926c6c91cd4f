# SPDX-License-Identifier: Apache-2.0
"""A method of one instance, shadowed and restored."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


class Override:
    """Shadows a method of one instance; `remove` brings the instance back as it was.

    An object and not a closure, so that copies and pickles of the model take it along.
    """

    def __init__(self, target: Any, name: str, replacement: Callable[..., Any]) -> None:
        self.target, self.name, self.replacement = target, name, replacement
        self.previous = vars(target).get(name)
        self.removed = False
        setattr(target, name, self)

    @property
    def original(self) -> Any:
        """What is shadowed: an attribute of the instance, else the method of its class."""
        if self.previous is not None:
            return self.previous
        # As Python looks it up, which binds a function and leaves a static method alone.
        found = inspect.getattr_static(type(self.target), self.name, None)
        bind = getattr(type(found), "__get__", None)
        return found if bind is None else bind(found, self.target, type(self.target))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original or self.replacement)

    # Compiled, the method that is shadowed would be looked up on the instance, and be this again.
    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.removed:  # somebody wrapped it in between
            return self.original(*args, **kwargs)
        return self.replacement(self.original, *args, **kwargs)

    def remove(self) -> None:
        self.removed = True
        # Others may have deleted it, or put something of theirs in its place, which stays.
        if vars(self.target).get(self.name) is self:
            delattr(self.target, self.name)
            if self.previous is not None:
                setattr(self.target, self.name, self.previous)
