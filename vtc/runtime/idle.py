# SPDX-License-Identifier: Apache-2.0
"""Parts of a composition that have nothing to do, as those before them met their budget."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

from vtc.core import Method, stage_of


def dropped_in_sequence(chains: Sequence[tuple[int, Sequence[int]]], parts: list[int]) -> set[int]:
    """Which parts dropped tokens before the language model.

    Args:
        chains: for each image its tokens at first, and how many each of the methods left.
        parts: the numbers of these methods in their composition.
    """
    found = set()
    for before, counts in chains:
        for number, left in zip(parts, counts, strict=True):
            if left < before:
                found.add(number)
            before = left
    return found


def warn_of_idle(
    method: Method, dropped: Collection[int], told: set[int], num_layers: int, stacklevel: int
) -> None:
    """Name each part that dropped nothing in a forward in which a part that acts before it did.

    A part is held to its budget, so one that has none, or whose second stage looked and found no
    reason to drop, is not named.

    Args:
        dropped: numbers of the parts that dropped tokens somewhere.
        told: of those that were named before; added to.
    """
    parts = method.parts
    for number, part in enumerate(parts):
        keep = getattr(part, "keep", getattr(getattr(part, "inner", None), "keep", None))
        if number in dropped or number in told or keep is None or part.keeps_all:
            continue
        last = _acts(part, num_layers)[1], number
        if all((_acts(parts[other], num_layers)[0], other) >= last for other in dropped):
            continue
        told.add(number)
        warnings.warn(
            f"{part.name} dropped nothing: its budget counts the tokens that an image had at "
            f"first, and in {method} the parts that act before it left no more",
            stacklevel=stacklevel + 1,
        )


def _acts(part: Method, num_layers: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The first and the last (stage, layer) at which `part` acts."""
    places = [(stage_of(stage).order, 0) for stage in part.stages if stage != "layers"]
    places += [(stage_of("layers").order, layer) for layer in part.prune_layers(num_layers)]
    return min(places), max(places)
