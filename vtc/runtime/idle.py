# SPDX-License-Identifier: Apache-2.0
"""Parts of a composition that drop nothing because earlier parts already meet their budget."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from vtc.core import Method, stage_of


def warn_of_idle(
    method: Method, dropped: Collection[int], told: set[int], num_layers: int, stacklevel: int
) -> None:
    """Warn of each part that drops nothing in a forward where a part that acts before it does.

    The warning is about budgets: it skips parts without one, and parts that keep all tokens.

    Args:
        method: the composition.
        dropped: numbers of the parts that dropped a token.
        told: numbers of the parts already named; updated in place.
        num_layers: number of decoder layers.
        stacklevel: as in `warnings.warn`, from the caller.
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
            f"{part.name} dropped nothing: budgets refer to an image's original tokens, and in "
            f"{method} the parts that act before it left no more",
            stacklevel=stacklevel + 1,
        )


def _acts(part: Method, num_layers: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The first and the last (stage, layer) at which `part` acts."""
    places = [(stage_of(stage).order, 0) for stage in part.stages if stage != "layers"]
    places += [(stage_of("layers").order, layer) for layer in part.prune_layers(num_layers)]
    return min(places), max(places)
