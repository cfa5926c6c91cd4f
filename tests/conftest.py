# SPDX-License-Identifier: Apache-2.0
"""What all tests share: one thread, and a count of the cells of the exactness matrix."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch

# The models of the tests are so small that a second thread only costs time.
torch.set_num_threads(1)
# Programs and notebooks that tests start beside other tests: two threads would wait for one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@dataclass
class Recorder:
    """The cells compared with the reference in this session, and how far off they were."""

    cells: int = 0
    largest: float = 0.0
    where: str = ""
    smallest_control: float = float("inf")

    def note(self, where: str, difference: float, control: float | None = None) -> None:
        """One more cell: its difference to the reference, and that of the unpruned model."""
        self.cells += 1
        if difference >= self.largest:
            self.largest, self.where = difference, where
        if control is not None:
            self.smallest_control = min(self.smallest_control, control)

    def add(self, other: Recorder) -> None:
        """What another process recorded."""
        self.cells += other.cells
        if other.largest >= self.largest:
            self.largest, self.where = other.largest, other.where
        self.smallest_control = min(self.smallest_control, other.smallest_control)


_RECORDER = pytest.StashKey[Recorder]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDER] = Recorder()


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the precision of a process's first Accelerator for good; so would the other
    tests of this process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def recorder(request: pytest.FixtureRequest) -> Recorder:
    """Counts the cells that were compared with the reference."""
    return request.config.stash[_RECORDER]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one process of several
        session.config.workeroutput["recorder"] = asdict(session.config.stash[_RECORDER])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    found = getattr(node, "workeroutput", {}).get("recorder")
    if found is not None:
        node.config.stash[_RECORDER].add(Recorder(**found))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    recorder = config.stash[_RECORDER]
    if recorder.cells:
        terminalreporter.write_line(
            f"exactness: {recorder.cells} cells, largest difference to the reference "
            f"{recorder.largest:.2e} ({recorder.where}), smallest difference of the unpruned "
            f"model {recorder.smallest_control:.2e}"
        )
