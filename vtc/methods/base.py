# SPDX-License-Identifier: Apache-2.0
"""The contract of a compression method, and the registry that finds methods by name.

A method is one dataclass in one file. Its fields are its settings; it overrides `select` to act
on the vision tokens before the language model, `prune` to act between decoder layers, or both.
It sees tensors of one sample at a time, without padding, and never a model.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

from torch import Tensor

from vtc.names import unknown

Positions = Literal["original", "contiguous"]
Rows = Literal["last", "text", "vision", "vision_text"]
"""Query rows whose attention a method may ask for: the prompt's last token, all of its text after
the first vision token, all vision tokens held now, or both of these in sequence order."""

Record = Literal[
    "input",
    "output",
    "normed",
    "attention_in",
    "attention_out",
    "mlp_in",
    "mlp_out",
    "keys",
    "rotary",
]
"""What a method may have recorded of a decoder layer: the hidden states that enter and leave it,
the latter also through the decoder's final norm; what enters and leaves its attention and its MLP,
without the residual; its attention's keys, heads concatenated; and "rotary", a vector of ones as
wide as a head. The last two are rotated to each token's position, as if the sample began at 0."""

Signal = Literal[
    "cls_attention", "low_attention", "cls_query", "keys", "encoder", "text", "segment", "patches"
]
"""What a method may ask for in `needs`; see `VisionTokens`."""


@dataclass(frozen=True)
class VisionTokens:
    """The vision tokens of one image (or clip), as the language model would receive them.

    Attributes:
        features: (n, d) embeddings after the projector, in sequence order.
        grid: (n, 3) whole numbers, the (frame, row, column) of each token.
        image: ordinal of this image within its sample, from 0.
        text: (m, d) embeddings of the prompt's text after the first image. Only if asked for.
        cls_attention: (n,) attention of [CLS] to each token in the vision tower, averaged over
            heads; for towers without [CLS], the attention each token receives, averaged over
            heads and queries. Only if asked for.
        keys: (n, d_k) keys of the vision tower's attention, heads concatenated. Only if asked for.
        heads: attention heads that `keys` and `cls_query` hold.
        low_attention: like `cls_attention`, of the method's `low_layer`. Only if asked for.
        cls_query: (d_k,) query of [CLS], heads concatenated, or `None` in towers without [CLS].
            Only if asked for.
        cls_key: (d_k,) its key. Comes with `cls_query`.
        encoder: (n, d_v) patch states that the projector receives. Only if asked for.
        encoder_cls: (d_v,) state of [CLS] in the same layer, or `None` in towers without. Comes
            with `encoder`.
        project: the projector, (k, d_v) to (k, d), to turn merged patch states into embeddings.
            Comes with `encoder`.
        segment: (m, d) embeddings of the text between this image and the next, or the prompt's
            end. Only if asked for.
        patches: (n, m) the tower's patches that each token is made of, numbered through all tiles
            that it encoded in one call, or `None` where they are not known. Only if asked for.
        crop: (n,) whole numbers, the tile each token belongs to (0 is the thumbnail), or `None`
            where an image is not tiled.
        every_grid, every_crop: (N, 3) and (N,), `grid` and `crop` of all tokens that the image had
            at first, before any method acted; `None` if these are all.
        crop_cls, crop_query, crop_key: (c, ...) what `encoder_cls`, `cls_query` and `cls_key` are,
            of each of the tiles 0 to c - 1 (these are the thumbnail's), or `None` where an image is
            not tiled or the tower has no [CLS]. Come with them.
    """

    features: Tensor
    grid: Tensor
    image: int = 0
    text: Tensor | None = None
    cls_attention: Tensor | None = None
    keys: Tensor | None = None
    crop: Tensor | None = None
    heads: int = 1
    low_attention: Tensor | None = None
    cls_query: Tensor | None = None
    cls_key: Tensor | None = None
    encoder: Tensor | None = None
    encoder_cls: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    segment: Tensor | None = None
    crop_cls: Tensor | None = None
    crop_query: Tensor | None = None
    crop_key: Tensor | None = None
    patches: Tensor | None = None
    every_grid: Tensor | None = None
    every_crop: Tensor | None = None

    def __len__(self) -> int:
        return self.features.shape[0]

    @property
    def original(self) -> int:
        """Tokens that the image had at first, before any method."""
        return len(self) if self.every_grid is None else self.every_grid.shape[0]

    def budget(self, keep: float | int) -> int:
        """Tokens that a method with this `keep` leaves: a fraction is one of `original`, a whole
        number is a number, and neither is more than there are."""
        return min(budget(keep, self.original), len(self))


