# SPDX-License-Identifier: Apache-2.0
"""Events that a patch reports to listeners (`Patch.listen`).

Events come in order, from the thread that runs the model: for each image of each sample one
`Shown`, then one `Selected` for every method of the sequence stage; then, before each decoder layer
at which a method acts, one `Selected` for every sample in which it chose. If it returns `None`, and
so keeps all, there is no event. Methods on pixels or in the tower show in `Shown`. Steps that
`generate` repeats without a cache are reported once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .method import Method
from .states import Selection, VisionTokens

__all__ = ["Event", "Listener", "Selected", "Shown"]


@dataclass(frozen=True)
class Shown:
    """An image after the tower and the projector, before any method of the sequence stage.

    Attributes:
        sample: row of the batch.
        tokens: features, places and patches, without signals.
    """

    sample: int
    tokens: VisionTokens


@dataclass(frozen=True)
class Selected:
    """The selection of a method.

    Attributes:
        method: the one of the composed methods that chose.
        sample: row of the batch.
        image: ordinal of the image in the sequence stage; `None` between layers, where a method
            chooses among all vision tokens of the sample.
        layer: 0-based decoder layer before which it chose; `None` in the sequence stage.
        among: number of tokens it chose from.
        selection: the tokens that stay.
    """

    method: Method
    sample: int
    image: int | None
    layer: int | None
    among: int
    selection: Selection


Event = Shown | Selected
Listener = Callable[[Event], None]
