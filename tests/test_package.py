# SPDX-License-Identifier: Apache-2.0
"""What is built is what is needed: the wheel works outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

from tests.imports import read

ROOT = Path(__file__).resolve().parent.parent

USE = """
import importlib.metadata, json, sys
import torch, vtc, vtc.eval, vtc.integrations.lmms_eval
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
from vtc.eval.embedded.vlm import embedded_path

folder = embedded_path()
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(folder)
content = [{"type": "image"}, {"type": "text", "text": "Is there a star?"}]
chat = [{"role": "user", "content": content}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=Image.new("RGB", (336, 336), "gray"), text=text, return_tensors="pt")
with vtc.patch(model, "todre", keep=0.1) as patch:
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
points = importlib.metadata.entry_points(group="lmms_eval.models", name="vtc")
from pathlib import Path
tasks = sorted(p.name for p in (Path(vtc.eval.__file__).parent / "tasks").glob("*.yaml"))
print(json.dumps({
    "vtc": vtc.__file__, "eval": vtc.eval.__file__, "tokens": patch.report.tokens_out,
    "entry": len(points), "tasks": tasks,
}))
"""


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    """Weights, task files and entry points travel in the wheel."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True, cwd=tmp_path,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("vision_token_compression-*.whl")
    home = tmp_path / "env"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    # Dependencies are lent, not installed anew: torch alone is gigabytes. A folder named in a .pth
    # file comes after the environment's own packages, and its own .pth files (the editable
    # install of this checkout) are not read.
    site = next((home / "lib").glob("python*/site-packages"))
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"])
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)],
        check=True, cwd=tmp_path,
    )  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = subprocess.run(
        [str(python), "-c", USE], check=True, cwd=tmp_path, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    import json

    found = json.loads(out.stdout.splitlines()[-1])
    assert str(home) in found["vtc"]
    assert str(home) in found["eval"]
    assert found["tokens"] == 58  # round(0.1 * 576)
    assert found["entry"] >= 1
    assert "vtc_scenes.yaml" in found["tasks"]


@pytest.mark.slow
def test_command_line_starts_from_the_wheels_entry_point() -> None:
    out = subprocess.run(
        [str(Path(sys.executable).parent / "vtc"), "methods"], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert "todre" in out.stdout


def test_every_folder_is_packaged() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = set(tomllib.load(file)["tool"]["setuptools"]["packages"])
    # Examples are run from a checkout.
    found = {module.package for module in read().values()} - {"vtc.eval.examples"}
    assert listed == found
