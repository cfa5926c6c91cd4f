# SPDX-License-Identifier: Apache-2.0
"""Tokens without places: methods that need none work, the others say what they lack."""

from __future__ import annotations

import dataclasses

import pytest

import vtc
from tests.methods.test_method_split import tiled
from vtc.core import Method

TOKENS = dataclasses.replace(tiled(1, 6, 6), grid=None, crop=None, every_grid=None)


@pytest.mark.parametrize(
    "method",
    [
        vtc.CATP(0.25),
        vtc.CDPruner(0.25),
        vtc.Correlation(0.25),
        vtc.DivPrune(0.25),
        vtc.Full(),
        vtc.HoloV(0.25, variant="code"),
        vtc.MMTok(0.25),
        vtc.PerTile(vtc.Random(0.25)),
        vtc.PruMergePlus(0.25),
        vtc.Random(0.25),
        vtc.SCOPE(0.25),
        vtc.ToDRE(0.25),
        vtc.VisPruner(0.25),
        vtc.VisionZip(0.25),
    ],
    ids=str,
)
def test_methods_that_read_no_place_do_as_with_places(method: Method) -> None:
    placed = dataclasses.replace(tiled(1, 6, 6), crop=None)
    found, expected = method.select(TOKENS), method.select(placed)
    assert found.indices.tolist() == expected.indices.tolist()
    assert (found.features is None) == (expected.features is None)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (vtc.Downsample(0.25), "downsample: it resizes a grid"),
        (vtc.HoloV(0.25, variant="paper"), "holov: it divides the grid of tokens into crops"),
        (vtc.PerFrame(vtc.Random(0.25)), "per_frame: it divides tokens by frame"),
        (vtc.Pool(0.25), "pool: it averages neighbouring tokens"),
        (vtc.VScan(0.25), "vscan: it divides the grid of tokens into windows"),
    ],
    ids=str,
)
def test_the_others_refuse_by_name_and_reason(method: Method, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}.*, and the vision tokens of this model have"):
        method.select(TOKENS)
