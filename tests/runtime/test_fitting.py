# SPDX-License-Identifier: Apache-2.0
"""In decoders of which not every layer attends, defaults move to layers that can be read."""

from __future__ import annotations

import pytest
import torch

import vtc
from tests.reference.families import FAMILIES
from tests.reference.masked import Masked
from tests.runtime.test_exactness import TOLERANCE, difference
from tests.runtime.test_families import pristine, rows_of, shared
from vtc.core import Method
from vtc.runtime.fitting import fit

FOURTH = [layer % 4 == 3 for layer in range(32)]
"""As in Qwen3.5."""


@pytest.mark.parametrize(
    ("method", "layers"),
    [
        ("fastv", (4,)),
        ("dart", (4,)),
        ("vscan", (19,)),
        ("pyramiddrop", (11, 19, 27)),
        ("sparsevlm", (4, 8, 16)),
        ("transprune", (7, 11, 15)),
        ("todre", (28,)),
        ("v2drop", (3, 17, 22)),
    ],
)
def test_defaults_move_up_to_what_can_be_read(method: str, layers: tuple[int, ...]) -> None:
    fitted = fit(vtc.make(method), FOURTH)
    assert fitted.prune_layers(32) == layers
    read = {*fitted.taps(32), *fitted.peeks(32)}
    assert all(FOURTH[layer] for layer in read)
    assert fit(fitted, FOURTH) == fitted


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "catp", "divprune"])
def test_nothing_moves_where_every_layer_attends(method: str) -> None:
    plain = vtc.make(method)
    assert fit(plain, [True] * 32) is plain


def test_what_a_user_sets_stays() -> None:
    for plain in (vtc.FastV(layer=3), vtc.PyramidDrop(layers=(5, 9))):
        assert fit(plain, FOURTH) is plain


def test_layers_before_and_after_which_methods_cut_are_told_apart() -> None:
    attends = [layer in (2, 5, 8, 10, 12, 14) for layer in range(16)]  # LFM2
    assert fit(vtc.SparseVLM(), attends).prune_layers(16) == (3, 6, 9)
    assert fit(vtc.PyramidDrop(), attends).prune_layers(16) == (5, 8, 12)


def test_a_method_that_reads_adjacent_layers_stays() -> None:
    assert fit(vtc.CATP(), FOURTH) == vtc.CATP()


def test_parts_of_a_composition_and_what_a_wrapper_holds_move() -> None:
    found = fit(vtc.DivPrune(keep=0.5) | vtc.FastV(keep=0.25), FOURTH)
    assert found.parts == (vtc.DivPrune(keep=0.5), vtc.FastV(keep=0.25, layer=4))
    assert fit(vtc.PerFrame(vtc.VScan()), FOURTH) == vtc.PerFrame(vtc.VScan(layer=19))


def test_no_layer_attends() -> None:
    assert fit(vtc.FastV(), [False] * 4) == vtc.FastV()
    assert fit(vtc.PyramidDrop(), [False] * 8) == vtc.PyramidDrop()


def test_a_patch_says_what_moved_and_runs_it() -> None:
    family, rows = FAMILIES["qwen3_5"], rows_of("qwen3_5", "ragged")
    with pytest.warns(UserWarning, match=r"have none in .*: fastv\(keep=0.5, layer=3\)"):
        patch = vtc.patch(shared("qwen3_5", "sdpa"), "fastv", keep=0.5)
    moved: Method = vtc.FastV(keep=0.5, layer=3)
    assert patch.method == moved
    batch = family.collate(rows)
    with patch, torch.no_grad():
        logits = patch.model(**batch).logits
    for i, row in enumerate(rows):
        real = batch["attention_mask"][i].bool()
        truth = Masked(family, pristine("qwen3_5"), moved, row)
        assert difference(logits[i, real], truth.logits()[0]) < TOLERANCE


def test_layers_that_are_set_and_cannot_be_read_are_refused() -> None:
    with pytest.raises(vtc.UnsupportedModelError, match=r"layer 0 .* no attention .*layers 2, 5"):
        vtc.patch(shared("qwen3_5", "sdpa"), "fastv", keep=0.5, layer=1)
