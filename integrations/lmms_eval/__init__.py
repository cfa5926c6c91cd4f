# SPDX-License-Identifier: Apache-2.0
"""lmms-eval with compressed vision tokens, without changes to lmms-eval.

Through the entry point `lmms_eval.models`, lmms-eval calls `manifests`. For every built-in Hugging
Face model class `X` it then also has `vtc_X`, the same class with a patched model:

    python -m lmms_eval --model vtc_llava_hf --tasks pope,mme \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=todre,keep=0.1

`vtc_embedded` is `vtc_llava_hf` with vtc's embedded model. The arguments are those of the built-in
class and of `VtcModel`.

A limitation of lmms-eval's command line: it looks up a task's model-specific prompt by the model's
name, so a task with a special prompt for `qwen2_5_vl` gives `vtc_qwen2_5_vl` the default one. `vtc
eval` passes the built-in name and gets the special prompt.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

__all__ = ["PREFIX", "builtin_name", "manifests"]

PREFIX = "vtc_"
EMBEDDED = "embedded"
_MODULE = f"{__name__}.models"
# AutoModelFor...from_pretrained(, LlavaFor...from_pretrained(, model_cls.from_pretrained(, but not
# AutoProcessor.from_pretrained(, which classes for servers also call.
_LOADS_A_MODEL = re.compile(r"(AutoModel\w*|\w+For[A-Z]\w+|model_\w+)\.from_pretrained\(")


def builtin_name(name: str) -> str:
    """lmms-eval's name of the built-in class behind `vtc_...`."""
    name = name.removeprefix(PREFIX)
    return "llava_hf" if name == EMBEDDED else name


def _loads_from_the_hub(model_id: str, folder: Path) -> bool:
    """Whether a built-in class loads a Hugging Face model.

    Inferred from its source: importing a hundred modules with their dependencies would take too
    long.
    """
    files = [folder / kind / f"{model_id}.py" for kind in ("simple", "chat")]
    return any(f.is_file() and _LOADS_A_MODEL.search(f.read_text("utf-8")) for f in files)


def manifests() -> list[ModelManifest]:
    """One manifest `vtc_X` for each built-in Hugging Face class `X`, and `vtc_embedded`."""
    # lmms-eval calls this while importing `lmms_eval.models`, whose tables are complete by then.
    from lmms_eval.models import AVAILABLE_CHAT_TEMPLATE_MODELS as CHAT
    from lmms_eval.models import AVAILABLE_SIMPLE_MODELS as SIMPLE
    from lmms_eval.models.registry_v2 import ModelManifest

    folder = Path(str(sys.modules["lmms_eval.models"].__file__)).parent
    found = []
    for model_id in sorted({*SIMPLE, *CHAT}):
        if not _loads_from_the_hub(model_id, folder):
            continue
        paths: dict[str, Any] = {
            f"{kind}_class_path": f"{_MODULE}.{kind}_{model_id}"
            for kind, table in (("simple", SIMPLE), ("chat", CHAT))
            if model_id in table
        }
        found.append(ModelManifest(model_id=PREFIX + model_id, **paths))
    embedded = {f"{kind}_class_path": f"{_MODULE}.{kind}_{EMBEDDED}" for kind in ("simple", "chat")}
    return [*found, ModelManifest(model_id=PREFIX + EMBEDDED, **embedded)]
