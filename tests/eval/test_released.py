# SPDX-License-Identifier: Apache-2.0
"""The released algorithms that the benchmark times keep what the methods keep. No timings."""

from __future__ import annotations

import pytest
import torch
from vtc.eval.bench import released

N, K, D = 240, 32, 64

SHARED = {
    "visionzip": 26,  # one row is that of [CLS], five are means, which have no place there
    "vispruner": 28,  # in single precision
    "prumerge_plus": 24,  # some of its grid are kept already
    "dart": 28,  # as many for each pivot
}
"""Where the released algorithm differs, how many of the tokens both keep."""


@pytest.fixture(scope="module")
def pairs() -> released.Pairs:
    with torch.no_grad():
        return released.pairs(N, K, D)


NAMES = [
    *released.SEQUENCE,
    *("dart", "fastv", "fastv, attending", "pyramiddrop, vscan", "pyramiddrop, looking ahead"),
    *("v2drop", "sparsevlm", "sparsevlm, with its rows"),
    *("transprune", "transprune, looking ahead", "tome", "flowcut", "flowcut, attending"),
]


@pytest.mark.parametrize("name", NAMES)
def test_the_released_algorithm_keeps_what_the_method_keeps(
    name: str, pairs: released.Pairs
) -> None:
    torch.manual_seed(0)  # of the noise on SparseVLM's densities
    with torch.no_grad():
        own, theirs = (run() for run in pairs[name])
    if own.is_floating_point():  # what is left holds the same, in the same order
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-4)
        return
    kept, also = set(own.tolist()), set(theirs.tolist())
    if name in SHARED:
        assert len(kept & also) >= SHARED[name]
    else:
        assert len(kept) == len(theirs)
        assert kept == also


def test_all_are_measured(pairs: released.Pairs) -> None:
    assert [*pairs] == NAMES
    with torch.no_grad():
        found = released.measure(N, K, D, 1, "fastv")
    assert found.keys() == {"fastv", "fastv, attending"}
    assert all(min(times) > 0 for times in found.values())
