# SPDX-License-Identifier: Apache-2.0
"""The loop alone: a method that learns one number, resumed, refused, and the model afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vtc.training.data import find_data
from vtc.training.loop import Batch, Feed, Group, Loop, Loss, Trained, fit

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Scale(Trained):
    """Learns the factor between a frozen model's output and its input."""

    name = "scale"

    def __init__(self, model: nn.Module) -> None:
        self.model, self.calls = model, list[str]()

    def start(self, accelerator: Any) -> list[Group]:
        self.calls.append("start")
        self.factor = nn.Parameter(torch.zeros((), device=accelerator.device))
        return [Group([self.factor], 0.2)]

    @contextmanager
    def active(self) -> Iterator[None]:
        self.calls.append("on")
        try:
            yield
        finally:
            self.calls.append("off")

    def prepare(self, feed: Feed) -> None:
        self.calls.append("prepare")

    def loss(self, batch: Batch, step: int) -> Loss:
        assert not self.model.training
        error = (self.model(batch["x"]) - self.factor * batch["x"]).square().mean()
        return Loss(error, {"error": float(error.detach())})

    def state(self) -> dict[str, Any]:
        return {"factor": self.factor.detach()}

    def restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.factor.copy_(state["factor"])

    def saved(self, out: Path) -> bool:
        return (out / "factor.json").is_file()

    def save(self, out: Path) -> None:
        (out / "factor.json").write_text(json.dumps(float(self.factor)))


class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def batch(step: int) -> dict[str, Tensor]:
    return {"x": torch.randn(4, generator=torch.Generator().manual_seed(step))}


def loop_of(out: Path, **more: Any) -> Loop:
    fields: dict[str, Any] = {"steps": 40, "clip": 10.0, "precision": "no", "save_every": 7}
    return Loop(out=out, made_with={"rate": 0.2}, **(fields | more))


def test_it_learns_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = Doubles().train()
    trained = Scale(model)
    assert fit(model, trained, batch, loop_of(tmp_path)) == tmp_path
    assert float(trained.factor) == pytest.approx(2.0, abs=0.4)
    assert float(model.weight) == 2.0
    assert model.training
    assert model.weight.requires_grad
    assert trained.calls == ["start", "on", "prepare", "off"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert set(lines[0]) == {"step", "error", "norm"}


def test_a_resumed_run_ends_bit_for_bit_as_one_without_a_stop(tmp_path: Path) -> None:
    def stops(step: int) -> dict[str, Tensor]:
        if step == 17:
            raise KeyboardInterrupt
        return batch(step)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(model := Doubles(), Scale(model), batch, loop_of(whole))
    stopped = Scale(model)
    with pytest.raises(KeyboardInterrupt):
        fit(model, stopped, stops, loop_of(parts))
    assert stopped.calls[-1] == "off"
    resumed = Scale(model)
    fit(model, resumed, batch, loop_of(parts))
    assert "prepare" not in resumed.calls
    for name in ("factor.json", "log.jsonl"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    again = Scale(model)
    fit(model, again, stops, loop_of(parts))  # it is done: no batch is asked for
    assert again.calls == ["start"]


def test_what_cannot_go_on_is_refused(tmp_path: Path) -> None:
    fit(model := Doubles(), Scale(model), batch, loop_of(tmp_path / "done", steps=2))
    other = Loop(tmp_path / "done", 2, 10.0, "no", 7, made_with={"rate": 0.1})
    with pytest.raises(ValueError, match=r"rate: the checkpoint in out was made with 0\.2"):
        fit(model, Scale(model), batch, other)

    def broken(step: int) -> dict[str, Tensor]:
        return {"x": torch.full((1,), float("nan"))}

    with pytest.raises(FloatingPointError, match="loss: nan at step 0"):
        fit(model, Scale(model), broken, loop_of(tmp_path / "nan"))
    with pytest.raises(ValueError, match="batches: expected at least one"):
        fit(model, Scale(model), [], loop_of(tmp_path / "none"))


def test_data_is_found_by_the_name_of_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_data.py").write_text("def load(folder): ...\ndef measure(*a): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="own_data: the module lacks batches"):
        find_data("own_data")
    with pytest.raises(ValueError, match="no_such_data"):
        find_data("no_such_data")
    (tmp_path / "whole_data.py").write_text("load = batches = measure = print\n")
    assert find_data("whole_data").load is print
