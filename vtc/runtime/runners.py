# SPDX-License-Identifier: Apache-2.0
"""Which stages this executor runs, and the refusal of methods that act in others."""

from __future__ import annotations

from vtc.core import STAGES, Method

RUN = ("pixels", "encoder", "sequence", "layers")
"""Names of the stages that have a runner."""


def check_stages(method: Method) -> None:
    """Refuse a method, or a part of one, that does nothing or acts where nothing runs it.

    Raises:
        ValueError: no hook of a stage is overridden, or that of a stage without a runner.
    """
    for part in method.parts:
        if not part.stages:
            hooks = ", ".join(stage.hook for stage in STAGES if stage.name in RUN)
            raise ValueError(
                f"method: {part} implements no stage: it overrides none of "
                f"{hooks}, nor, as a ScorerMethod, score or score_layer"
            )
        if lacking := [name for name in part.stages if name not in RUN]:
            raise ValueError(
                f"method: no runner for stage {lacking[0]!r} in this executor, in which {part} "
                f"acts; it runs {', '.join(RUN)}"
            )
