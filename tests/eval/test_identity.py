# SPDX-License-Identifier: Apache-2.0
"""What a cell of `vtc eval` is told from others by: all that its answers depend on, and no more."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

import vtc
from tests.eval.evalkit import save_model, write_rows

pytest.importorskip("lmms_eval")

from vtc.eval.harness import identity
from vtc.eval.harness import run as runner
from vtc.eval.harness.identity import (
    FileHashes,
    code_of_functions,
    code_of_method,
    fingerprint,
    named_files,
    shared_code,
)
from vtc.eval.harness.loading import write_task
from vtc.eval.harness.plan import Settings
from vtc.eval.harness.run import run

from vtc.models import base

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


# ---- files --------------------------------------------------------------------------------------
@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A large file, by which a change in its middle is not at its edges."""
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "model.safetensors").write_bytes(os.urandom(24 * MIB))
    (tmp_path / "large" / "config.json").write_text("{}")
    return tmp_path / "large"


def _settle(monkeypatch) -> None:
    monkeypatch.setattr(identity, "_UNSETTLED", 0)


def test_every_byte_of_a_model_counts(checkpoint):
    before = fingerprint(checkpoint)
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(12 * MIB)
        byte = file.read(1)
        file.seek(12 * MIB)
        file.write(bytes([byte[0] ^ 1]))
    assert fingerprint(checkpoint) != before
    (checkpoint / "README.md").write_text("about it")
    (checkpoint / ".cache").mkdir()
    (checkpoint / ".cache" / "lock").write_text("")
    changed = fingerprint(checkpoint)
    (checkpoint / "README.md").write_text("more about it")
    (checkpoint / ".cache" / "lock").unlink()
    assert fingerprint(checkpoint) == changed
    (checkpoint / "config.json").rename(checkpoint / "other.json")
    assert fingerprint(checkpoint) != changed


def test_large_files_are_read_once_unless_they_change(checkpoint, tmp_path, monkeypatch):
    _settle(monkeypatch)
    memory, weights = tmp_path / "memory.json", checkpoint / "model.safetensors"
    first = fingerprint(checkpoint, FileHashes(memory))
    read: list[str] = []
    original = identity.hashlib.file_digest
    monkeypatch.setattr(
        identity.hashlib, "file_digest",
        lambda stream, kind: read.append(Path(stream.name).name) or original(stream, kind),
    )  # fmt: skip
    assert fingerprint(checkpoint, FileHashes(memory)) == first
    assert read == ["config.json"]  # small ones are always read
    # Other content of the same size, its time set back: a copy that keeps times does that.
    times = weights.stat()
    weights.write_bytes(os.urandom(24 * MIB))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(checkpoint, FileHashes(memory)) != first


def test_files_that_settings_name_count(tmp_path):
    heads = tmp_path / "heads"
    heads.mkdir()
    (heads / "model.safetensors").write_bytes(b"a")
    settings = {"method": "compose", "methods": [{"method": "atp", "weights": str(heads)}]}
    before = named_files(settings, FileHashes())
    assert list(before) == [str(heads)]
    (heads / "model.safetensors").write_bytes(b"b")
    assert named_files(settings, FileHashes()) != before
    assert named_files({"positions": "original", "keep": 4, "x": "a\0b"}, FileHashes()) == {}


# ---- code ---------------------------------------------------------------------------------------
@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A copy of vtc's sources that hashes are made of in place of its own."""
    copied = tmp_path / "vtc"
    shutil.copytree(Path(vtc.__file__).parent, copied, ignore=shutil.ignore_patterns("__pycache__"))
    original = identity.inspect.getfile
    source = Path(vtc.__file__).parent

    def getfile(cls: type) -> str:
        file = Path(original(cls))
        return str(copied / file.relative_to(source)) if file.is_relative_to(source) else str(file)

    monkeypatch.setattr(identity, "_PACKAGE", copied)
    monkeypatch.setattr(identity.inspect, "getfile", getfile)
    return copied


