# SPDX-License-Identifier: Apache-2.0
"""An executor for models that are not of transformers is one class in another package: here for a
model that is no PyTorch module. Methods, patching and report are those of vtc."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtc
from tests.test_layers import BLOCKED
from vtc.core import Method, VisionTokens
from vtc.core.errors import ArgumentError
from vtc.core.events import Event, Prefilled, Selected
from vtc.core.prefill import ImageTokens, Prefill, Sample, Stopwatch
from vtc.report import Report
from vtc.runtime import executors
from vtc.runtime.choices import Choices, choose


class Served:
    """A model of another library: turns images into tokens and says how many it saw."""

    def tokens_of(self, image: Tensor) -> Tensor:
        """(n, 3) the pixels of an image (3, h, w)."""
        return image.flatten(1).T

    def ask(self, images: list[Tensor]) -> list[int]:
        """How many tokens of each image the model reads."""
        return [len(self.tokens_of(image)) for image in images]


class Hooked(executors.Bound):
    """Replaces `tokens_of`."""

    def __init__(self, model: Served, method: Method) -> None:
        self.model, self.method = model, method
        self.report, self.listeners = Report(None), []

    @property
    def holder(self) -> Served:
        return self.model

    def install(self) -> None:
        if "tokens_of" in vars(self.model):
            raise RuntimeError("this patch is on its model already")
        self.model.tokens_of = self._fewer  # type: ignore[method-assign]

    def uninstall(self) -> None:
        del self.model.tokens_of

    def _fewer(self, image: Tensor) -> Tensor:
        every, (rows, columns) = Served.tokens_of(self.model, image), image.shape[1:]
        place = torch.arange(rows * columns)
        grid = torch.stack([torch.zeros_like(place), place // columns, place % columns], dim=1)
        choices = Choices((self.report.hear, *self.listeners), shows=bool(self.listeners))

        def tokens(method: Method, features: Tensor, alive: Tensor) -> VisionTokens:
            return VisionTokens.among(features, grid, None, alive, total=len(every))

        chosen = choose(choices, tuple(enumerate(self.method.parts)), 0, 0, every, tokens)
        assert chosen is not None
        counted = ImageTokens(len(every), len(every), ((0, len(chosen.alive)),), 1)
        clocks = [Stopwatch() for _ in range(4)]
        sample = Sample(0, (counted,), (len(chosen.alive),))
        choices.emit(Prefilled(Prefill([sample], 4, *clocks)))
        return chosen.features


@contextmanager
def registered() -> Iterator[None]:
    """Register the executor, as an entry point would."""
    before = list(executors.EXECUTORS)

    class Serving(executors.Executor):
        signals: ClassVar[frozenset[str]] = frozenset()

        @classmethod
        def accepts(cls, model: Any) -> bool:
            return isinstance(model, Served)

        @classmethod
        def stages(cls) -> tuple[str, ...]:
            return ("sequence",)

        @classmethod
        def supported(cls) -> str:
            return "a served model"

        @classmethod
        def holders(cls, model: Any) -> tuple[Any, ...]:
            return (model,)

        @classmethod
        def bind(cls, model: Any, method: Method) -> Hooked:
            return Hooked(model, method)

    try:
        yield
    finally:
        executors.EXECUTORS[:] = before


@pytest.fixture(autouse=True)
def _with_the_executor() -> Iterator[None]:
    with registered():
        yield


def image() -> Tensor:
    return torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))


def test_a_patch_on_it_and_off_it() -> None:
    model = Served()
    both = vtc.DivPrune(keep=0.5) | vtc.Pool(keep=9)
    with vtc.patch(model, both) as patch:
        events: list[Event] = []
        with patch.listen(events.append):
            assert model.ask([image()]) == [9]
        assert [e.method.name for e in events if isinstance(e, Selected)] == ["divprune", "pool"]
        assert (patch.report.tokens_in, patch.report.tokens_out) == (36, 9)
        with patch.disable():
            assert model.ask([image()]) == [36]
        assert model.ask([image()]) == [9]
    assert model.ask([image()]) == [36]
    assert not vars(model)


def test_a_second_patch_replaces_the_first() -> None:
    model = Served()
    first = vtc.patch(model, "random", keep=4)
    vtc.patch(model, "random", keep=5)
    assert not first.active
    assert model.ask([image()]) == [5]
    vtc.unpatch(model)
    assert model.ask([image()]) == [36]


def test_stages_that_it_does_not_run_are_refused() -> None:
    with pytest.raises(ArgumentError, match="stage 'layers', which this executor") as caught:
        vtc.patch(Served(), "fastv")
    assert caught.value.argument == "method"
    with pytest.raises(ArgumentError, match="reads cls_attention, encoder, keys, which"):
        vtc.patch(Served(), "visionzip")


def test_a_patch_that_is_disabled_comes_off_once() -> None:
    model = Served()
    with vtc.patch(model, "random", keep=4).disable():
        vtc.unpatch(model)
    assert model.ask([image()]) == [36]
    with vtc.patch(model, "random", keep=4).disable():
        vtc.patch(model, "random", keep=6)
    assert model.ask([image()]) == [6]


def test_other_objects_are_still_refused() -> None:
    with pytest.raises(vtc.UnsupportedModelError, match=r"a served model; .*supported are"):
        vtc.patch(object(), "fastv")
    with pytest.raises(vtc.UnsupportedModelError, match="got object"):
        vtc.unpatch(object())


def test_it_runs_without_transformers(tmp_path: Path) -> None:
    code = (
        BLOCKED.format(blocked="transformers")
        + """
import torch, vtc, tests.runtime.test_new_executor as here
model = here.Served()
with here.registered():
    with vtc.patch(model, "divprune", keep=5):
        assert model.ask([here.image()]) == [5]
assert "transformers" not in sys.modules
print("done")
"""
    )
    root = Path(__file__).parents[2]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=env, check=False
    )
    assert ran.stdout == "done\n", ran.stderr
