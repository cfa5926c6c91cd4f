# SPDX-License-Identifier: Apache-2.0
"""The contract of a compression method.

A method is one dataclass in one file. Its fields are its settings; it overrides the hooks of the
stages where it acts: `select` for the vision tokens before the language model, `prune` between
decoder layers, or both; `vtc.core.stages` has them all.
It sees tensors of one sample at a time, without padding, and never a model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from . import registry
from .errors import ArgumentError
from .settings import budget
from .signals import Signal, check_needs
from .stages import STAGES, refused
from .states import (
    EncoderState,
    LayerState,
    Merging,
    Positions,
    Record,
    Rows,
    Selection,
    VisionTokens,
)


class Method:
    """Base of all methods: a dataclass whose fields are its settings.

    Class attributes:
        name: what `vtc.patch(model, name)` finds it by.
        title, paper, year: for `vtc methods`.
        trained: whether it needs trained weights.
        needs: signals of `VisionTokens` that `select` reads, out of `SIGNALS`; checked when the
            class is made.
        vision_layer: 0-based layer of the vision tower these are read from, negative from the
            last; a fraction is a share of the tower's depth.
        low_layer: layer of the vision tower that `low_attention` is read from.
        listed: whether `methods()` has it; wrappers, which need another method, are found by `make`
            only.
        each: of a wrapper, the part of an image that it applies another method to; in text it
            follows "@".
        by_tile: whether each tile of an image has a budget of its own.
        weighs_sizes: whether, once tokens were merged in the tower, its attention counts a token
            as often as it stands for patches: the logarithm of its size is added to the logits.

    A subclass sets `positions`, its default position convention: "original" keeps the rotary
    position each surviving token had in the full sequence; "contiguous" closes the gaps.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    year: ClassVar[int | None] = None
    trained: ClassVar[bool] = False
    listed: ClassVar[bool] = True
    each: ClassVar[str] = ""
    needs: ClassVar[frozenset[Signal]] = frozenset()
    vision_layer: ClassVar[int | float] = -1
    low_layer: ClassVar[int | float] = 0.25
    by_tile: ClassVar[bool] = False
    weighs_sizes: ClassVar[bool] = False

    positions: Positions = "original"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in cls.__dict__:
            # In the class itself, where `dataclass` leaves it alone: its own lists every default.
            shown: Any = next(b.__repr__ for b in cls.__mro__[1:] if "__repr__" in b.__dict__)
            cls.__repr__ = shown  # type: ignore[method-assign]
        needs = cls.__dict__.get("needs", ())
        if not isinstance(needs, property):
            check_needs(cls.__name__, needs)
        name = cls.__dict__.get("name")
        if name is not None:
            registry.register(cls, name)

    # ---- what a method implements -------------------------------------------------------------
    @property
    def keeps_all(self) -> bool:
        """Whether no token of any image ever leaves: then the model may run as it is."""
        keep = getattr(self, "keep", None)
        shares = keep if isinstance(keep, tuple) and keep else (keep,)
        return all(isinstance(share, float) and share == 1.0 for share in shares)

    def target_grid(self, rows: int, cols: int) -> tuple[int, int]:
        """Pixels stage: rows and columns of tokens, none more than there are, that an image of
        `rows` x `cols` tokens is resized to before the tower."""
        raise refused(self, "target_grid")

    def merge(self, state: EncoderState) -> Merging | None:
        """Encoder stage: merge or drop patches in a tower layer, or `None` to leave them."""
        raise refused(self, "merge")

    def select(self, tokens: VisionTokens) -> Selection:
        """Sequence stage: choose among the vision tokens of one image."""
        raise refused(self, "select")

    def prune(self, state: LayerState) -> Selection | None:
        """Layers stage: choose among the vision tokens of one sample, or `None` to keep all."""
        raise refused(self, "prune")

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        """0-based decoder layers before which `prune` is called, ascending."""
        return ()

    @property
    def prune_positions(self) -> Positions:
        """Position convention of the layers stage, by default that of the sequence stage."""
        return self.positions

    def taps(self, num_layers: int) -> dict[int, Rows]:
        """0-based decoder layers whose attention `prune` reads, and which query rows of it."""
        return {}

    @property
    def by_head(self) -> bool:
        """Whether attention of `taps` and `peeks` is read head by head, not averaged."""
        return False

    def peeks(self, num_layers: int) -> dict[int, Rows]:
        """Layers out of `prune_layers` whose own attention `prune` reads ahead, and which rows."""
        return {}

    def records(self, num_layers: int) -> dict[int, frozenset[Record]]:
        """0-based decoder layers of which `prune` reads more than attention, and what."""
        return {}

    # ---- how many tokens it leaves -------------------------------------------------------------
    def entering(self, n: int, tiles: int = 1) -> int | None:
        """Vision tokens of an image of `n` that enter the language model.

        By default the budget `keep`, of each tile if `by_tile`; all of a method that acts between
        layers alone; `None` where there is no `keep` to tell.
        """
        if self.keeps_all or self.stages == ("layers",):
            return n
        keep = getattr(self, "keep", None)
        if not isinstance(keep, (int, float)):
            return None
        return tiles * budget(keep, n // tiles) if self.by_tile else budget(keep, n)

    def leaves(self, sizes: tuple[int, ...], held: int, cut: int, cuts: int) -> int | None:
        """Vision tokens of a sample that one call of `prune` leaves, by default `keep` of each
        image; `None` where the data decide.

        Args:
            sizes: tokens of each image before any compression.
            held: vision tokens that the cut finds.
            cut: its number out of `cuts`, from 0.
        """
        keep = getattr(self, "keep", None)
        if not isinstance(keep, (int, float)):
            return None
        return sum(budget(keep, n) for n in sizes)

    def token_schedule(self, n: int, num_layers: int, tiles: int = 1) -> tuple[int, ...] | None:
        """Vision tokens that each decoder layer processes of an image, alone in its sample.

        Args:
            n: tokens of the image before compression.
            num_layers: decoder layers.
            tiles: tiles of equal size that the image is divided into.

        Returns:
            A number for each layer, or the largest it can come to (see `is_bound`); `None` where
            the settings promise none, as the data decide.
        """
        held = self.entering(n, tiles)
        cuts = self.prune_layers(num_layers)
        seen: list[int] = []
        for layer in range(num_layers):
            if held is not None and layer in cuts and not self.keeps_all:
                left = self.leaves((n,), held, cuts.index(layer), len(cuts))
                held = None if left is None else min(left, held)
            if held is None:
                return None
            seen.append(held)
        return tuple(seen)

    def is_bound(self, n: int, tiles: int = 1) -> bool:
        """Whether `token_schedule` is an upper bound for such an image, and the data decide."""
        return False

    @property
    def counts_found(self) -> bool:
        """Whether what it leaves follows what it finds, and not only the image as it was at first:
        then the schedule of a composition with it cannot be told from its parts'."""
        return self.by_tile

    # ---- what every method has ----------------------------------------------------------------
    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages where this method acts: those of `STAGES` whose hook it overrides."""
        return tuple(stage.name for stage in STAGES if self.implements(stage.hook))

    @classmethod
    def implements(cls, hook: str) -> bool:
        """Whether the class overrides the hook of a stage."""
        return getattr(cls, hook, None) is not getattr(Method, hook, None)

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods that this one is composed of, itself if it is simple."""
        return (self,)

    def __or__(self, other: Method) -> Compose:
        if not isinstance(other, Method):
            return NotImplemented
        return Compose(self.parts + other.parts)

    def to_dict(self) -> dict[str, Any]:
        """Name and settings, ready for JSON; `from_dict` is the inverse."""
        return {"method": self.name, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @property
    def closes_gaps_by_choice(self) -> bool:
        """Whether `positions` is "contiguous" because it was asked for, and not by default."""
        fields = {f.name: f for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        if self.positions != "contiguous" or "positions" not in fields:
            return False
        plain: Any = dataclasses.replace(self, positions=fields["positions"].default)  # type: ignore[type-var]
        return bool(plain.positions != "contiguous")

    def _own_settings(self) -> str:
        """`keep` and what differs from the defaults, as they are written in a call."""
        fields: tuple[Any, ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        shown = {f.name: getattr(self, f.name) for f in fields if f.init}
        for field in fields:
            value = shown.get(field.name)
            budget = field.name == "keep" and isinstance(value, (int, float))
            if field.init and not budget and self._is_default(field, value):
                del shown[field.name]
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def _is_default(self, field: dataclasses.Field[Any], value: Any) -> bool:
        if value == field.default:
            return True
        # Some defaults follow other settings, as SparseVLM's do its version.
        if field.default is not None:
            return False
        try:
            return bool(dataclasses.replace(self, **{field.name: None}) == self)  # type: ignore[type-var]
        except (TypeError, ValueError):  # not to be left open in the company of the others
            return False

    def __str__(self) -> str:
        return f"{self.name}({self._own_settings()})"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._own_settings()})"


@dataclass(frozen=True)
class Compose(Method):
    """Methods applied one after the other: each acts on what the one before it left.

    What `keep` says does not depend on the company: a fraction is a share of the tokens that the
    image (or tile, or frame) had at first, and a whole number is a number, in every stage. So
    `Random(0.5) | DivPrune(0.25)` leaves a quarter, as does `DivPrune(0.5) | FastV(0.25)`. A part
    whose budget the parts before it have met already has nothing left to do; the first time that
    happens a warning names it.

    What a method's settings say of its own stages stays as published: `then` of VScan is a share of
    its own first budget, later cuts of V2Drop and the schedule "after_selection" of TransPrune are
    shares of what they find.
    """

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        if not self.methods:
            raise ArgumentError("methods", "at least one method is needed, got none")

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(stage for m in self.methods for stage in m.stages))

    @property
    def parts(self) -> tuple[Method, ...]:
        return self.methods

    def to_dict(self) -> dict[str, Any]:
        return {"method": "compose", "methods": [m.to_dict() for m in self.methods]}

    @property
    def by_tile(self) -> bool:  # type: ignore[override]
        """Never: parts whose tiles have budgets of their own have no schedule together."""
        return False

    def token_schedule(self, n: int, num_layers: int, tiles: int = 1) -> tuple[int, ...] | None:
        """The smallest of the parts' in every layer, as their budgets count the image as it was;
        `None` where one is not known or `counts_found`."""
        rows = [part.token_schedule(n, num_layers, tiles) for part in self.methods]
        if any(part.counts_found for part in self.methods):
            return None
        known = [row for row in rows if row is not None]
        if len(known) < len(rows):
            return None
        return tuple(min(seen) for seen in zip(*known, strict=True))

    def is_bound(self, n: int, tiles: int = 1) -> bool:
        """Whether that of one of the parts is."""
        return any(part.is_bound(n, tiles) for part in self.methods)

    @property
    def counts_found(self) -> bool:
        """Whether one of the parts does."""
        return any(part.counts_found for part in self.methods)

    @property
    def closes_gaps_by_choice(self) -> bool:
        """Whether one of them does."""
        return any(m.closes_gaps_by_choice for m in self.methods)

    def __str__(self) -> str:
        return " | ".join(filter(None, map(str, self.methods)))

    def __repr__(self) -> str:
        return " | ".join(filter(None, map(repr, self.methods)))
