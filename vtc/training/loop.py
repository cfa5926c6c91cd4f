# SPDX-License-Identifier: Apache-2.0
"""The loop that trains the weights of a method: batches, a loss, an optimiser, checkpoints, a log.

The loop is independent of the method, which is a `Trained`: parameters, a loss, and how to save
them. An interrupted run resumes from its checkpoint, with the same result bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vtc.core.errors import ArgumentError

Batch = Mapping[str, Tensor]
Batches = Callable[[int], Batch] | Iterable[Batch]
"""A pure function from a step's number to its batch, or batches to iterate over repeatedly. A batch
holds the model's inputs and `labels`; -100 marks the prompt."""

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Loop:
    """Settings of a training loop.

    Attributes:
        out: folder for `log.jsonl`, for `checkpoint.pt`, which only resuming needs, and for what
            `Trained.save` writes.
        steps: number of updates; `None` for as many as the minutes allow.
        clip: maximum gradient norm.
        precision: of `accelerate.Accelerator`: "no" or "bf16"; there is no loss scaling for fp16.
        save_every: steps between checkpoints.
        made_with: settings that a checkpoint must match to be resumed.
        minutes: ends the run by the clock, which a resumed run continues; `None` for no limit.
        accumulate: batches per update; `Trained.weight` says what each counts.
    """

    out: Path
    steps: int | None
    clip: float
    precision: str
    save_every: int
    made_with: Mapping[str, Any]
    minutes: float | None = None
    accumulate: int = 1

    def progress(self, step: int, seconds: float) -> float:
        """How much of the run is done, from 0; 1 at its end."""
        by_steps = 0.0 if self.steps is None else step / self.steps
        by_clock = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return max(by_steps, by_clock)


@dataclass(frozen=True)
class Group:
    """Parameters and their learning rate, with warm-up over the first 5 % of the run and cosine
    decay to a tenth.

    Attributes:
        parameters: that are trained.
        rate: peak learning rate.
    """

    parameters: list[nn.Parameter]
    rate: float


@dataclass(frozen=True)
class Loss:
    """The loss of one batch.

    Attributes:
        value: scalar to minimise, with its gradient.
        figures: for the log, by name.
    """

    value: Tensor
    figures: Mapping[str, float]


class Trained(ABC):
    """What a loop trains.

    Class attributes:
        name: shown beside the progress bar.
    """

    name: ClassVar[str]

    @abstractmethod
    def start(self, accelerator: Any) -> list[Group]:
        """Create the trained parameters.

        The model is already on the device, frozen and in evaluation mode. The loop makes the
        returned parameters require gradients.

        Args:
            accelerator: an `accelerate.Accelerator`, with the device to use.

        Returns:
            The parameters, in groups.
        """

    def active(self) -> AbstractContextManager[None]:
        """A context that is active on the model during training."""
        return nullcontext()

    def prepare(self, feed: Feed) -> None:  # noqa: B027
        """Prepare before the first step; a resumed run skips this.

        Args:
            feed: the batches of this process.
        """

    @abstractmethod
    def loss(self, batch: Batch, step: int) -> Loss:
        """The loss of a batch, with gradients; called in order, once per step or, with
        `Loop.accumulate`, once for each of its batches.

        Args:
            batch: the inputs and labels, on the device.
            step: number of the step, from 0.

        Returns:
            The loss, and figures for the log.
        """

    def weight(self, batch: Batch) -> float:
        """What a batch counts among those of its step: the number of things that its loss is the
        mean of.

        Args:
            batch: the inputs and labels, on the device.
        """
        return 1.0

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides "config", "optimizer", "step", "seconds" and "log"."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Restore from a checkpoint.

        Args:
            state: what `state` returned, and the other entries of the checkpoint.
        """

    @abstractmethod
    def saved(self, out: Path) -> bool:
        """Whether the folder `out` holds what `save` writes."""

    @abstractmethod
    def save(self, out: Path) -> None:
        """Write the trained weights to the folder `out`, after the last step."""


class Feed:
    """The batches of this process, by step, on its device.

    Args:
        batches: of all processes.
        accelerator: an `accelerate.Accelerator`.
    """

    def __init__(self, batches: Batches, accelerator: Any) -> None:
        self.batches, self.accelerator = batches, accelerator
        self.iterator: Any = None
        self.at = 0

    def __call__(self, step: int) -> dict[str, Tensor]:
        wanted = step * self.accelerator.num_processes + self.accelerator.process_index
        if callable(self.batches):
            batch = self.batches(wanted)
        else:
            if self.iterator is None or wanted < self.at:
                self.iterator, self.at = self._around(self.batches), 0
            batch = next(islice(self.iterator, wanted - self.at, None))
            self.at = wanted + 1
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}

    @staticmethod
    def _around(batches: Iterable[Batch]) -> Iterator[Batch]:
        while True:
            found = False
            for batch in batches:
                found = True
                yield batch
            if not found:
                raise ArgumentError("batches", "expected at least one, got none")


def fit(model: nn.Module, trained: Trained, batches: Batches, loop: Loop) -> Path:
    """Train, resuming from a checkpoint in `loop.out` if there is one.

    The model is frozen except for the parameters of `trained`; its mode is restored afterwards.
    With several processes (`accelerate launch`), each has its own batches, and gradients are
    averaged.

    Args:
        model: the model; it is moved to the device.
        trained: what to train.
        batches: of all processes.
        loop: the settings.

    Returns:
        `loop.out`.

    Raises:
        ArgumentError: the checkpoint was made with other settings, or there is no batch.
        FloatingPointError: the loss is not finite.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=loop.precision)
    was_training = model.training
    asked = [p.requires_grad for p in model.parameters()]
    model.to(accelerator.device).eval().requires_grad_(False)
    try:
        return _Run(trained, Feed(batches, accelerator), loop, accelerator).whole()
    finally:
        model.train(was_training)
        for parameter, wanted in zip(model.parameters(), asked, strict=True):
            parameter.requires_grad_(wanted)


