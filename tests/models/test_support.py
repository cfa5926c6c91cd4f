# SPDX-License-Identifier: Apache-2.0
"""`vtc.methods(model)` and `vtc.refusals(model)` say before patching what patching would."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vtc
from tests.reference.families import FAMILIES
from tests.reference.models import build_model
from vtc.cli import app
from vtc.cli.support import skeleton
from vtc.core import make

NAMES = ["gemma3n", "idefics2", "llava_next", "mllama", "qwen2_vl", "qwen3_5"]


def patched(model: Any, name: str) -> str:
    """Why `patch` refuses, or "" if it does not."""
    try:
        vtc.patch(model, vtc.methods()[name].example()).unpatch()
    except (vtc.UnsupportedModelError, ValueError, TypeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", [name for name in NAMES if name in FAMILIES])
def test_it_says_what_patch_says(name: str) -> None:
    model = FAMILIES[name].build(FAMILIES[name].attentions[-1])
    before = {key: id(value) for key, value in vars(model).items()}
    refused, taken = vtc.refusals(model), vtc.methods(model)
    assert {key: id(value) for key, value in vars(model).items()} == before
    assert {*refused} | {*taken} == {*vtc.methods()}
    assert not {*refused} & {*taken}
    for method in vtc.methods():
        assert patched(model, method) == refused.get(method, "")


def test_a_llava_takes_every_method() -> None:
    assert vtc.methods(build_model("clip", "llama")) == vtc.methods()


def test_a_model_that_is_none_is_refused() -> None:
    with pytest.raises(vtc.UnsupportedModelError, match="supported are"):
        vtc.methods(torch.nn.Linear(2, 2))
    with pytest.raises(vtc.UnsupportedModelError, match="got str"):
        vtc.refusals("llava")


def test_every_method_has_an_example() -> None:
    for name, cls in vtc.methods().items():
        assert make(cls.example().to_dict()) == cls.example()
        assert cls.example().name == name


def test_a_model_without_weights_will_do() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = skeleton("qwen2_vl")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert "visionzip" in vtc.methods(model)


def test_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_model("clip", "llama").config.save_pretrained(folder)
    for model in (str(folder), "idefics2"):
        result = CliRunner().invoke(app, ["methods", "--model", model])
        assert result.exit_code == 0, result.output
        assert "takes" in result.output
    assert "not pool" in result.output
    assert "resampler" in " ".join(result.output.split())
    wrong = CliRunner().invoke(app, ["methods", "--model", str(tmp_path / "none")])
    assert wrong.exit_code == 2
    assert "--model" in wrong.output
    text = CliRunner().invoke(app, ["methods", "--model", "bert"])
    assert text.exit_code == 2
