# SPDX-License-Identifier: Apache-2.0
"""The page MODELS.md, made from the families."""

from __future__ import annotations

from vtc.models import FamilyInfo, models

COLUMNS = (
    "family",
    "stages",
    "video",
    "positions",
    "tokens of an image see",
    "tower read",
    "tested",
)

_HEAD = """# Models

Made by `vtc models --markdown > MODELS.md`; CI checks that it is current.

Tested means: held to a reference in which dropped tokens are masked instead of removed, on small
random models of the family, at prefill and through cached decoding (greedy, beams, sampling, static
caches, no cache, further turns, labels), at batch 1 and in padded batches with several images, rows
without images and, where there are any, clips (`tests/runtime/test_families.py`,
`tests/runtime/test_mllama.py`). Real checkpoints load on
your machine. Methods that read the vision tower work where its column says so, and are refused
elsewhere: attention and keys (ToDRE, token correlation, HoloV, ...), or patch states that the
projector receives as well (VisionZip, VisPruner, SCOPE, PruMerge). A clip's frames have each
their own [CLS], so that a clip is shown none.

"""


def row(family: FamilyInfo) -> tuple[str, ...]:
    """The cells of one family."""
    return (
        family.name if family.model_types else "any other of the common shape, with a warning",
        ", ".join(family.stages),
        family.video,
        family.positions,
        family.attention,
        family.tower,
        "matrix" if family.tested else "-",
    )


def page() -> str:
    """All of MODELS.md."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(row(family)) for family in models()]
    table = "\n".join(f"| {line} |" for line in lines)
    about = "\n".join(f"- **{f.name}**: {f.about}" for f in models())
    return f"{_HEAD}{table}\n\n## What is particular\n\n{about}\n"
