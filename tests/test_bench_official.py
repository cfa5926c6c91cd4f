# SPDX-License-Identifier: Apache-2.0
"""The released algorithms that the benchmark times keep what the methods keep. No timings."""

from __future__ import annotations

import pytest
import torch
from vtc.eval import bench_official as official

import vtc


@pytest.mark.parametrize("name", ["divprune", "cdpruner", "scope", "mmtok", "holov"])
def test_the_released_algorithm_keeps_what_the_method_keeps(name: str) -> None:
    tokens = official.tokens_of(180, 48)
    own = vtc.make(name, keep=18).select(tokens).indices.tolist()  # type: ignore[attr-defined]
    assert sorted(official.SEQUENCE[name](tokens, 18).tolist()) == own


def test_where_the_released_algorithm_differs_it_shares_most() -> None:
    """VisPruner in single precision, PruMerge by another attention, DART by fewer a pivot."""
    tokens, state = official.tokens_of(180, 48), official.state_of(180, 48)
    own = set(vtc.VisPruner(keep=18).select(tokens).indices.tolist())
    assert len(own & {*official.vispruner(tokens, 18).tolist()}) >= 16
    selection = vtc.DART(keep=36).prune(state)
    assert selection is not None
    assert len({*selection.indices.tolist()} & {*official.dart(state, 36).tolist()}) >= 34
    zipped = set(vtc.VisionZip(keep=18).select(tokens).indices.tolist())
    assert len(zipped & {*official.visionzip(tokens, 18).tolist()}) == 14


def test_all_are_measured() -> None:
    with torch.no_grad():
        found = official.measure(180, 18, 48, 1)
    assert found.keys() == {*official.SEQUENCE, "dart"}
    assert all(min(times) > 0 for times in found.values())
