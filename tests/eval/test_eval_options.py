# SPDX-License-Identifier: Apache-2.0
"""Tasks, models and methods of one's own in `vtc eval`, and what it says if lmms-eval is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vtc
from tests.eval.evalkit import save_model, write_rows

pytest.importorskip("lmms_eval")

import lmms_eval.evaluator
from vtc.eval.harness import ready
from vtc.eval.harness import run as runner
from vtc.eval.harness.plan import BadInput, Settings, parse_arguments, parse_limit, with_task_files
from vtc.eval.harness.run import run
from vtc.integrations.lmms_eval import models

ROOT = Path(vtc.__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    monkeypatch.setattr(runner, "hub_answers", lambda: False)


def _task(folder: Path, name: str = "own_task", rows: int = 4) -> Path:
    """A task file with its data and functions, as users write them."""
    folder.mkdir()
    write_rows(folder / "rows.parquet", [f"w{i}" for i in range(rows)])
    (folder / "own_utils.py").write_text(
        "def image(doc):\n    return [doc['image'].convert('RGB')]\n"
        "def text(doc):\n    return doc['question']\n"
    )
    file = folder / "own.yaml"
    file.write_text(
        f"task: {name}  # ours\n"
        "dataset_path: parquet\n"
        f"dataset_kwargs:\n  data_files:\n    test: {folder / 'rows.parquet'}\n"
        "test_split: test\noutput_type: generate_until\n"
        "doc_to_visual: !function own_utils.image\ndoc_to_text: !function own_utils.text\n"
        "doc_to_target: answer\ngeneration_kwargs:\n  max_new_tokens: 4\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return file


def _settings(out: Path, model: Path, **given: Any) -> Settings:
    return Settings(out=out, model=str(model), methods=("full",), baselines=False, **given)


# ---- tasks --------------------------------------------------------------------------------------
def test_a_task_file_is_run_and_is_another_when_it_changes(folder, tmp_path, monkeypatch):
    file = _task(tmp_path / "tasks")
    given = _settings(tmp_path / "out", folder, tasks=(str(file),), limit=0.5)
    cell = run(given)["cells"][0]
    assert (cell["task"], cell["status"], cell["samples"]) == ("own_task", "done", 2)
    # By its folder and its name, and two of four samples: the same cell.
    same = _settings(
        tmp_path / "out", folder, tasks=("own_task",), limit=2, include_paths=(str(file.parent),)
    )
    with monkeypatch.context() as patched:
        patched.setattr(runner, "load", lambda *_, **__: pytest.fail("the model was loaded"))
        assert run(same)["cells"][0]["key"] == cell["key"]
    keys = [cell["key"]]
    for change in ("own_utils.py", "own.yaml", "rows.parquet"):
        if change == "rows.parquet":
            write_rows(file.parent / change, ["other"] * 4)
        else:
            text = (file.parent / change).read_text()
            changed = text.replace("doc['question']", "'what'").replace("tokens: 4", "tokens: 3")
            assert changed != text
            (file.parent / change).write_text(changed)
        found = [c["key"] for c in run(same)["cells"] if c["key"] not in keys]
        assert len(found) == 1, change
        keys += found


def test_task_files_that_do_not_go_are_refused(folder, tmp_path):
    with pytest.raises(BadInput, match="no-such") as error:
        with_task_files(_settings(tmp_path, folder, tasks=("no-such.yaml",)))
    assert error.value.option == "--tasks"
    (tmp_path / "empty.yaml").write_text("dataset_path: parquet\n")
    with pytest.raises(BadInput, match="task: NAME"):
        with_task_files(_settings(tmp_path, folder, tasks=(str(tmp_path / "empty.yaml"),)))
    with pytest.raises(BadInput, match="no folder") as error:
        run(_settings(tmp_path / "out", folder, include_paths=(str(tmp_path / "none"),)))
    assert error.value.option == "--include-path"


@pytest.mark.parametrize(("text", "limit"), [("5", 5), ("1", 1), ("0.5", 0.5), ("1.0", None)])
def test_a_limit_is_a_number_or_a_share(text, limit):
    assert parse_limit(text) == limit


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "0.0", "half"])
def test_other_limits_are_refused(text):
    with pytest.raises(BadInput, match="at least 1 sample, or a fraction of them") as error:
        parse_limit(text)
    assert error.value.option == "--limit"


# ---- the model ----------------------------------------------------------------------------------
def test_model_arguments_as_text():
    text = "attn_implementation=eager, max_frames_num=8,use_cache=false,chat_template=none"
    assert parse_arguments(text) == {
        "attn_implementation": "eager", "max_frames_num": 8, "use_cache": False,
        "chat_template": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": "x"}, "pretrained is set by --model"),
        ({"vtc_method": "x"}, "vtc_method is set by --methods"),
        ({"quantization": "3bit"}, "expected one of 4bit, 8bit, got '3bit'"),
        ({"attention": "eager"}, "llava_hf has no attention; it has quantization"),
        ({"quantization": "4bit"}, "pip install bitsandbytes"),
    ],
)
def test_model_arguments_that_do_not_go_are_refused(
    folder, tmp_path, monkeypatch, arguments, message
):
    find = models.importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util,
        "find_spec",
        lambda n, *a: None if n == "bitsandbytes" else find(n, *a),
    )
    file = _task(tmp_path / "tasks")
    with pytest.raises(BadInput, match=message):
        run(_settings(tmp_path / "out", folder, tasks=(str(file),), model_args=arguments))


def test_the_attention_that_is_asked_for_is_the_one_that_runs(folder, tmp_path, monkeypatch):
    seen = []
    original = runner.load

    def load(*args: Any, **kwargs: Any) -> Any:
        model = original(*args, **kwargs)
        seen.append(model.model.config.text_config._attn_implementation)
        return model

    monkeypatch.setattr(runner, "load", load)
    file = _task(tmp_path / "tasks")
    for name in ("eager", "sdpa"):
        given = {"tasks": (str(file),), "limit": 1, "model_args": {"attn_implementation": name}}
        run(_settings(tmp_path / "out", folder, **given))
    assert seen == ["eager", "sdpa"]


def test_options_reach_transformers_past_a_class_that_does_not_take_them(folder, monkeypatch):
    from transformers import AutoModelForImageTextToText, PreTrainedModel

    monkeypatch.setattr(models.importlib.util, "find_spec", lambda *_: True)
    kwargs = {"attn_implementation": "eager", "quantization": "8bit", "pretrained": "x"}
    options = models._for_transformers(kwargs, {"pretrained"})
    assert kwargs == {"pretrained": "x"}
    assert options["quantization_config"].load_in_8bit
    before = PreTrainedModel.from_pretrained
    with models._loading_with({"attn_implementation": "eager", "dtype": torch.float64}):
        loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert loaded.config.text_config._attn_implementation == "eager"
    assert loaded.dtype == torch.float64
    assert PreTrainedModel.from_pretrained == before


# ---- methods of one's own -----------------------------------------------------------------------
OWN = """
from dataclasses import dataclass
import vtc

