# SPDX-License-Identifier: Apache-2.0
"""How each stage is carried out in models of transformers: one runner, in one file, per stage.

A new stage is a `Stage` in `vtc.core.stages` and a runner here; `tests/runtime/test_new_stage.py`
is an example. The runner asks the adapter for what it needs, and refuses models that lack it.
"""

from __future__ import annotations

from vtc.runtime.hf.stages.base import Runner, Shortened
from vtc.runtime.hf.stages.encoder import EncoderRunner
from vtc.runtime.hf.stages.layers import LayersRunner
from vtc.runtime.hf.stages.pixels import PixelsRunner
from vtc.runtime.hf.stages.sequence import SequenceRunner

__all__ = ["RUNNERS", "Runner", "Shortened"]

RUNNERS: dict[str, type[Runner]] = {
    runner.stage: runner for runner in (PixelsRunner, EncoderRunner, SequenceRunner, LayersRunner)
}
"""By stage, in the order of `vtc.core.STAGES`."""
