# SPDX-License-Identifier: Apache-2.0
"""`vtc eval --suite`: named lists of tasks, so that different users run the same ones.

A suite holds tasks of lmms-eval 0.7 that need neither a judge model (MathVista, MathVerse and
CharXiv do) nor the benchmark's server (VQAv2's test split does). The data of all but `embedded`
comes from the hub.

The metric is the first of the task's own list, which `vtc.eval.harness.run`
scores: the accuracy of POPE, where papers report F1, and the perception of MME, where some add
cognition.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtc.core.errors import ArgumentError, ArgumentTypeError
from vtc.core.names import unknown

__all__ = ["SUITES", "Entry", "Suite", "expand"]


@dataclass(frozen=True)
class Entry:
    """One task of a suite.

    Attributes:
        task: its name in lmms-eval, or in `vtc.eval.tasks.OWN_TASKS`.
        metric: its metric; for a group of tasks, that of each task.
    """

    task: str
    metric: str


@dataclass(frozen=True)
class Suite:
    """A list of related tasks, each run completely, as in lmms-eval.

    Attributes:
        title: its subject.
        entries: the tasks, in the order in which they run.
    """

    title: str
    entries: tuple[Entry, ...]


def _entries(**metrics: str) -> tuple[Entry, ...]:
    return tuple(Entry(task, metric) for task, metric in metrics.items())


SUITES: dict[str, Suite] = {
    "embedded": Suite(
        # `vtc_photo` and `vtc_mosaic` need photos that do not come with vtc.
        "generated scenes; needs no network",
        _entries(vtc_scenes="exact_match"),
    ),
    "image": Suite(
        "general questions on images",
        _entries(
            gqa="exact_match",
            pope="pope_accuracy",
            mme="mme_perception_score",
            mmbench_en_dev_static="gpt_eval_score",  # a pattern's, not a model's, in spite of it
            scienceqa_img="exact_match",
            textvqa_val="exact_match",
            vizwiz_vqa_val="exact_match",
            seedbench="seed_image",
            realworldqa="exact_match",
        ),
    ),
    "doc": Suite(
        "documents, charts, diagrams, text in images",
        _entries(
            docvqa_val="anls",
            infovqa_val="anls",
            chartqa="relaxed_overall",
            ocrbench="ocrbench_accuracy",
            ai2d="exact_match",
        ),
    ),
    "video": Suite(
        "short and long videos",
        _entries(
            mvbench="mvbench_accuracy",
            videomme="videomme_perception_score",
            mlvu_dev="mlvu_percetion_score",
            longvideobench_val_v="lvb_acc",
            egoschema_subset="score",
            perceptiontest_val_mc="accuracy",
        ),
    ),
    "reasoning": Suite(
        "problems that need reasoning",
        _entries(
            mmmu_val="mmmu_acc",
            mmmu_pro_standard="mmmu_acc",
            mmmu_pro_vision="mmmu_acc",
            mathvision_testmini="mathvision_standard_eval",
            visulogic="visulogic_acc",
        ),
    ),
}
"""Suites by the name for `vtc eval --suite`."""


def expand(suite: str) -> list[str]:
    """The names of a suite's tasks, in the order in which they run.

    Raises:
        ArgumentError: unknown name; lists the known ones.
        ArgumentTypeError: not a name.
    """
    if not isinstance(suite, str):
        raise ArgumentTypeError("suite", f"expected a name, got {type(suite).__name__}")
    if suite not in SUITES:
        raise ArgumentError("suite", unknown(suite, SUITES))
    return [entry.task for entry in SUITES[suite].entries]
