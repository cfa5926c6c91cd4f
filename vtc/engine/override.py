# SPDX-License-Identifier: Apache-2.0
"""A method of one instance, shadowed and restored."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class Override:
    """Shadows a method of one instance; `remove` brings the instance back as it was.

    An object and not a closure, so that copies and pickles of the model take it along.
    """

    def __init__(self, target: Any, name: str, replacement: Callable[..., Any]) -> None:
        self.target, self.name, self.replacement = target, name, replacement
        self.original = getattr(target, name, None)
        self.previous = vars(target).get(name)
        setattr(target, name, self)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original or self.replacement)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.replacement(self.original, *args, **kwargs)

    def remove(self) -> None:
        delattr(self.target, self.name)
        if self.previous is not None:
            setattr(self.target, self.name, self.previous)
