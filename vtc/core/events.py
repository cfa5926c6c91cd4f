# SPDX-License-Identifier: Apache-2.0
"""Events that a patch reports to listeners (`Patch.listen`).

Events come in order, from the thread that runs the model: `Encoded` when the tower has run on some
images; for each image of each sample one `Shown`, then one `Selected` for every method of the
sequence stage; then, before each decoder layer at which a method acts, one `Selected` for every
sample in which it chose. If it returns `None`, and so keeps all, there is no event. Methods on
pixels or in the tower show in `Shown`. `Prefilled` ends the forward; a stage that acts in
decoding may select afterwards. Steps that `generate` repeats without a cache are reported once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .method import Method
from .prefill import Prefill, Stopwatch
from .states import Selection, VisionTokens

__all__ = ["Encoded", "Event", "Listener", "Prefilled", "Selected", "Shown"]


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
        stage: name of the stage in which it acts.
        method: the one of the composed methods that chose.
        sample: row of the batch.
        image: ordinal of the image in the sequence stage; `None` between layers, where a method
            chooses among all vision tokens of the sample.
        layer: 0-based decoder layer before which it chose; `None` in the sequence stage.
        among: number of tokens it chose from.
        selection: the tokens that stay.
    """

    stage: str
    method: Method
    sample: int
    image: int | None
    layer: int | None
    among: int
    selection: Selection


@dataclass(frozen=True)
class Encoded:
    """The vision tower has run on the images of a call, perhaps before the model's forward.

    Attributes:
        vision: time of the tower and the projector so far, with `heard`.
        heard: time of the captures in them so far; the clocks go on.
    """

    vision: Stopwatch
    heard: Stopwatch


@dataclass(frozen=True)
class Prefilled:
    """A forward with images has ended. `Patch.report` listens to it.

    Attributes:
        prefill: what was measured.
    """

    prefill: Prefill


Event = Encoded | Shown | Selected | Prefilled
Listener = Callable[[Event], None]
