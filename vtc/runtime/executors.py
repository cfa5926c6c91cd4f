# SPDX-License-Identifier: Apache-2.0
"""The contract of an executor: what carries out methods in the models of one library.

`vtc.runtime.hf` is the one for transformers. Another package adds one by an entry point of the
group `vtc.executors` that names a module, in which a subclass of `Executor` is defined.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Any, ClassVar

from vtc.core import SIGNALS, STAGES, Method
from vtc.core.errors import ArgumentError, UnsupportedModelError
from vtc.core.events import Listener
from vtc.core.plugins import load_group
from vtc.core.signals import check_needs
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
        """The object that holds the patch, in its `__dict__`, however the model is reached."""

    @abstractmethod
    def install(self) -> None:
        """Change the model; if this fails half-way, restore it.

        Raises:
            RuntimeError: it is installed already.
        """

    @abstractmethod
    def uninstall(self) -> None:
        """Restore the model. Called once after each `install`.

        Raises:
            RuntimeError: the model is running.
        """


class Executor(ABC):
    """Binds methods to the models of one library.

    Class attributes:
        signals: what its methods can read before the language model; by default everything.
    """

    signals: ClassVar[frozenset[str]] = frozenset(SIGNALS)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        same = (cls.__module__, cls.__qualname__)
        EXECUTORS[:] = [cls, *(e for e in EXECUTORS if (e.__module__, e.__qualname__) != same)]

    @classmethod
    @abstractmethod
    def stages(cls) -> tuple[str, ...]:
        """Names of the stages that it can run."""

    @classmethod
    @abstractmethod
    def accepts(cls, model: Any) -> bool:
        """Whether `model` is of its library. It may still be refused by `bind`."""

    @classmethod
    @abstractmethod
    def supported(cls) -> str:
        """What it accepts, to follow "expected"."""

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


def executor_of(model: Any) -> type[Executor]:
    """The executor that accepts `model`.

    Raises:
        UnsupportedModelError: there is none; says what is supported.
    """
    _load()
    for executor in EXECUTORS:
        if executor.accepts(model):
            return executor
    expected = "; ".join(executor.supported() for executor in EXECUTORS)
    raise UnsupportedModelError(
        f"model: got {type(model).__name__}, expected {expected or 'transformers, not installed'}"
    )


def check_method(method: Method, executor: type[Executor]) -> None:
    """Refuse a method with a part that an executor cannot run.

    Args:
        method: the method, or a composition.
        executor: what would run it.

    Raises:
        ArgumentError: a part overrides no hook, acts in another stage, or reads other signals.
    """
    stages = executor.stages()
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
                f"{part} acts in stage {lacking[0]!r}, which this executor does not run; it runs "
                f"{', '.join(stages)}",
            )
        check_needs(part.name, part.needs)  # for a property, which the class cannot check
        if unread := part.needs - executor.signals:
            raise ArgumentError(
                "method",
                f"{part} reads {', '.join(sorted(unread))}, which this executor does not capture; "
                f"it captures {', '.join(sorted(executor.signals)) or 'nothing'}",
            )
