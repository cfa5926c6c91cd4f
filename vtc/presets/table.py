# SPDX-License-Identifier: Apache-2.0
"""Published token targets, and the settings with which methods meet them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from vtc.core.errors import ArgumentError
from vtc.core.names import unknown

Convention = Literal["exact", "average", "kept", "counted"]


# ---- the models that targets are published for --------------------------------------------------
@dataclass(frozen=True)
class Target:
    """A model with published token targets, with its 7B language model.

    Attributes:
        name: its name for `preset`.
        tokens: vision tokens of an image; if `tile` is `None`, of a typical one.
        tile: vision tokens of a tile, or `None` if an image may have any number of tokens.
        decoder: sizes of the language model, named as in its configuration.
    """

    name: str
    tokens: int
    tile: int | None
    decoder: Mapping[str, Any] = field(hash=False)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self.decoder["num_hidden_layers"])

    @property
    def tiles(self) -> int:
        """Tiles of an image of `tokens`."""
        return self.tiles_of(self.tokens)

    def tiles_of(self, tokens: int) -> int:
        """Tiles of an image of `tokens` vision tokens."""
        return tokens // self.tile if self.tile else 1


_VICUNA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32000,
}  # fmt: skip
_QWEN_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 152064,
}  # fmt: skip

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("llava-1.5", 576, 576, _VICUNA_7B),
        Target("llava-next", 2880, 576, _VICUNA_7B),
        # 1296 = 36 x 36: evaluations resize to 1008 x 1008 pixels.
        Target("qwen2.5-vl", 1296, None, _QWEN_7B),
    )
}


def target_of(name: str) -> Target:
    """The target of this name.

    Raises:
        ArgumentError: unknown name.
    """
    found = TARGETS.get(name.lower()) if isinstance(name, str) else None
    if found is None:
        raise ArgumentError("target", unknown(name, TARGETS))
    return found


# ---- the table ----------------------------------------------------------------------------------
class Open(Enum):
    """Placeholders in a row for values that depend on the target."""

    TARGET = "the target: a number on LLaVA-1.5 and per tile, elsewhere a fraction"
    COUNT = "solved for the average, in whole tokens per image or, if it is split, per tile"
    SHARE = "solved for the average, a fraction of four decimals"
    NEVER = "no setting meets the target"


TARGET, COUNT, SHARE, NEVER = Open


class Each(tuple[Any, ...]):
    """One value for each target of a row."""


def _each(*values: Any) -> Each:
    return Each(values)


def _said(text: str, *values: object) -> Each:
    """`text` with one value for each target in place of `{}`."""
    return Each(text.format(value) for value in values)


def _of_576(*counts: int) -> tuple[float, ...]:
    """Counts published for 576 tokens, as fractions."""
    return tuple(count / TARGETS["llava-1.5"].tokens for count in counts)


@dataclass(frozen=True)
class Row:
    """Presets of one method on one model that differ only in their tokens.

    Attributes:
        method, target, convention: as in `Preset`.
        tokens: the targets.
        settings: the method's settings; an `Each` has one value per target.
        sources: where the settings come from, per target if they differ.
        each: whether the method is applied to each tile separately, with `vtc.PerTile`.
    """

    method: str
    target: str
    convention: Convention
    tokens: tuple[int | float, ...]
    settings: Mapping[str, Any]
    sources: str | Each
    each: bool = False

    @property
    def solved(self) -> bool:
        """Whether `keep` is solved for the average."""
        return self.settings["keep"] in (COUNT, SHARE)

    @property
    def fixed(self) -> frozenset[str]:
        """Settings that the target depends on; users may give others."""
        looked_up = self.convention == "average" and not self.solved
        return frozenset(self.settings) if looked_up else frozenset({"keep"})

    def at(self, tokens: int | float) -> dict[str, Any]:
        """The settings of a target."""
        return {name: self._of(tokens, value) for name, value in self.settings.items()}

    def source(self, tokens: int | float) -> str:
        """The source of these settings."""
        return str(self._of(tokens, self.sources))

    def _of(self, tokens: int | float, value: Any) -> Any:
        return value[self.tokens.index(tokens)] if isinstance(value, Each) else value


_LLAVA, _NEXT, _QWEN = "llava-1.5", "llava-next", "qwen2.5-vl"
_576, _2880, _THIRDS = (192, 128, 64), (640, 320, 160), (1 / 3, 2 / 9, 1 / 9)
_SHARES = (1 / 2, 1 / 3, 2 / 9, 1 / 5, 1 / 9, 1 / 10)
_KEEP = {"keep": TARGET}
_CUT = {"keep": TARGET, "layer": 2}
_CUT_COUNT = {"keep": COUNT, "layer": 2}
_CUT_SHARE = {"keep": SHARE, "layer": 2}
_SPLIT = {"keep": TARGET, "contextual": 10 / 64}
_PYRAMID = {"keep": SHARE, "layers": (2, 8, 16)}
_DROPS = (3, 17, 22)
_V1 = {"version": "v1.5", "layers": (2, 6, 15)}
_V2 = {"version": "v2", "layers": (2, 6, 15)}

# The first row of a method and a model is the default convention.
# fmt: off
TABLE: tuple[Row, ...] = (
    Row("catp", _LLAVA, "kept", _576, _KEEP, "inferred; more before layer 7"),
    Row("catp", _QWEN, "kept", (2 / 9,), {"keep": TARGET, "layer": 6}, "paper: 77.8 % go"),
    Row("cdpruner", _LLAVA, "exact", _576, _KEEP, "paper; relevance is ours"),
    Row("cdpruner", _NEXT, "exact", _2880, _KEEP,
         _said("README: {} a tile; relevance is ours, scaled tile by tile", 128, 64, 32),
         each=True),
    Row("cdpruner", _QWEN, "exact", (512 / 1296, 256 / 1296, 128 / 1296), _KEEP,
        _said("paper: {} of 1296; relevance is ours", 512, 256, 128)),
    Row("dart", _LLAVA, "kept", _576, _CUT, "paper; its code keeps 4 more"),
    Row("dart", _NEXT, "kept", _2880, _CUT, "code, which keeps 4 more"),
    Row("dart", _QWEN, "kept", _THIRDS, _CUT, "ratios of the code"),
    Row("dart", _LLAVA, "average", _576, _CUT_COUNT, "solved"),
    Row("dart", _NEXT, "average", _2880, _CUT_COUNT, "solved"),
    Row("dart", _QWEN, "average", _THIRDS, _CUT_SHARE, "solved"),
    Row("divprune", _LLAVA, "exact", (*_576, 56), _KEEP,
         _each(*3 * ("tables of others",), "authors' script, 9.8 %")),
    Row("divprune", _NEXT, "exact", (*_2880, 282), _KEEP,
         _each(*3 * ("tables of others",), "authors' script, 9.8 %")),
    Row("downsample", _LLAVA, "exact", _576, _KEEP, "baseline, at most the target"),
    Row("downsample", _NEXT, "exact", _2880, _KEEP, "baseline, at most the target"),
    Row("downsample", _QWEN, "exact", _SHARES, _KEEP, "baseline, at most the target"),
    Row("fastv", _LLAVA, "average", _576, _CUT_COUNT, "solved; K = 2 of the paper"),
    Row("fastv", _NEXT, "average", _2880, _CUT_COUNT, "solved; K = 2 of the paper"),
    Row("fastv", _QWEN, "average", _THIRDS, _CUT_SHARE, "solved; K = 2 of the paper"),
    Row("fastv", _LLAVA, "kept", (432, 288, 144, 72, *_576), _CUT,
         _each(*4 * ("paper",), *3 * ("tables of others",))),
    Row("fastv", _NEXT, "kept", _2880, _CUT, "tables of others"),
    Row("flowcut", _LLAVA, "exact", _576, _KEEP, "code"),
    Row("flowcut", _NEXT, "exact", _2880, _KEEP,
         "inferred; the code lets in 2.5 times as many and cuts after decoder layer 1 (1.094 T)"),
    Row("holov", _LLAVA, "exact", _576, {"keep": TARGET, "chunks": _each(5, 8, 16)},
         _each("by the rule of its Qwen code", "by the rule of its Qwen code", "code")),
    Row("holov", _NEXT, "exact", _2880, {"keep": TARGET, "chunks": _each(8, 16, 32)},
         "inferred by the rule of its Qwen code"),
    Row("holov", _QWEN, "exact", _THIRDS, {"keep": TARGET, "chunks": _each(5, 8, 16)}, "code"),
    Row("mmtok", _LLAVA, "exact", _576, {"keep": TARGET, "text_temperature": 0.02}, "code"),
    Row("mmtok", _NEXT, "exact", _2880, {"keep": TARGET, "text_temperature": 0.02},
         _said("code: {} a tile", 128, 64, 32), each=True),
    Row("mmtok", _QWEN, "exact", (0.2, 0.1), {"keep": TARGET, "text_temperature": 0.01}, "code"),
    Row("pool", _LLAVA, "exact", _576, _KEEP, "baseline, at most the target"),
    Row("pool", _NEXT, "exact", _2880, _KEEP, "baseline, at most the target"),
    Row("pool", _QWEN, "exact", _SHARES, _KEEP, "baseline, at most the target"),
    Row("prumerge_plus", _LLAVA, "exact", _576, _KEEP,
         _said("inferred; training code at rho {}, its last token counted", "1/6", "1/9", "1/18")),
    Row("prumerge_plus", _NEXT, "exact", _2880, _KEEP,
         _said("inferred: {} a tile, the last token of each counted", 128, 64, 32), each=True),
    Row("pyramiddrop", _LLAVA, "average", _576, _PYRAMID, "solved; form and layers by its author"),
    Row("pyramiddrop", _NEXT, "average", _2880, _PYRAMID, "solved; form and layers by its author"),
    Row("random", _LLAVA, "exact", _576, _KEEP, "baseline"),
    Row("random", _NEXT, "exact", _2880, _KEEP, "baseline"),
    Row("random", _QWEN, "exact", _SHARES, _KEEP, "baseline"),
    Row("scope", _LLAVA, "exact", _576, {"keep": TARGET, "alpha": 1.0}, "code"),
    Row("scope", _NEXT, "exact", _2880, {"keep": TARGET, "alpha": 1.0},
         _said("code: {} a tile", 128, 64, 32), each=True),
    Row("sparsevlm", _LLAVA, "counted", (192, 128, 96, 64),
         {"keep": _each((300, 200, 110), (303, 110, 36), (238, 48, 26), (66, 30, 17)), **_V1},
         _said("list of the code, which counts short: {} are processed",
               206.5, 145.4, 114.1, 82.2)),
    Row("sparsevlm", _LLAVA, "counted", (192, 128, 96, 64),
         {"keep": _each((300, 200, 118), (238, 108, 60), (246, 54, 28), (66, 34, 20)), **_V2},
         _said("list of the code, which counts short: {} are processed",
               206.8, 144.1, 113.9, 81.8)),
    Row("sparsevlm", _NEXT, "counted", _2880,
         {"keep": _each(_of_576(303, 110, 36), _of_576(66, 30, 17), NEVER), **_V1},
         _each("inferred: the list of 128, scaled; 725 are processed",
               "inferred: the list of 64, scaled; 409 are processed", "")),
    Row("sparsevlm", _NEXT, "counted", _2880,
         {"keep": _each(_of_576(238, 108, 60), _of_576(66, 34, 20), NEVER), **_V2},
         _each("inferred: the list of 128, scaled; 721 are processed",
               "inferred: the list of 64, scaled; 409 are processed", "")),
    Row("todre", _LLAVA, "exact", (144, 58, *_576), _KEEP,
         _each("inferred: 25 %", "inferred: 10 %", *3 * ("inferred",))),
    Row("todre", _NEXT, "exact", (720, 288, *_2880), _KEEP,
         _each("paper: 25 %", "paper: 10 %", *3 * ("inferred",))),
    Row("todre", _QWEN, "exact", (0.25, 0.1), _KEEP, _said("paper: {} %", 25, 10)),
    Row("tome", _LLAVA, "exact", _576, _KEEP, 
         _said("inferred: {} merged in 23 layers", 384, 448, 512)),
    Row("tome", _NEXT, "exact", _2880, _KEEP, 
         _said("inferred: {} merged in each tile", 448, 512, 544)),
    Row("transprune", _LLAVA, "average", _576, {"keep": SHARE, "schedule": "high"},
         "solved; the paper has FLOPs and no targets"),
    Row("transprune", _NEXT, "average", _2880, {"keep": SHARE, "schedule": "high"},
         "solved; the paper has FLOPs and no targets"),
    Row("v2drop", _LLAVA, "average", _576,
         {"keep": _each(0.5, 0.28, 0.05), "then": _each((0.3, 0.0), (0.25, 0.0), (0.05, 0.0)),
          "layers": _DROPS}, _said("paper; {} if no token is left at last", 193.4, 130.7, 66.4)),
    Row("v2drop", _NEXT, "average", _2880,
         {"keep": _each(0.28, 0.05, NEVER), "then": _each((0.25, 0.0), (0.05, 0.0), (0.05, 0.0)),
          "layers": _DROPS},
         _each("inferred: the fractions of 128 of 576; 654.0 if no token is left at last",
               "inferred: the fractions of 64 of 576; 334.1 if no token is left at last", "")),
    Row("v2drop", _QWEN, "average", (2 / 9,),
         {"keep": 0.25, "then": (0.05, 0.0), "layers": (3, 16, 22)}, "code of Qwen2-VL-7B: 22.6 %"),
    Row("visionzip", _LLAVA, "exact", _576, _SPLIT,
         _each("LightCompress", "LightCompress", "README and LightCompress: 54 + 10")),
    Row("visionzip", _NEXT, "exact", _2880, _SPLIT,
         _said("LightCompress: {} a tile", "108 + 20", "54 + 10", "27 + 5"), each=True),
    Row("vispruner", _LLAVA, "exact", _576, {"keep": TARGET, "important": 0.5}, "README"),
    Row("vispruner", _NEXT, "exact", _2880, {"keep": TARGET, "important": 0.5},
         _each("like 32 a tile of the README", "like 32 a tile of the README", "README: 32 a tile"),
         each=True),
    Row("vscan", _LLAVA, "average", _576, {"keep": COUNT, "then": 1 / 3},
         _each("solved", "solved", "solved; README: 96, then 32")),
    Row("vscan", _NEXT, "average", _2880, {"keep": COUNT, "then": 1 / 3},
         _said("solved: {} a tile, then a third of all tiles together", 192, 96, 48), each=True),
    Row("vscan", _QWEN, "average", _THIRDS, {"keep": SHARE, "then": 1 / 3, "layer": 14},
         _each("solved", "solved", "solved; README: 0.167, then 0.333")),
)
# fmt: on

WITHOUT: dict[str, str] = {
    "atp": "its budget is trained",
    "correlation": "it adapts to each crop; set its `keep` for a fixed budget",
    "full": "it keeps all tokens",
    "prumerge": "its number of tokens depends on the image; `prumerge_plus` has fixed budgets",
}
"""Methods without presets, and why."""
