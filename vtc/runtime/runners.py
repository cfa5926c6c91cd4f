# SPDX-License-Identifier: Apache-2.0
"""The stages that this executor runs; methods that act in others are refused."""

from __future__ import annotations

from vtc.core import STAGES, Method

RUN = ("pixels", "encoder", "sequence", "layers")
"""Names of the stages that have a runner."""


def check_stages(method: Method) -> None:
    """Refuse a method with a part that implements no stage, or one that this executor does not run.

    Args:
        method: the method, or a composition.

    Raises:
        ValueError: a part overrides no hook, or the hook of a stage without a runner.
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
