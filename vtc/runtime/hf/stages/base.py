# SPDX-License-Identifier: Apache-2.0
"""The contract of a stage runner."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from vtc.core import Method
from vtc.models import Adapter
from vtc.runtime.choices import Part
from vtc.runtime.forward import Forward

if TYPE_CHECKING:
    from vtc.runtime.hf.vision import Encoding, Vision


@dataclass(frozen=True)
class Shortened:
    """An image of which the tower made fewer tokens than it has placeholders.

    Attributes:
        total: number of its placeholders.
        kept: (k,) the places, ascending, that its tokens fill; `None` for all.
    """

    total: int
    kept: Tensor | None = None


@dataclass(frozen=True)
class Merged:
    """A call in which the tower merged or dropped patches. Its features stand at their places in
    the full grid of each image.

    Attributes:
        alive: (patches,) bool, the patches that hold a token in the end, numbered through all tiles
            as in `ImageMap.patches`.
        tile: (patches,) the number of each patch's tile.
        passed: by tile, patches that entered each tower layer and left the last.
    """

    alive: Tensor
    tile: Tensor
    passed: tuple[tuple[int, ...], ...]


class Runner:
    """Carries out one stage on a model whose decoder sequence holds the vision tokens.

    There is one runner per stage in which a method acts. The engine calls it at the points below; a
    runner overrides those of its stage. It holds what is fixed for a patch; what belongs to a call
    is in `Forward` and `Encoding`.

    Args:
        adapter: bound to the model.
        method: the method, or a composition.
        current: returns the forward in progress in this thread, or `None`.

    Attributes:
        parts: the methods that act in this stage, with their numbers in the composition.
        starts: 0-based decoder layers from which on other tokens are held than before.

    Raises:
        ValueError: the method cannot act in this model; the message says why.
        UnsupportedModelError: the model lacks what the method or the stage needs.
    """

    stage: ClassVar[str]
    """Name of the stage in `vtc.core.STAGES`."""

    shortens: ClassVar[bool] = False
    """Whether it implements `encode`. There can be one such part, which is the first."""

    changes_tower: ClassVar[bool] = False
    """Whether the tower's own tokens change, so that other parts cannot read it."""

    def __init__(
        self, adapter: Adapter, method: Method, current: Callable[[], Forward | None]
    ) -> None:
        self.adapter, self.method, self.current = adapter, method, current
        self.parts: tuple[Part, ...] = tuple(
            (number, part) for number, part in enumerate(method.parts) if self.stage in part.stages
        )
        self.starts: tuple[int, ...] = ()

    # ---- on and off ---------------------------------------------------------------------------
    def install(self) -> None:
        """Hook what the stage needs for as long as the patch is on the model."""

    def uninstall(self) -> None:
        """Remove all hooks."""

    def check_in_place(self) -> None:
        """Refuse a model whose hooked modules were replaced.

        Raises:
            RuntimeError: a module was replaced.
        """

    def suspended(self) -> AbstractContextManager[None]:
        """Context of a nested call of the model, in which the outer call captures nothing."""
        return nullcontext()

    # ---- points of a forward ------------------------------------------------------------------
    def encode(
        self, encoding: Encoding, original: Callable[..., Any], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Shortened] | Merged]:
        """Run the tower and the projector, if `shortens`.

        Args:
            encoding: the call in progress.
            original: the model's own function.
            kwargs: its arguments.

        Returns:
            The model's output, whose features hold only the tokens that were made, and for each
            image where they stand; or features at their places, and what was merged. An empty list
            if nothing was changed.

        Raises:
            NotImplementedError: its stage does not act there.
        """
        raise NotImplementedError

    def enter(
        self, forward: Forward, embeds: Tensor, keep: Tensor, vision: Vision
    ) -> tuple[Tensor, Tensor]:
        """Choose among the tokens that enter the decoder.

        Args:
            forward: the forward in progress; its layout is still the whole sequence.
            embeds: (b, s, d) what enters.
            keep: (b, s) bool, the tokens left by the stages before.
            vision: what was read of the tower.

        Returns:
            `embeds`, changed or not, and (b, s) bool of the tokens that stay.
        """
        return embeds, keep

    def before_layer(self, forward: Forward, layer: int, hidden: Tensor, cache: Any) -> Tensor:
        """Drop tokens before a layer of `starts`, at prefill, with `forward.drop`.

        Args:
            forward: the forward in progress.
            layer: 0-based decoder layer.
            hidden: (b, k, d) its input in the current layout.
            cache: the cache, or `None`.

        Returns:
            (b, k', d) its input in the layout after.
        """
        return hidden

    def watches(self, layer: int) -> bool:
        """Whether `watch` is called for this decoder layer."""
        return False

    def watch(self, forward: Forward, layer: int, hidden: Tensor) -> None:
        """See the input of a decoder layer right before it runs, at prefill.

        Args:
            forward: the forward in progress.
            layer: 0-based decoder layer.
            hidden: (b, k, d) its input.
        """

    def leave(self, forward: Forward, cache: Any) -> None:
        """The decoder has run, and `forward.ledger` tells what its cache holds. To take tokens off
        the cache, change its layers and the groups of the ledger alike, and mark these as diverged:
        further steps come here only if a group is.

        Args:
            forward: the forward in progress; its `phase` is "prefill", or "decode" for further
                tokens on such a cache, which have no `prompt`.
            cache: the cache, or `None`.
        """
