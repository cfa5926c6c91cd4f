# SPDX-License-Identifier: Apache-2.0
"""The contract of an executor: what carries out methods in the models of one library.

`vtc.runtime.hf` is the one for transformers. Another package adds one by an entry point of the
group `vtc.executors` that names a module, in which a subclass of `Executor` is defined.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Any, ClassVar

from vtc.core import STAGES, Method
from vtc.core.errors import ArgumentError
from vtc.core.events import Listener
from vtc.core.plugins import load_group
from vtc.report import Report

EXECUTORS: list[type[Executor]] = []
"""The registered executors, the latest first."""


class Bound(ABC):
    """A method bound to one model.

    Attributes:
        model: the model that is patched, without wrappers.
        method: what runs.
        report: the figures of all prefills.
        listeners: called with every event of a selection.
    """

    model: Any
    method: Method
    report: Report
    listeners: list[Listener]

    @property
    @abstractmethod
    def holder(self) -> Any:
        """The object that holds the patch, for all names under which the model can be reached."""

    @abstractmethod
    def install(self) -> None:
        """Change the model; if this fails half-way, restore it.

        Raises:
            RuntimeError: it is installed already.
        """

    @abstractmethod
    def uninstall(self) -> None:
        """Restore the model.

        Raises:
            RuntimeError: the model is running.
        """


class Executor(ABC):
    """Binds methods to the models of one library.

    Class attributes:
        stages: names of the stages that it can run.
    """

    stages: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        same = (cls.__module__, cls.__qualname__)
        EXECUTORS[:] = [cls, *(e for e in EXECUTORS if (e.__module__, e.__qualname__) != same)]

    @classmethod
    @abstractmethod
    def accepts(cls, model: Any) -> bool:
        """Whether `model` is of its library. It may still be refused by `bind`."""

    @classmethod
    @abstractmethod
    def holders(cls, model: Any) -> tuple[Any, ...]:
        """The objects of which one holds the patch of `model`, if it has one."""

    @classmethod
    @abstractmethod
    def bind(cls, model: Any, method: Method) -> Bound:
        """Bind a method to a model, which does not change yet.

        Raises:
            ArgumentError: the method does not fit the model.
            UnsupportedModelError: the model is not supported.
        """


@cache
def _load() -> None:
    load_group("vtc.executors")


def executor_of(model: Any) -> type[Executor] | None:
    """The executor that accepts `model`, or `None`."""
    _load()
    return next((executor for executor in EXECUTORS if executor.accepts(model)), None)


def check_stages(method: Method, stages: tuple[str, ...]) -> None:
    """Refuse a method with a part that implements no stage, or one that an executor does not run.

    Args:
        method: the method, or a composition.
        stages: names of the stages that the executor runs.

    Raises:
        ArgumentError: a part overrides no hook, or the hook of another stage.
    """
    for part in method.parts:
        if not part.stages:
            hooks = ", ".join(stage.hook for stage in STAGES if stage.name in stages)
            raise ArgumentError(
                "method",
                f"{part} implements no stage: it overrides none of {hooks}, nor, as a "
                "ScorerMethod, score or score_layer",
            )
        if lacking := [name for name in part.stages if name not in stages]:
            raise ArgumentError(
                "method",
                f"no runner for stage {lacking[0]!r} in this executor, in which {part} acts; it "
                f"runs {', '.join(stages)}",
            )