@dataclass(frozen=True)
class LayerState:
    """One sample on its way between two decoder layers, without padding.

    Tensors may be the model's own: they are read, never written to.

    Attributes:
        layer: 0-based index of the decoder layer about to run.
        num_layers: decoder layers in all.
        hidden: (s, d) hidden states entering the layer.
        image: (s,) ordinal of the image each token belongs to, -1 for text.
        text: (s,) bool, the prompt's text after the first vision token.
        grid: (s, 3) whole numbers, the (frame, row, column) of each vision token, -1 for text.
        prompt_length: tokens of the prompt; any after them are an answer being scored.
        original: vision tokens of each image before any compression.
        attention: for each layer asked for by `taps` that has run, (r, s) attention probabilities
            of the rows asked for, softmax over all keys in fp32, averaged over heads, or (h, r, s)
            if the method reads them `by_head`. Columns are the tokens held now; what layers before
            dropped is left out.
        ahead: (r, s) the same of the layer about to run, as it would be if nothing were dropped
            now. Only if asked for by `peeks`.
        recorded: (s, d) what was asked for by `records`, by layer and name, for the tokens held
            now.
        memory: what the method handed on when it last chose in this sample, or `None`.
    """

    layer: int
    num_layers: int
    hidden: Tensor
    image: Tensor
    text: Tensor
    grid: Tensor
    prompt_length: int
    original: tuple[int, ...]
    attention: Mapping[int, Tensor]
    ahead: Tensor | None = None
    recorded: Mapping[tuple[int, Record], Tensor] = dataclasses.field(default_factory=dict)
    memory: Tensor | None = None

    @property
    def vision(self) -> Tensor:
        """(n,) indices of the vision tokens in the sequence."""
        return (self.image >= 0).nonzero().squeeze(1)

    def of_vision(self, rows: Tensor) -> Tensor:
        """(n, ...) those of the `rows` (s, ...) that belong to vision tokens; where these follow
        one another, a view."""
        vision = self.vision
        if not len(vision):
            return rows[:0]
        start, end = int(vision[0]), int(vision[-1]) + 1
        return rows[start:end] if end - start == len(vision) else rows[vision]


@dataclass(frozen=True)
class EncoderState:
    """The patches of one image inside the vision tower, between a layer's attention and its MLP.

    [CLS], where there is one, is not among them: it is never merged nor dropped.

    Attributes:
        layer: 0-based index of the tower layer.
        num_layers: tower layers whose output is used.
        original: patches before anything was merged or dropped.
        has_cls: whether a [CLS] token stands before the patches.
        attention: (n,) attention from [CLS] in this layer, or received from all, mean over heads.
        keys: (n, h, d) keys of this layer's attention.
        values: (n, h, d) its values.
        cls_value: (h, d) the value of [CLS], or `None`.
        size: (n,) patches that each token stands for.
        memory: (n,) what the method handed on from the layer before, or `None`.
    """

    layer: int
    num_layers: int
    original: int
    has_cls: bool
    attention: Tensor
    keys: Tensor
    values: Tensor
    cls_value: Tensor | None
    size: Tensor
    memory: Tensor | None = None

    def __len__(self) -> int:
        return self.keys.shape[0]


@dataclass(frozen=True)
class Merging:
    """Which tokens of a tower layer become one.

    Attributes:
        target: (n,) for each token the index, out of 0 to m - 1, of the token it becomes part of,
            -1 for those that are dropped. Contents are averaged by size.
        memory: (m,) numbers that the method wants to see again in the next layer.
    """

    target: Tensor
    memory: Tensor | None = None


@dataclass(frozen=True)
class Selection:
    """Which tokens stay, in ascending order, and what they hold.

    Attributes:
        indices: (k,) ascending whole numbers into the tokens that the method was given: the
            image's tokens in `select`, the sample's vision tokens (all images) in `prune`.
        features: (k, d) new contents where tokens were merged or replaced, else `None`.
        memory: layers stage: what the method wants to see again when it next chooses here.
    """

    indices: Tensor
    features: Tensor | None = None
    memory: Tensor | None = None


