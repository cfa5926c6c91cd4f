# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing replays layers in the backward: with it a patched model has the gradients
that it has without, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.reference.families import FAMILIES
from tests.reference.probes import Ragged
from tests.runtime import test_seq2seq as seq2seq
from vtc.core import Method
from vtc.runtime.hf.guards import HOOKS_INSIDE

METHODS: dict[str, Method] = {"sequence": Ragged(), "encoder": vtc.ToMe(keep=0.6)}
CELLS = [
    *((name, stage) for name in ("vipllava", "qwen2_5_vl") for stage in METHODS),
    *(("granite4_vision", "sequence"), ("gemma3", "sequence"), ("qwen3_vl", "sequence")),
    *(("florence2", "sequence"), ("blip-2", "sequence")),
]


def gradients(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # of dropout
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def refused(name: str, stage: str) -> bool:
    inside = stage == "encoder" or name == "granite4_vision"
    return name == "blip-2" or (HOOKS_INSIDE and inside)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("name", "stage"), CELLS)
def test_gradients_with_and_without(name: str, stage: str, reentrant: bool) -> None:
    if name in seq2seq.NAMES:
        model, batch = seq2seq.build(name), seq2seq.collate(name, seq2seq.rows_of(name, "ragged"))
    elif name not in FAMILIES:
        pytest.skip("this transformers is too old for it")
    else:
        family = FAMILIES[name]
        model, batch = family.build("sdpa"), family.collate(family.rows("ragged"))
    model.train()
    with vtc.patch(model, METHODS[stage]):
        expected = gradients(model, batch)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if refused(name, stage):
            with pytest.raises(RuntimeError, match=r"gradient_checkpointing: .*cannot replay"):
                gradients(model, batch)
            return
        found = gradients(model, batch)
    assert found.keys() == expected.keys()
    assert len(found) > 40
    for parameter, gradient in expected.items():
        assert torch.allclose(found[parameter], gradient, atol=1e-6, rtol=1e-4), parameter