@dataclass(frozen=True)
class Every(vtc.Method):
    name = "own_every"
    title = "Every n-th token"
    step: int = 2
    positions: str = "original"

    def select(self, tokens):
        import torch
        return vtc.Selection(torch.arange(0, len(tokens), self.step))
"""


def _vtc(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    # The wide terminal keeps messages in one line.
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "vtc.cli", *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_method_of_ones_own_is_scored(folder, tmp_path, processes):
    (tmp_path / "own_methods.py").write_text(OWN)
    file = _task(tmp_path / "tasks")
    done = _vtc(
        "eval", "--import", "own_methods", "--methods", "own_every:step=3", "--tasks", file,
        "--model", folder, "--no-baselines", "--processes", processes, "--out", "out",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (cell,) = results["cells"]
    assert (cell["label"], cell["status"], cell["tokens"]["out"]) == (
        "own_every:step=3",
        "done",
        12,
    )
    assert results["settings"]["imports"] == ["own_methods"]


def test_a_module_that_cannot_be_imported_is_refused(tmp_path):
    from typer.testing import CliRunner

    from vtc.cli import app

    (tmp_path / "broken.py").write_text("1 / 0\n")
    for command in ("eval", "bench", "autotune", "methods"):
        for module, why in (("no_such_module", "ModuleNotFoundError"), ("broken.py", "division")):
            name = tmp_path / module if module.endswith(".py") else module
            done = CliRunner(env={"COLUMNS": "300"}).invoke(app, [command, "--import", str(name)])
            assert done.exit_code == 2
            assert "Invalid value for --import" in done.output
            assert why in done.output


# ---- lmms-eval that does not import -------------------------------------------------------------
def test_what_the_evaluator_imports_later_is_known():
    found = ready._imported_later(lmms_eval.evaluator, ("simple_evaluate", "evaluate"))
    assert "filelock._api" in found
    assert "pytest" not in found


def test_a_broken_package_is_named_once_before_any_cell(folder, tmp_path):
    """A package that one of lmms-eval's own imports asks for, in a version that does not suit."""
    fake = tmp_path / "fake" / "filelock"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text(
        "class FileLock: pass\nclass BaseFileLock: pass\nclass SoftFileLock: pass\n"
        "class Timeout(Exception): pass\nclass UnixFileLock: pass\nclass WindowsFileLock: pass\n"
        "__version__ = '4.0'\n"
    )
    script = (
        f"import sys\nsys.path.insert(0, {str(fake.parent)!r})\n"
        "from vtc.cli import app\n"
        f"app(['eval', '--model', {str(folder)!r}, '--out', {str(tmp_path / 'out')!r}])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "COLUMNS": "500", "NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "lmms-eval cannot be imported: ModuleNotFoundError" in done.stderr
    assert "The installed filelock" in done.stderr
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_missing_package_is_named(monkeypatch):
    error = ModuleNotFoundError("No module named 'no_such_package'", name="no_such_package")
    said = ready._remedy(error)
    assert "The package 'no_such_package' is not installed." in said
    assert '`pip install "vision-token-compression[eval]"`' in said
    wanted = ["torch>=2", "filelock<4; extra == 'eval'", "lmms-eval[all]==0.7.3"]
    monkeypatch.setattr(ready.metadata, "requires", lambda _: wanted)
    assert ready._bound("filelock") == "filelock<4"
    assert ready._bound("lmms_eval") == "lmms-eval[all]==0.7.3"
    assert ready._bound("numpy") is None


def test_it_is_said_before_the_first_cell(folder, tmp_path, monkeypatch):
    def broken() -> None:
        raise BadInput("vtc eval", "lmms-eval cannot be imported")

    monkeypatch.setattr(runner, "import_lmms_eval", broken)
    monkeypatch.setattr(runner, "find_source", lambda *_: pytest.fail("it went on"))
    with pytest.raises(BadInput, match="cannot be imported"):
        run(_settings(tmp_path, folder))
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("option", "value"), [("--model-args", "a=(1"), ("--tasks", "pope("), ("--methods", "todre(")]
)
def test_brackets_that_do_not_match_are_said(option, value, tmp_path):
    from typer.testing import CliRunner

    from vtc.cli import app

    result = CliRunner().invoke(app, ["eval", option, value, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert option in result.output
    assert "Traceback" not in result.output
