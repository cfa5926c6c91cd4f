# SPDX-License-Identifier: Apache-2.0
"""The tools with which the embedded VLM is trained: packs of questions, evidence, the optimiser."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from vtc.eval.embedded.scenes.labels import GRID, PATCH_SIZE
from vtc.eval.embedded.scenes.questions import Asked
from vtc.eval.embedded.scenes.scenes import generate
from vtc.eval.embedded.training.common import MasterOptimizer, with_muon
from vtc.eval.embedded.training.packs import Pack, Packer, evidence_loss, keep_patches
from vtc.eval.embedded.vlm import IMAGE_TOKENS, embedded_path

BOX = (28.0, 42.0, 70.0, 84.0)
"""Three patches each way: columns 2 to 4, rows 3 to 5."""
FAR = (280.0, 280.0, 322.0, 322.0)


@pytest.fixture(scope="module")
def packer() -> Packer:
    from transformers import AutoTokenizer

    return Packer(AutoTokenizer.from_pretrained(embedded_path()))


def pack_of(packer: Packer, *asked: Asked) -> Pack:
    return packer.pack([(np.arange(IMAGE_TOKENS), asked)])


def looked_at(pack: Pack, row: int, head: int) -> dict[tuple[int, int], float]:
    """Patches (row, column) and their share of what one token should look at; (-1, -1) is <s>."""
    start = int((pack.ids[0] < 0).nonzero()[0])
    shares = pack.evidence[row, head]
    found = {}
    for place in shares.nonzero().flatten().tolist():
        patch = place - start
        found[(patch // GRID, patch % GRID) if place else (-1, -1)] = float(shares[place])
    return found


def test_a_question_packed_with_others_is_as_if_asked_alone(packer: Packer) -> None:
    first, second = (
        Asked("Is there a star?", "yes", "existence"),
        Asked("Where?", "top", "position"),
    )
    both, alone = pack_of(packer, first, second), pack_of(packer, second)
    places = both.where[both.question == 1, 1]
    alone_places = alone.where[:, 1]
    assert both.positions[0, places].tolist() == alone.positions[0, alone_places].tolist()
    seen, alone_seen = both.mask[0, 0, places[-1]] == 0, alone.mask[0, 0, alone_places[-1]] == 0
    assert both.ids[0][seen].tolist() == alone.ids[0][alone_seen].tolist()


def test_evidence_names_the_patches_well_inside(packer: Packer) -> None:
    pack = pack_of(packer, Asked("What color is the star?", "red", "attribute", (BOX,)))
    for row in range(len(pack.where)):
        for head in (0, 1):
            share = looked_at(pack, row, head)
            assert set(share) == {(r, c) for r in (3, 4, 5) for c in (2, 3, 4)}
            assert sum(share.values()) == pytest.approx(1)


def test_a_count_looks_at_the_start_and_at_every_centre_alike(packer: Packer) -> None:
    pack = pack_of(packer, Asked("How many stars are there?", "2", "count", (BOX, FAR)))
    third = pytest.approx(1 / 3)
    assert looked_at(pack, 0, 0) == {(-1, -1): third, (4, 3): third, (21, 21): third}
    none = pack_of(packer, Asked("How many stars are there?", "0", "count"))
    assert looked_at(none, 0, 1) == {(-1, -1): 1}


def test_a_relation_gives_each_head_its_own_object(packer: Packer) -> None:
    asked = Asked("Is the red star above the red ring?", "yes", "relation", (BOX, FAR))
    pack = pack_of(packer, asked)
    assert (4, 3) in looked_at(pack, 0, 0)
    assert (4, 3) not in looked_at(pack, 0, 1)
    assert (21, 21) in looked_at(pack, 0, 1)


def test_reading_looks_at_one_character_after_the_other(packer: Packer) -> None:
    boxes = tuple((14.0 * k, 14.0, 14.0 * k + 14, 28.0) for k in range(5, 8))
    pack = pack_of(packer, Asked("What number is shown?", "407", "digits", boxes))
    columns = [{c for _, c in looked_at(pack, row, 0)} for row in range(len(pack.where))]
    # the blank before the number, its three digits, and the end
    assert columns == [{5}, {5}, {6}, {7}, {7}]
    assert {r for r, _ in looked_at(pack, 0, 0)} == {1}


def test_evidence_loss_is_least_where_attention_looks_right(packer: Packer) -> None:
    pack = pack_of(packer, Asked("What color is the star?", "red", "attribute", (BOX,)))
    right = pack.evidence.clamp(min=1e-9).log()
    assert float(evidence_loss(pack, [right])) == pytest.approx(0, abs=1e-4)
    even = torch.full_like(right, 1 / right.shape[-1]).log()
    assert float(evidence_loss(pack, [even])) > 1


def test_the_patches_kept_for_training_hold_every_centre() -> None:
    for seed in range(20):
        scene = generate(seed, "train")
        kept = set(keep_patches(scene.labels, 144, np.random.default_rng(0)).tolist())
        assert len(kept) == 144
        for item in scene.objects:
            assert int(item.y // PATCH_SIZE) * GRID + int(item.x // PATCH_SIZE) in kept


class Toy(nn.Module):
    """Two matrices, one of them in a layer, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.layers[0](x)))


def trained(steps: int, state: dict | None = None) -> tuple[Toy, MasterOptimizer, list[float]]:
    torch.manual_seed(0)
    model, x = Toy().to(torch.bfloat16), torch.randn(64, 8).to(torch.bfloat16)
    target = x[:, :3].argmax(-1)
    optimizer = MasterOptimizer(with_muon([model]), average=0.9)
    if state is not None:
        optimizer.load_state_dict(state)
    losses = []
    for _ in range(steps):
        loss = cross_entropy(model(x).float(), target)
        loss.backward()
        optimizer.step(1e-2)
        losses.append(float(loss.detach()))
    return model, optimizer, losses


def test_matrices_of_layers_go_to_muon_and_the_rest_to_adam() -> None:
    (matrices, _, muon), (others, _, adam) = with_muon([Toy()])
    assert (muon, adam) == (True, False)
    assert [tuple(p.shape) for p in matrices] == [(8, 8)]
    assert [tuple(p.shape) for p in others] == [(8,), (3, 8), (3,)]


def test_the_optimizer_learns_averages_and_goes_on_where_it_stopped() -> None:
    _, _, whole = trained(40)
    assert whole[-1] < 0.75 * whole[0]
    model, first, start = trained(20)
    _, _, rest = trained(20, first.state_dict())
    assert start + rest == pytest.approx(whole, abs=1e-3)
    current = model.out.weight.detach().clone()
    first.swap_average()
    assert not torch.equal(model.out.weight, current)
    first.restore()
    assert torch.equal(model.out.weight, current)
