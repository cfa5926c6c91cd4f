# SPDX-License-Identifier: Apache-2.0
"""Methods and families of other packages are found by their entry points."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest

import vtc
from vtc.core import plugins, registry
from vtc.models import base
from vtc.models import registry as families

METHOD = """
from dataclasses import dataclass

import torch

import vtc


@dataclass(frozen=True)
class Offered(vtc.Method):
    name = "offered"
    keep: float = 0.5

    def select(self, tokens: vtc.VisionTokens) -> vtc.Selection:
        return vtc.Selection(torch.arange(tokens.budget(self.keep)))
"""

FAMILY = """
from vtc.models import Llava


class Offered(Llava):
    \"\"\"LLaVA by another name.\"\"\"

    name = "offered_vl"
    model_types = ("offered_vl",)
"""


@pytest.fixture(params=[(registry, "vtc.methods"), (families, "vtc.families")])
def offered(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ModuleType, str, Path]]:
    """A registry that has not looked yet, and a module that an entry point of its group names."""
    where, group = request.param
    vtc.methods()  # our own, which are imported once
    vtc.models()
    monkeypatch.syspath_prepend(tmp_path)
    module = f"offered_{group.partition('.')[2]}"
    point = EntryPoint("theirs", module, group)
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: [point] if group == point.group else []
    )
    sys.modules.pop(module, None)
    before, kinds = dict(registry._REGISTRY), list(base.ADAPTERS)
    where._load.cache_clear()
    yield where, group, tmp_path / f"{module}.py"
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)
    base.ADAPTERS[:] = kinds
    where._load.cache_clear()


def test_what_a_package_offers_is_there_by_name(offered: tuple[ModuleType, str, Path]) -> None:
    _, group, file = offered
    file.write_text(METHOD if group == "vtc.methods" else FAMILY)
    if group == "vtc.methods":
        assert vtc.make("offered", keep=0.25).keep == 0.25  # type: ignore[attr-defined]
        assert "offered" in vtc.methods()
    else:
        assert "offered_vl" in {kind for info in vtc.models() for kind in info.model_types}


def test_a_package_that_fails_is_named_and_the_others_work(
    offered: tuple[ModuleType, str, Path],
) -> None:
    where, group, file = offered
    file.write_text("1 / 0")
    with pytest.warns(UserWarning, match=f"{group}: theirs of offered_.*ZeroDivisionError"):
        found = where.methods() if group == "vtc.methods" else where.families()
    assert len(found) > 20
    assert "offered" not in vtc.methods()


def test_a_name_or_a_model_type_of_another_is_refused() -> None:
    from vtc.models import InternVL, Llava

    kinds = list(base.ADAPTERS)
    with pytest.raises(TypeError, match="has a name of its own"):
        type("MyVL", (Llava,), {"model_types": ("my_vl",)})
    with pytest.raises(ValueError, match="InternVL has the model type 'internvl' already"):
        type("Mine", (Llava,), {"name": "mine", "model_types": ("mine", "internvl")})
    with pytest.raises(ValueError, match="Llava has the name 'llava' already"):
        type("Mine", (InternVL,), {"name": "llava", "model_types": ("mine",)})
    assert kinds == base.ADAPTERS


def test_a_method_of_another_module_does_not_take_a_name() -> None:
    with pytest.raises(ValueError, match=r"^name: vtc.methods.fastv.FastV is named 'fastv'"):
        type("FastV", (vtc.Method,), {"name": "fastv", "__qualname__": "FastV"})
    assert vtc.methods()["fastv"] is vtc.FastV