class Method:
    """Base of all methods: a dataclass whose fields are its settings.

    Class attributes:
        name: what `vtc.patch(model, name)` finds it by.
        title, paper, year: for `vtc methods`.
        trained: whether it needs trained weights.
        needs: signals of `VisionTokens` that `select` reads, out of `Signal`.
        vision_layer: 0-based layer of the vision tower these are read from, negative from the
            last; a fraction is a share of the tower's depth.
        low_layer: layer of the vision tower that `low_attention` is read from.
        listed: whether `methods()` has it; wrappers, which need another method, are found by `make`
            only.
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
    needs: ClassVar[frozenset[Signal]] = frozenset()
    vision_layer: ClassVar[int | float] = -1
    low_layer: ClassVar[int | float] = 0.25
    weighs_sizes: ClassVar[bool] = False

    positions: Positions = "original"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in cls.__dict__:
            # In the class itself, where `dataclass` leaves it alone: its own lists every default.
            shown: Any = next(b.__repr__ for b in cls.__mro__[1:] if "__repr__" in b.__dict__)
            cls.__repr__ = shown  # type: ignore[method-assign]
        name = cls.__dict__.get("name")
        if name is None:
            return
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(
                f"{cls.__name__}.name must be lower-case letters and digits, got {name!r}"
            )
        known = _found(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"a method named {name!r} exists already: {known.__qualname__}")
        (_REGISTRY if cls.listed else _WRAPPERS)[name] = cls

    # ---- what a method implements -------------------------------------------------------------
    @property
    def keeps_all(self) -> bool:
        """Whether no token of any image ever leaves: then the model may run as it is."""
        keep = getattr(self, "keep", None)
        shares = keep if isinstance(keep, tuple) and keep else (keep,)
        return all(isinstance(share, float) and share == 1.0 for share in shares)

    def merge(self, state: EncoderState) -> Merging | None:
        """Encoder stage: merge or drop patches in a tower layer, or `None` to leave them."""
        raise TypeError(f"{type(self).__name__} does not act in the vision tower")

    def select(self, tokens: VisionTokens) -> Selection:
        """Sequence stage: choose among the vision tokens of one image."""
        raise TypeError(f"{type(self).__name__} does not act in the sequence stage")

    def prune(self, state: LayerState) -> Selection | None:
        """Layers stage: choose among the vision tokens of one sample, or `None` to keep all."""
        raise TypeError(f"{type(self).__name__} does not act between layers")

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

    # ---- what every method has ----------------------------------------------------------------
    @property
    def stages(self) -> tuple[str, ...]:
        """Where this method acts, out of "pixels", "encoder", "sequence" and "layers"."""
        found = []
        if type(self).merge is not Method.merge:
            found.append("encoder")
        if type(self).select is not Method.select:
            found.append("sequence")
        if type(self).prune is not Method.prune:
            found.append("layers")
        return tuple(found)

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
            raise ValueError("methods: at least one method is needed, got none")

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(stage for m in self.methods for stage in m.stages))

    @property
    def parts(self) -> tuple[Method, ...]:
        return self.methods

    def to_dict(self) -> dict[str, Any]:
        return {"method": "compose", "methods": [m.to_dict() for m in self.methods]}

    @property
    def closes_gaps_by_choice(self) -> bool:
        """Whether one of them does."""
        return any(m.closes_gaps_by_choice for m in self.methods)

    def __str__(self) -> str:
        return " | ".join(filter(None, map(str, self.methods)))

    def __repr__(self) -> str:
        return " | ".join(filter(None, map(repr, self.methods)))


_REGISTRY: dict[str, type[Method]] = {}
_WRAPPERS: dict[str, type[Method]] = {}


def _found(name: str) -> type[Method] | None:
    return _REGISTRY.get(name) or _WRAPPERS.get(name)


def methods() -> dict[str, type[Method]]:
    """All registered methods by name, in alphabetical order."""
    return dict(sorted(_REGISTRY.items()))


def _accepted_fields(cls: type[Method]) -> Iterator[str]:
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.init:
            yield f.name


def make(method: str | Method | Mapping[str, Any], **settings: Any) -> Method:
    """Turn a name with settings, a dictionary from `to_dict`, or a method into a method.

    Raises:
        ValueError: unknown name, or a setting the method refuses.
        TypeError: a setting the method does not have, or settings beside a finished method.
    """
    if isinstance(method, Mapping):
        spec = dict(method)
        name = spec.pop("method", None)
        if not isinstance(name, str):
            raise ValueError(f"method: a dictionary needs a name under 'method', got {name!r}")
        if name != "compose":
            return make(name, **spec, **settings)
        if settings or set(spec) != {"methods"}:
            raise TypeError(
                "method: a composition has 'methods' and no settings of its own, got "
                f"{', '.join([*spec, *settings]) or 'none'}"
            )
        return Compose(tuple(make(m) for m in spec["methods"]))
    if isinstance(method, Method):
        for part in method.parts:
            if not dataclasses.is_dataclass(part) or not hasattr(part, "name"):
                raise TypeError(
                    f"method: {type(part).__name__} must be a dataclass with a `name`; its fields "
                    "are its settings"
                )
        if settings:
            given = ", ".join(settings)
            raise TypeError(
                f"settings ({given}) go with a method's name; {method} is a finished method: "
                "give them to its constructor"
            )
        return method
    if isinstance(method, type) and issubclass(method, Method):
        raise TypeError(f"method: got the class {method.__name__}; give {method.__name__}(...)")
    if isinstance(method, str) and set(method) & set("|+:@"):
        # The command line's way of writing settings and compositions.
        from vtc.spec import parse_method

        if set(settings) - {"keep"}:
            raise TypeError(f"settings: write them in {method!r}, or name a single method")
        return parse_method(method, settings.get("keep"))
    if not isinstance(method, str):
        raise TypeError(
            f"method: expected a name, a method or a composition, got {type(method).__name__}"
        )
    cls = _found(method.lower())
    if cls is None:
        raise ValueError(f"method: {unknown(method, methods())}")
    accepted = list(_accepted_fields(cls))
    strange = [key for key in settings if key not in accepted]
    if strange:
        raise TypeError(f"{method}: {unknown(strange[0], accepted, 'setting', 'accepted')}")
    return cls(**settings)


# ---- validation shared by methods ----------------------------------------------------------------
def check_keep(keep: float | int) -> None:
    """Refuse a `keep` that is neither a fraction in (0, 1] nor a positive whole number.

    `1.0` means all tokens; `1` means one token.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"keep: expected a fraction or a whole number of tokens, got {keep!r}")
    if isinstance(keep, int) and keep < 1:
        raise ValueError(f"keep: a whole number of tokens must be at least 1, got {keep}")
    if isinstance(keep, float) and not (math.isfinite(keep) and 0.0 < keep <= 1.0):
        raise ValueError(
            f"keep: a fraction must lie in (0, 1], got {keep}; "
            "for a number of tokens give a whole number"
        )