def _append(file: Path) -> None:
    with file.open("a") as stream:
        stream.write("# changed\n")


@pytest.mark.parametrize(
    "name",
    [
        "viz/plots.py",
        "cli/eval.py",
        "viz/trace.py",
        "presets/table.py",
        "models/page.py",
        "new.txt",
    ],
)
def test_code_that_no_answer_passes_through_does_not_count(package, name):
    methods = (vtc.ToDRE(keep=9), vtc.Random(keep=9) | vtc.FastV(keep=4))
    before = [shared_code(), *map(code_of_method, methods)]
    _append(package / name)
    assert [shared_code(), *map(code_of_method, methods)] == before


@pytest.mark.parametrize(
    "name", ["patching.py", "runtime/hf/engine.py", "ops/__init__.py", "core/method.py"]
)
def test_code_that_carries_out_counts_for_all(package, name):
    before = shared_code()
    _append(package / name)
    assert shared_code() != before
    (package / "runtime" / "added.py").write_text("")
    assert shared_code() != before


def test_families_of_other_packages_count_for_all(tmp_path, monkeypatch):
    file, kinds, before = tmp_path / "vtc_own_family.py", list(base.ADAPTERS), shared_code()
    file.write_text(
        "from vtc.models import Llava\nclass Own(Llava):\n    name = 'own'\n"
        "    model_types = ('own_vl',)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        importlib.import_module("vtc_own_family")
        known = shared_code()
        assert known != before
        _append(file)
        assert shared_code() not in (known, before)
    finally:
        base.ADAPTERS[:] = kinds
    assert shared_code() == before


def test_a_methods_code_counts_for_its_own_cells(package):
    cases = {
        "fastv": vtc.FastV(keep=4),
        "todre": vtc.ToDRE(keep=4),
        "composed": vtc.DivPrune(keep=9) | vtc.FastV(keep=4),
        "tiled": vtc.PerTile(vtc.DivPrune(keep=4)),
    }
    shared, before = shared_code(), {k: code_of_method(m) for k, m in cases.items()}
    _append(package / "methods" / "fastv.py")
    after = {k: code_of_method(m) for k, m in cases.items()}
    assert {k for k in cases if after[k] != before[k]} == {"fastv", "composed"}
    _append(package / "methods" / "divprune.py")
    last = {k: code_of_method(m) for k, m in cases.items()}
    assert {k for k in cases if last[k] != after[k]} == {"composed", "tiled"}
    _append(package / "methods" / "split.py")
    assert code_of_method(cases["tiled"]) != last["tiled"]
    assert shared_code() == shared


def test_a_method_of_ones_own_counts_with_what_it_imports(tmp_path, monkeypatch):
    plugin = tmp_path / "vtc_own_methods"
    plugin.mkdir()
    (plugin / "__init__.py").write_text("")
    (plugin / "helper.py").write_text("FIRST = 4\n")
    (plugin / "apart.py").write_text("")
    (plugin / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from vtc.methods.divprune import DivPrune\n"
        "from .helper import FIRST\n"
        "@dataclass(frozen=True)\n"
        "class Mine(DivPrune):\n"
        "    name = 'own_mine'\n"
        "    title = 'Mine'\n"
        "    listed = False\n"  # or other tests would find it among vtc's
        "    keep: float | int = FIRST\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    method = importlib.import_module("vtc_own_methods.mine").Mine()
    before = code_of_method(method)
    (plugin / "apart.py").write_text("# changed\n")
    assert code_of_method(method) == before
    _append(plugin / "helper.py")
    changed = code_of_method(method)
    assert changed != before
    _append(plugin / "mine.py")
    assert code_of_method(method) != changed
    files = {f.name for f in identity._closure((plugin / "mine.py").resolve())}
    assert files == {"mine.py", "helper.py", "divprune.py"}


def test_functions_of_a_task_count_with_what_they_import(tmp_path, monkeypatch):
    (tmp_path / "task_utils_a.py").write_text("import task_utils_b\ndef text(doc):\n    return 1\n")
    (tmp_path / "task_utils_b.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = importlib.import_module("task_utils_a").text
    before = code_of_functions([text])
    _append(tmp_path / "task_utils_b.py")
    assert code_of_functions([text]) != before


# ---- generated data -----------------------------------------------------------------------------
def _photos(folder: Path, grey: int) -> Path:
    import io

    from PIL import Image

    folder.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(buffer, "PNG")
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        archive.writestr("a.png", buffer.getvalue())
    row = {"id": "0", "question": "what", "answer": "a", "type": "name", "images": ["a.png"]}
    (folder / "photo_dev.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "photos_train.jsonl").write_text("")
    return folder


def test_other_photos_are_other_data(tmp_path, monkeypatch):
    """The rows are the same, only a picture differs."""
    out = tmp_path / "out"
    found = []
    for name, grey in (("a", 10), ("b", 200), ("a2", 10)):
        monkeypatch.setenv("VTC_DATA", str(_photos(tmp_path / name, grey)))
        found.append(write_task("vtc_photo", out).read_bytes())
    assert found[0] != found[1]
    assert found[0] == found[2]
    kept = (out / "vtc_photo.parquet").stat().st_mtime_ns
    write_task("vtc_photo", out)
    assert (out / "vtc_photo.parquet").stat().st_mtime_ns == kept


def test_another_limit_in_the_same_folder_is_other_data(tmp_path):
    sizes = [write_task("vtc_scenes", tmp_path, limit).stat().st_size for limit in (2, 4)]
    assert sizes[0] < sizes[1]


# ---- cells --------------------------------------------------------------------------------------
@pytest.fixture
def _two_rows(monkeypatch):
    def build_task(name, out_dir, limit=None, seed=0):
        return write_rows(Path(out_dir) / "built.parquet", ["w1", "w2"])

    monkeypatch.setattr("vtc.eval.tasks.parquet.build_task", build_task)
    monkeypatch.setattr(runner, "hub_answers", lambda: False)


def _run(out: Path, model: Path, **changed: Any) -> dict[str, Any]:
    given = {"methods": ("random",), "keeps": (4,), "baselines": False, **changed}
    return run(Settings(out=out, model=str(model), **given))


@pytest.mark.usefixtures("_two_rows")
def test_the_same_cell_by_another_name_is_not_run_again(folder, tmp_path, monkeypatch):
    first = _run(tmp_path, folder)["cells"][-1]
    monkeypatch.setattr(runner, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    again = _run(tmp_path, folder, methods=("random:keep=4",), keeps=())
    found = [c for c in again["cells"] if c["key"] == first["key"]]
    assert ("random:keep=4", None) in [(c["label"], c["keep"]) for c in found]


@pytest.mark.usefixtures("_two_rows")
@pytest.mark.parametrize(
    "changed",
    [
        {"model_args": {"attn_implementation": "eager"}},
        {"dtype": "bfloat16"},
        {"seed": 1},
    ],
)
def test_what_changes_answers_makes_other_cells(folder, tmp_path, monkeypatch, changed):
    class Stopped(Exception):
        pass

    def load(*_: Any, **__: Any) -> None:
        raise Stopped

    if "done" not in _DONE:
        _DONE["done"] = tmp_path / "first"
        _run(_DONE["done"], folder, methods=("full",))
    shutil.copytree(_DONE["done"], tmp_path / "copy")
    monkeypatch.setattr(runner, "load", load)
    _run(tmp_path / "copy", folder, methods=("full",))
    with pytest.raises(Stopped):
        _run(tmp_path / "copy", folder, methods=("full",), **changed)


_DONE: dict[str, Path] = {}


@pytest.mark.parametrize("name", ["torch", "transformers", "lmms-eval", "pillow"])
def test_versions_count(name):
    assert name in identity.installed_versions()
    assert "bitsandbytes" not in identity.installed_versions()
