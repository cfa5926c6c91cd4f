# SPDX-License-Identifier: Apache-2.0
"""What happens to vision tokens under a patch, for whoever listens: `Patch.listen`.

Events come from the thread that runs the model, in the order in which things happen: for each image
of each sample one `Shown`, then one `Selected` for every method of the sequence stage; then, before
each decoder layer at which a method acts, one `Selected` for every sample of which it chose; where
it returns `None`, and so keeps all, nothing is told. What acts on pixels or in the tower shows in
`Shown`. What `generate` repeats without a cache is told once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .method import Method
from .states import Selection, VisionTokens

__all__ = ["Event", "Listener", "Selected", "Shown"]


@dataclass(frozen=True)
class Shown:
    """An image as the tower and the projector left it, before any method of the sequence stage.

    Attributes:
        sample: row of the batch.
        tokens: features, places and patches; of the signals none.
    """

    sample: int
    tokens: VisionTokens


@dataclass(frozen=True)
class Selected:
    """What a method chose.

    Attributes:
        method: which of the composed methods.
        sample: row of the batch.
        image: ordinal of the image in the sequence stage; `None` between layers, where a method
            chooses among all vision tokens of the sample.
        layer: 0-based decoder layer before which it chose; `None` in the sequence stage.
        among: how many tokens there were.
        selection: which of them stay.
    """

    method: Method
    sample: int
    image: int | None
    layer: int | None
    among: int
    selection: Selection


Event = Shown | Selected
Listener = Callable[[Event], None]
