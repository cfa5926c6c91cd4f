# SPDX-License-Identifier: Apache-2.0
"""The table of signals against `VisionTokens`, and what a method may ask for."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest

import vtc
from vtc.core import SIGNALS, Method, Signal, VisionTokens
from vtc.core.signals import fields_of, read_at

EVERY_FIELD = {field.name for field in dataclasses.fields(VisionTokens)}
ALWAYS = {"features", "grid", "image", "crop", "every_grid", "every_crop", "total"}
"""Fields that are shown to every method."""


def test_the_table_has_every_name_and_every_field() -> None:
    assert tuple(SIGNALS) == get_args(Signal)
    fields = [field for spec in SIGNALS.values() for field in spec.fields]
    of_tiles = {field.of_tiles for field in fields if field.of_tiles}
    assert {field.name for field in fields} | of_tiles | ALWAYS == EVERY_FIELD
    for name, spec in SIGNALS.items():
        assert spec.name == spec.fields[0].name == name


def test_companions_are_of_the_same_scope_everywhere() -> None:
    scopes = [set(fields_of(scope)) for scope in ("token", "tile", "image")]  # type: ignore[arg-type]
    assert sum(map(len, scopes)) == len(set().union(*scopes))
    assert scopes[0] == {"cls_attention", "low_attention", "keys", "encoder", "patches"}
    assert {f.name: f.of_tiles for f in fields_of("tile").values()} == {
        "cls_query": "crop_query",
        "cls_key": "crop_key",
        "encoder_cls": "crop_cls",
    }


def test_layers_are_attributes_of_methods() -> None:
    for spec in SIGNALS.values():
        assert spec.layer is None or hasattr(Method, spec.layer)
        assert spec.rows == (spec.layer is not None) == (spec.source == "tower attention")
    assert read_at("low_layer") == {"low_attention"}
    assert read_at("vision_layer") == {"cls_attention", "cls_query", "keys"}


@pytest.mark.parametrize("needs", [{"cls_atention"}, {"keys", "cls_atention"}])
def test_an_unknown_signal_is_refused_as_the_class_is_made(needs: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"^needs: Own: unknown signal 'cls_atention' \(did you mean cls_attention",
    ):
        type("Own", (Method,), {"needs": frozenset(needs)})


def test_the_methods_ask_for_what_there_is() -> None:
    for cls in vtc.methods().values():
        assert isinstance(cls.needs, property) or cls.needs <= SIGNALS.keys()
