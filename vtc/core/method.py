# SPDX-License-Identifier: Apache-2.0
"""The contract of a compression method.

A method is one dataclass in one file. Its fields are its settings. It overrides the hooks of the
stages where it acts: `select` for the vision tokens before the language model, `prune` between
decoder layers, or both; `vtc.core.stages` lists all hooks.
It sees tensors of one sample at a time, without padding, and never a model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from . import registry
from .errors import ArgumentError, ArgumentTypeError
from .settings import budget
from .signals import Signal, check_needs
from .stages import STAGES, refused, stage_of
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
        name: its name for `vtc.patch(model, name)`.
        title, paper, year: shown by `vtc methods`.
        trained: whether it needs trained weights.
        needs: signals of `VisionTokens` that `select` reads, out of `SIGNALS`; checked when the
            class is defined.
        vision_layer: 0-based vision tower layer from which these are read; negative counts from
            the last; a fraction is a fraction of the tower's depth.
        low_layer: vision tower layer from which `low_attention` is read.
        listed: whether `methods()` lists it; wrappers around another method are found only by
            `make`.
        each: for a wrapper, the part of an image to which it applies another method; in text it
            follows "@".
        by_tile: whether each tile of an image has its own budget.
        reads_places: whether it reads the places of tokens, which those of a resampler lack.
        weighs_sizes: whether, after merging in the tower, attention weighs a token by the number of
            patches it stands for: the logarithm of its size is added to the logits.

    A subclass sets `positions`, its default position convention: "original" keeps each surviving
    token's rotary position in the full sequence; "contiguous" closes the gaps.
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
    reads_places: ClassVar[bool] = False
    weighs_sizes: ClassVar[bool] = False

    positions: Positions = "original"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in cls.__dict__:
            # Set on the class itself, so that `dataclass` does not add one that lists all defaults.
            shown: Any = next(b.__repr__ for b in cls.__mro__[1:] if "__repr__" in b.__dict__)
            cls.__repr__ = shown  # type: ignore[method-assign]
        needs = cls.__dict__.get("needs", ())
        if not isinstance(needs, property):
            check_needs(cls.__name__, needs)
        name = cls.__dict__.get("name")
        if name is not None:
            registry.register(cls, name)

    @classmethod
    def example(cls) -> Method:
        """An instance for tables of what models take: with default settings, unless some are
        required."""
        return cls()

    # ---- what a method implements -------------------------------------------------------------
    @property
    def keeps_all(self) -> bool:
        """Whether it never drops a token of any image, so that the plain model may run."""
        keep = getattr(self, "keep", None)
        shares = keep if isinstance(keep, tuple) and keep else (keep,)
        return all(isinstance(share, float) and share == 1.0 for share in shares)

    def target_grid(self, rows: int, cols: int) -> tuple[int, int]:
        """Pixels stage: the (rows, columns) of tokens, at most `rows` and `cols`, to which an image
        of `rows` x `cols` tokens is resized before the tower.

        Raises:
            TypeError: the method does not implement this stage.
        """
        raise refused(self, "target_grid")

    def merge(self, state: EncoderState) -> Merging | None:
        """Encoder stage: merge or drop patches in a tower layer; `None` leaves them.

        Raises:
            TypeError: the method does not implement this stage.
        """
        raise refused(self, "merge")

    def select(self, tokens: VisionTokens) -> Selection:
        """Sequence stage: choose among the vision tokens of one image.

        Raises:
            TypeError: the method does not implement this stage.
        """
        raise refused(self, "select")

    def prune(self, state: LayerState) -> Selection | None:
        """Layers stage: choose among the vision tokens of one sample; `None` keeps all.

        Raises:
            TypeError: the method does not implement this stage.
        """
        raise refused(self, "prune")

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        """Ascending 0-based decoder layers before which `prune` is called."""
        return ()

    @property
    def prune_positions(self) -> Positions:
        """Position convention of the layers stage; by default that of the sequence stage."""
        return self.positions

    def taps(self, num_layers: int) -> dict[int, Rows]:
        """0-based decoder layers whose attention `prune` captures, and which query rows of it."""
        return {}

    @property
    def by_head(self) -> bool:
        """Whether attention of `taps` and `peeks` comes per head instead of averaged."""
        return False

    def peeks(self, num_layers: int) -> dict[int, Rows]:
        """Layers of `prune_layers` whose look-ahead attention `prune` reads, and which rows."""
        return {}

    def records(self, num_layers: int) -> dict[int, frozenset[Record]]:
        """0-based decoder layers of which `prune` captures states, and which."""
        return {}

    # ---- how many tokens it leaves -------------------------------------------------------------
    def entering(self, n: int, tiles: int = 1) -> int | None:
        """Vision tokens that enter the language model, of an image of `n`.

        By default the budget `keep`, per tile if `by_tile`; all tokens for a method that acts only
        later; `None` without a numeric `keep`.

        Args:
            n: tokens of the image before compression.
            tiles: tiles of equal size that the image is divided into.
        """
        before = [s.name for s in STAGES[: stage_of("sequence").order + 1]]
        if self.keeps_all or not {*before} & {*self.stages}:
            return n
        keep = getattr(self, "keep", None)
        if not isinstance(keep, (int, float)):
            return None
        return tiles * budget(keep, n // tiles) if self.by_tile else budget(keep, n)

    def leaves(self, sizes: tuple[int, ...], held: int, cut: int, cuts: int) -> int | None:
        """Vision tokens of a sample that one call of `prune` leaves; by default `keep` of each
        image; `None` if it depends on the data.

        Args:
            sizes: tokens of each image before any compression.
            held: vision tokens left before the cut.
            cut: 0-based number of the cut, out of `cuts`.
        """
        keep = getattr(self, "keep", None)
        if not isinstance(keep, (int, float)):
            return None
        return sum(budget(keep, n) for n in sizes)

    def token_schedule(self, n: int, num_layers: int, tiles: int = 1) -> tuple[int, ...] | None:
        """Vision tokens that each decoder layer processes, for a single image in its sample.

        Args:
            n: tokens of the image before compression.
            num_layers: decoder layers.
            tiles: tiles of equal size that the image is divided into.

        Returns:
            The number for each layer, or an upper bound (see `is_bound`); `None` if it depends on
            the data.
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
        """Whether `token_schedule` is an upper bound for such an image, as the data decide."""
        return False

    @property
    def counts_found(self) -> bool:
        """Whether its number of tokens depends on what earlier methods left, not only on the
        original image: then its composition's schedule does not follow from the parts' schedules.
        """
        return self.by_tile

    # ---- what every method has ----------------------------------------------------------------
    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages it implements: those of `STAGES` whose hook it overrides."""
        return tuple(stage.name for stage in STAGES if self.implements(stage.hook))

    @classmethod
    def implements(cls, hook: str) -> bool:
        """Whether the class overrides the hook of a stage."""
        return getattr(cls, hook, None) is not getattr(Method, hook, None)

    @property
    def parts(self) -> tuple[Method, ...]:
        """The composed methods, or the method itself if it is not a composition."""
        return (self,)

    def __or__(self, other: Method) -> Compose:
        """This method, then `other`.

        Raises:
            ArgumentTypeError: `other` is no method.
        """
        if not isinstance(other, Method):
            raise ArgumentTypeError("|", f"expected a method on both sides, got {other!r}")
        return Compose(self.parts + other.parts)

    def to_dict(self) -> dict[str, Any]:
        """Name and settings, ready for JSON; `make` is the inverse."""
        return {"method": self.name, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @property
    def closes_gaps_by_choice(self) -> bool:
        """Whether `positions` is "contiguous" because the user set it, not by default."""
        fields = {f.name: f for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        if self.positions != "contiguous" or "positions" not in fields:
            return False
        plain: Any = dataclasses.replace(self, positions=fields["positions"].default)  # type: ignore[type-var]
        return bool(plain.positions != "contiguous")

    def _own_settings(self) -> str:
        """`keep` and the settings that differ from the defaults, as written in a call."""
        fields: tuple[Any, ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        shown = {f.name: getattr(self, f.name) for f in fields if f.init}
        for field in fields:
            value = shown.get(field.name)
            budget = field.name == "keep" and isinstance(value, (int, float))
            if field.init and not budget and self.is_default(field, value):
                del shown[field.name]
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def is_default(self, field: dataclasses.Field[Any], value: Any) -> bool:
        """Whether `value` is what the field of the method would have if it were not set."""
        if value == field.default:
            return True
        # Some defaults depend on other settings, as SparseVLM's on its version.
        if field.default is not None:
            return False
        try:
            return bool(dataclasses.replace(self, **{field.name: None}) == self)  # type: ignore[type-var]
        except (TypeError, ValueError):  # required together with the other settings
            return False

    def __str__(self) -> str:
        return f"{self.name}({self._own_settings()})"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._own_settings()})"


@dataclass(frozen=True)
class Compose(Method):
    """Methods applied in turn: each acts on what the one before it left.

    `keep` means the same as in a single method, at every stage: a fraction refers to the original
    tokens of the image (or tile, or frame), and a whole number is a number of tokens. So
    `Random(0.5) | DivPrune(0.25)` leaves a quarter, as does `DivPrune(0.5) | FastV(0.25)`. A part
    whose budget the parts before it have already met drops nothing; the first time this happens, a
    warning names it.

    Other settings keep their published meaning: `then` of VScan is a fraction of its own first
    budget; the later cuts of V2Drop and the schedule "after_selection" of TransPrune are fractions
    of what they find.

    Args:
        methods: the methods in the order in which they act, at least one.

    Raises:
        ArgumentError: no methods.
    """

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        if not self.methods:
            raise ArgumentError("methods", "at least one method is needed, got none")

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of all parts."""
        return tuple(dict.fromkeys(stage for m in self.methods for stage in m.stages))

    @property
    def parts(self) -> tuple[Method, ...]:
        """The composed methods."""
        return self.methods

    def to_dict(self) -> dict[str, Any]:
        """All parts, ready for JSON; `make` is the inverse."""
        return {"method": "compose", "methods": [m.to_dict() for m in self.methods]}

    @property
    def by_tile(self) -> bool:  # type: ignore[override]
        """Always `False`: parts with budgets per tile have no joint schedule."""
        return False

    def token_schedule(self, n: int, num_layers: int, tiles: int = 1) -> tuple[int, ...] | None:
        """The minimum of the parts' schedules in every layer, as budgets refer to the original
        image; `None` if one is unknown or `counts_found`."""
        rows = [part.token_schedule(n, num_layers, tiles) for part in self.methods]
        if any(part.counts_found for part in self.methods):
            return None
        known = [row for row in rows if row is not None]
        if len(known) < len(rows):
            return None
        return tuple(min(seen) for seen in zip(*known, strict=True))

    def is_bound(self, n: int, tiles: int = 1) -> bool:
        """Whether a part's schedule is an upper bound."""
        return any(part.is_bound(n, tiles) for part in self.methods)

    @property
    def counts_found(self) -> bool:
        """Whether a part counts what it finds."""
        return any(part.counts_found for part in self.methods)

    @property
    def closes_gaps_by_choice(self) -> bool:
        """Whether a part closes gaps because the user asked for it."""
        return any(m.closes_gaps_by_choice for m in self.methods)

    def __str__(self) -> str:
        return " | ".join(filter(None, map(str, self.methods)))

    def __repr__(self) -> str:
        return " | ".join(filter(None, map(repr, self.methods)))