def check_choice(name: str, value: Any, accepted: tuple[Any, ...]) -> None:
    """Refuse a `value` outside `accepted`, naming the setting."""
    if value not in accepted:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, accepted))}, got {value!r}")


def check_layer(name: str, value: int | None, lowest: int = 0) -> None:
    """Refuse a layer that is not a whole number of at least `lowest` (or `None`)."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{name}: expected a whole number of at least {lowest}, got {value!r}")


def budget(keep: float | int, n: int) -> int:
    """Tokens to keep out of `n`: a fraction rounded (at least 1), a whole number capped at n."""
    wanted = max(1, round(keep * n)) if isinstance(keep, float) else keep
    return min(wanted, n)


def scale_layers(
    given: int | tuple[int, ...] | None,
    published: tuple[float, ...],
    num_layers: int,
    *,
    after: bool = False,
) -> tuple[int, ...]:
    """The layers before which a method acts in a decoder of `num_layers`.

    Args:
        given: the user's `layers`, or one `layer`, which must fit; `None` for those that were
            published.
        published: shares of the depth; rounded half up to layers, and kept apart. A decoder too
            shallow for all of them gets as many as it has room for.
        after: whether the given layers are those after which the method acts, not before.

    Raises:
        ValueError: given layers that do not ascend, or that the decoder has not.
    """
    if given is not None:
        layers = (given,) if isinstance(given, int) else given
        last = num_layers - 1 - after
        if any(a >= b for a, b in pairwise(layers)) or (layers and layers[-1] > last):
            kind = (
                "layer: expected a layer"
                if layers != given
                else "layers: expected ascending layers"
            )
            raise ValueError(
                f"{kind} up to {last} in a model of {num_layers} decoder layers, got {given}"
            )
        return tuple(layer + after for layer in layers)
    scaled: list[int] = []
    for share in published:
        wanted = int(share * num_layers + 0.5)
        wanted = max(wanted, scaled[-1] + 1 if scaled else 1)
        if wanted < num_layers:
            scaled.append(wanted)
    return tuple(scaled)
