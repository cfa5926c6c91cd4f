# SPDX-License-Identifier: Apache-2.0
"""The stages at which a method can act: one table, from which methods, runners and errors read."""

from __future__ import annotations

from dataclasses import dataclass

from .states import EncoderState, LayerState, VisionTokens


@dataclass(frozen=True)
class Stage:
    """A place on the way of an image through the model.

    Attributes:
        name: what `Method.stages` calls it.
        hook: the function of a method that acts there.
        state: what the hook is shown; `None` where that is numbers alone, or not settled yet.
        place: where a method of it acts, in words that follow "acts".
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
"""All stages in the order in which an image passes them."""

_BY_NAME = {stage.name: stage for stage in STAGES}
_BY_HOOK = {stage.hook: stage for stage in STAGES}


def stage_of(name: str) -> Stage:
    """The stage of this name.

    Raises:
        KeyError: there is none.
    """
    return _BY_NAME[name]


def refused(method: object, hook: str) -> TypeError:
    """The error of a hook that the class of `method` does not override."""
    return TypeError(f"{type(method).__name__} does not act {_BY_HOOK[hook].place}")
