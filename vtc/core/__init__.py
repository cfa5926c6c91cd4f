# SPDX-License-Identifier: Apache-2.0
"""The contracts: what a method is, what it receives and returns, and how it is found by name.

Nothing here depends on a model or imports transformers.
"""

from .errors import ArgumentError, ArgumentTypeError
from .method import Compose, Method
from .registry import methods
from .scorer import ScorerMethod
from .settings import (
    as_tuple,
    budget,
    check_choice,
    check_flag,
    check_fraction,
    check_keep,
    check_layer,
    check_layers,
    check_number,
    check_positions,
    check_whole,
    scale_layers,
)
from .signals import SIGNALS, Signal, SignalSpec
from .spec import make
from .stages import STAGES, Stage, stage_of
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
from .tokenizer import Codes, Tokenizer

__all__ = [
    "SIGNALS",
    "STAGES",
    "ArgumentError",
    "ArgumentTypeError",
    "Codes",
    "Compose",
    "EncoderState",
    "LayerState",
    "Merging",
    "Method",
    "Positions",
    "Record",
    "Rows",
    "ScorerMethod",
    "Selection",
    "Signal",
    "SignalSpec",
    "Stage",
    "Tokenizer",
    "VisionTokens",
    "as_tuple",
    "budget",
    "check_choice",
    "check_flag",
    "check_fraction",
    "check_keep",
    "check_layer",
    "check_layers",
    "check_number",
    "check_positions",
    "check_whole",
    "make",
    "methods",
    "scale_layers",
    "stage_of",
]
