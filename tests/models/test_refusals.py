# SPDX-License-Identifier: Apache-2.0
"""What a family cannot do is refused by `patch`, and not by the first forward."""

from __future__ import annotations

import re

import pytest
import torch

import vtc
from tests.reference.families import FAMILIES
from tests.reference.masked import NO_PLACES
from tests.runtime.test_families import here, rows_of, shared, skip_reason
from vtc.models import UnsupportedModelError

OFTEN = ("mmtok", "visionzip", "tome:keep=0.6", "fastv")
"""Methods that read states, attention, the tower itself, and the decoder. Towers of two layers can
at best quarter their patches."""
INTERPOLATES = {
    ("llava_onevision", "video"),
    ("llava_onevision_shrunk", "one"),
    ("llava_onevision_shrunk", "video"),
}
"""Inputs that only the call shows, of which patches cannot be merged."""


def runs(name: str, methods: list[str]) -> list[str]:
    """Those of `methods` that the family takes; each is run on an image and on a clip."""
    family, taken = FAMILIES[name], []
    attention = family.attentions[-1]
    kinds = [k for k in ("one", "video") if skip_reason(name, k, attention, "forward") is None]
    for method in methods:
        try:
            patch = vtc.patch(shared(name, attention), method)
        except (UnsupportedModelError, ValueError):
            continue
        with patch, torch.no_grad():
            for kind in kinds:
                if "encoder" in patch.method.stages and (name, kind) in INTERPOLATES:
                    with pytest.raises(UnsupportedModelError, match="interpolat"):
                        patch.model(**family.collate(rows_of(name, kind)))
                    continue
                patch.model(**family.collate(rows_of(name, kind)))
        taken.append(method)
    return taken


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", here())
def test_what_is_not_refused_runs(name: str) -> None:
    assert runs(name, ["divprune", *OFTEN])[0] == "divprune"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", here())
def test_of_all_methods_what_is_not_refused_runs(name: str) -> None:
    often = {"atp", "divprune", *(method.split(":")[0] for method in OFTEN)}
    rest = [method for method in vtc.methods() if method not in often]
    taken = runs(name, rest)
    assert {"cdpruner", "random"} <= {*taken}
    assert ("pool" in taken) == (FAMILIES[name].model_type not in NO_PLACES)


@pytest.mark.parametrize("name", [n for n in here() if FAMILIES[n].model_type in NO_PLACES])
@pytest.mark.parametrize("method", ["pool", "divprune@frame", "downsample:how=grid"])
def test_places_of_tokens_that_have_none_are_refused(name: str, method: str) -> None:
    with pytest.raises(UnsupportedModelError, match="reads the places of vision tokens"):
        vtc.patch(FAMILIES[name].build("eager"), method)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gemma3n", "convolutions mix its places and fuse several resolutions"),
        ("aria", "each token mixes all patches of its image .* do not attend to one another"),
        ("mllama", "join several layers of two encoders over all tiles"),
    ],
)
def test_towers_that_are_not_read_are_refused_with_the_reason(name: str, why: str) -> None:
    model = FAMILIES[name].build("eager")
    # Others have states, or none that `mmtok` reads.
    for method in ("mmtok", "visionzip") if name == "idefics2" else ("visionzip",):
        with pytest.raises(UnsupportedModelError, match=why):
            vtc.patch(model, method)
    row = next(family for family in vtc.models() if name in family.model_types)
    read = "the projector's input" if name == "gemma3n" else "nothing"
    assert re.search(f"{read}: .*{why}", row.tower)
