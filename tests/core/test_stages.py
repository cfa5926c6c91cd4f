# SPDX-License-Identifier: Apache-2.0
"""The table of stages, and what follows from it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pytest

import vtc
from tests.reference.models import shared_model
from vtc.core import STAGES, Method, stage_of
from vtc.runtime.hf.stages import RUNNERS


class Own(Method):
    """Keeps it out of `vtc.methods()`."""


Own.name = "own"


def of(*hooks: str) -> Method:
    """A method that overrides `hooks`."""
    cls: Any = type("Made", (Own,), {hook: lambda self, *_: None for hook in hooks})
    made: Method = dataclass(frozen=True)(cls)()
    return made


def test_the_stages_are_in_the_order_of_an_image() -> None:
    names = ["pixels", "encoder", "projector", "sequence", "layers", "decoder", "cache"]
    assert [stage.name for stage in STAGES] == names
    assert [stage_of(name).order for name in names] == list(range(7))
    hooks = {stage.hook for stage in STAGES if stage.name in RUNNERS}
    assert list(RUNNERS) == [stage.name for stage in STAGES if stage.name in RUNNERS]
    assert hooks == {stage.hook for stage in STAGES if hasattr(Method, stage.hook)}


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage.state], ids=lambda s: s.name)
def test_a_hook_is_shown_the_state_of_its_stage(stage: Any) -> None:
    _, shown = inspect.signature(getattr(Method, stage.hook)).parameters.values()
    assert shown.annotation == stage.state.__name__


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.name)
def test_a_method_acts_where_it_overrides_the_hook(stage: Any) -> None:
    assert of(stage.hook).stages == (stage.name,)
    assert of("prune", stage.hook, "select").stages == tuple(
        s.name for s in STAGES if s.name in {stage.name, "sequence", "layers"}
    )


@pytest.mark.parametrize("hook", ["target_grid", "merge", "select", "prune"])
def test_a_hook_that_is_not_overridden_says_where_the_method_does_not_act(hook: str) -> None:
    place = next(stage.place for stage in STAGES if stage.hook == hook)
    arguments: tuple[Any, ...] = (4, 4) if hook == "target_grid" else (None,)
    with pytest.raises(TypeError, match=f"^Made does not act {place}$"):
        getattr(of(), hook)(*arguments)


def test_patch_refuses_what_nothing_runs() -> None:
    model = shared_model("clip+llama", "sdpa")
    for name in ("projector", "decoder", "cache"):
        acting = of(stage_of(name).hook)
        for method in (acting, vtc.Random() | acting):
            with pytest.raises(ValueError, match=f"acts in stage '{name}', which this"):
                vtc.patch(model, method)
    for method in (of(), vtc.Random() | of()):
        with pytest.raises(ValueError, match=r"implements no stage: .* target_grid, merge, select"):
            vtc.patch(model, method)
    assert "_vtc_patch" not in vars(model.model)
