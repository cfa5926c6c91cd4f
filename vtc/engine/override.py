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
        method = getattr(type(self.target), self.name, None)
        return None if method is None else method.__get__(self.target)

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
        """Several may shadow one method, and come off in any order."""
        self.removed = True
        above = vars(self.target).get(self.name)
        if above is self:
            delattr(self.target, self.name)
            if self.previous is not None:
                setattr(self.target, self.name, self.previous)
            return
        # Others may have deleted it, or put something of theirs in its place, which stays.
        while isinstance(above, Override):
            if above.previous is self:
                above.previous = self.previous
                return
            above = above.previous