class _Run:
    """One run of a loop, from its start or from a checkpoint."""

    def __init__(self, trained: Trained, feed: Feed, loop: Loop, accelerator: Any) -> None:
        self.trained, self.feed, self.loop, self.accelerator = trained, feed, loop, accelerator
        groups = trained.start(accelerator)
        self.parameters = [p for group in groups for p in group.parameters]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            [{"params": group.parameters, "scale": group.rate} for group in groups],
            lr=groups[0].rate,
            weight_decay=0.0,
        )
        self.step, self.seconds, self.log = 0, 0.0, list[dict[str, float]]()

    def whole(self) -> Path:
        """Run the remaining steps."""
        out, main = self.loop.out, self.accelerator.is_main_process
        self._resume()
        if self._progress() >= 1 and self.trained.saved(out):
            return out
        with self.trained.active():
            if self.step == 0 and not self.log:
                self.trained.prepare(self.feed)
            bar = tqdm(
                total=self.loop.steps, initial=self.step, desc=self.trained.name, disable=not main
            )
            while self._progress() < 1:
                since = time.monotonic()
                line = self._advance()
                self.seconds += time.monotonic() - since
                shown = {name: f"{value:.4g}" for name, value in line.items() if name != "step"}
                bar.set_postfix(shown, refresh=False)
                bar.update()
                if self.step % self.loop.save_every == 0:
                    self._save()
            bar.close()
        self._save()
        if main:
            self.trained.save(out)
        self.accelerator.wait_for_everyone()
        return out

    def _resume(self) -> None:
        path = self.loop.out / CHECKPOINT
        if not path.is_file():
            return
        state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        for name, value in self.loop.made_with.items():
            if state["config"].get(name) != value:
                raise ArgumentError(
                    name,
                    f"the checkpoint in out was made with {state['config'].get(name)!r}, "
                    f"got {value!r}; give another out, or delete {CHECKPOINT}",
                )
        self.trained.restore(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.log = state["step"], state["log"]
        self.seconds = state.get("seconds", 0.0)

    def _progress(self) -> float:
        seconds = self.seconds
        if self.loop.minutes is not None:  # one clock for all processes, so that they end together
            clock = torch.tensor(seconds, device=self.accelerator.device)
            seconds = float(self.accelerator.reduce(clock, "mean"))
        return self.loop.progress(self.step, seconds)

    def _advance(self) -> dict[str, float]:
        """One step; returns its line of the log."""
        progress, count = self._progress(), self.loop.accumulate
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * _schedule(progress)
        batches = [self.feed(self.step * count + i) for i in range(count)]
        weights = [self.trained.weight(batch) for batch in batches]
        figures: dict[str, float] = {}
        for batch, weight in zip(batches, weights, strict=True):
            share = weight / sum(weights)
            loss = self.trained.loss(batch, self.step)
            if not bool(torch.isfinite(loss.value)):
                raise FloatingPointError(f"loss: {float(loss.value)} at step {self.step}")
            self.accelerator.backward(loss.value if count == 1 else share * loss.value)
            for name, value in loss.figures.items():
                figures[name] = figures.get(name, 0.0) + share * value
        for parameter in self.parameters:
            if self.accelerator.num_processes > 1:  # each waits for all, so none may stay away
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(own, "mean")
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.loop.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        line = {"step": self.step, **figures, "norm": float(norm)}
        self.log.append({name: round(value, 5) for name, value in line.items()})
        return line

    def _save(self) -> None:
        """Write checkpoint and log, each atomically."""
        if not self.accelerator.is_main_process:
            return
        out = self.loop.out
        state = {
            "config": dict(self.loop.made_with),
            **self.trained.state(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
        }
        out.mkdir(parents=True, exist_ok=True)
        _write(out / CHECKPOINT, lambda file: torch.save(state, file))
        text = "".join(json.dumps(line) + "\n" for line in self.log)
        _write(out / "log.jsonl", lambda file: file.write_text(text))


def _schedule(progress: float) -> float:
    if progress < 0.05:
        return max(progress, 1e-3) / 0.05
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(temporary)
    temporary.replace(path)
