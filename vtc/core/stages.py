# SPDX-License-Identifier: Apache-2.0
"""The stages at which a method can act: one table for methods, runners and errors."""

from __future__ import annotations

from dataclasses import dataclass

from .states import EncoderState, LayerState, VisionTokens


@dataclass(frozen=True)
class Stage:
    """A point on an image's way through the model.

    Attributes:
        name: its name in `Method.stages`.
        hook: the function of a method that acts there.
        state: what the hook receives; `None` for plain numbers or a hook not yet defined.
        place: where a method acts, in words that follow "acts".
    """

    name: str
    hook: str
    state: type | None
    place: str

    @property
    def order(self) -> int:
        """How many stages come before it."""
        return STAGES.index(self)


STAGES: tuple[Stage, ...] = (
    Stage("pixels", "target_grid", None, "on the pixels"),
    Stage("encoder", "merge", EncoderState, "in the vision tower"),
    Stage("projector", "project_patches", None, "in the projector"),
    Stage("sequence", "select", VisionTokens, "in the sequence stage"),
    Stage("layers", "prune", LayerState, "between layers"),
    Stage("decoder", "decode_step", None, "while decoding"),
    Stage("cache", "evict", None, "on the cache"),
)
"""All stages in the order in which an image passes through them."""

_BY_NAME = {stage.name: stage for stage in STAGES}
_BY_HOOK = {stage.hook: stage for stage in STAGES}


def stage_of(name: str) -> Stage:
    """The stage of this name.

    Raises:
        KeyError: there is no such stage.
    """
    return _BY_NAME[name]


def refused(method: object, hook: str) -> TypeError:
    """The error for a hook that the class of `method` does not override."""
    return TypeError(f"{type(method).__name__} does not act {_BY_HOOK[hook].place}")
