# SPDX-License-Identifier: Apache-2.0
"""lmms-eval's model classes with patched models.

This module's `simple_X` and `chat_X` are subclasses of lmms-eval's built-in classes `X`, created on
first access (PEP 562), as lmms-eval looks classes up with `getattr`.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from vtc.core.errors import ArgumentError
from vtc.core.plugins import import_modules
from vtc.core.settings import check_choice
from vtc.core.spec import parse_keep, parse_method
from vtc.patching import Patch
from vtc.patching import patch as vtc_patch

from . import EMBEDDED

if TYPE_CHECKING:
    from vtc.eval.harness.journal import Journal

__all__ = ["VTC_ARGUMENTS", "VtcModel", "accepted_arguments", "grey"]

VTC_ARGUMENTS = ("method", "keep", "blind", "settings", "report")
"""Arguments of `VtcModel` that are not passed to the built-in class."""

_GREY = (128, 128, 128)


class _Stop(BaseException):
    """Carries an error of `generate` through the `except Exception` of built-in classes."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def grey(value: Any) -> Any:
    """Replace every image by a grey one of the same size.

    Args:
        value: what a task passes to a model.

    Raises:
        NotImplementedError: `value` contains media other than loaded images (videos, paths).
    """
    if isinstance(value, Image.Image):
        return Image.new("RGB", value.size, _GREY)
    if isinstance(value, Mapping):
        kind = value.get("type")
        if kind in ("video", "audio") or (
            kind == "image" and any(isinstance(value.get(k), str) for k in ("url", "image", "path"))
        ):
            raise NotImplementedError(f"blind: supports only images in memory, got a {kind}")
        return {k: grey(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(grey(v) for v in value)
    return value


def _grey_visuals(value: Any) -> Any:
    """`grey` for the output of `doc_to_visual`, in which a string is the path of a video."""
    if any(isinstance(v, str) for v in value or ()):
        raise NotImplementedError("blind: supports only images in memory, got a path")
    return grey(value)


class VtcModel:
    """Mixin for built-in classes: patches the model, and raises failures instead of scoring them.

    Args:
        method: a method as text (`fastv:layer=3`, `todre|fastv`; see `vtc.core.spec`); without one
            the model is not patched.
        keep: the method's budget: a fraction, or a whole number of tokens per image.
        blind: show the model grey images, for its accuracy without vision.
        settings: further settings of a single method, a dictionary or JSON.
        report: file for the report (tokens, times, FLOPs), written at the end.
        kwargs: arguments of the built-in class. If it takes them, `device` defaults to a GPU if
            there is one, otherwise the CPU, and `device_map` to that device. `attn_implementation`
            is passed to transformers if the class does not take it, as is `quantization`, "4bit" or
            "8bit" of bitsandbytes. `vtc_import` names modules with user-defined methods, separated
            by spaces.

    The first five may also have the prefix `vtc_`.

    Raises:
        ValueError: an unknown method, or invalid settings.
        TypeError: the class has no PyTorch model to patch.
    """

    # Set by `vtc eval` for a run; see `VtcModel.reuse`.
    vtc_patch: Patch | None = None
    vtc_blind: bool = False
    vtc_progress: Callable[[int], None] | None = None
    vtc_journal: Journal | None = None
    vtc_keep_model: bool = False
    _vtc_report_path: str | None = None

    def __init__(
        self,
        method: str | None = None,
        keep: int | float | str | None = None,
        blind: bool = False,
        settings: Mapping[str, Any] | str | None = None,
        report: str | None = None,
        **kwargs: Any,
    ) -> None:
        method = kwargs.pop("vtc_method", method)
        keep = kwargs.pop("vtc_keep", keep)
        blind = kwargs.pop("vtc_blind", blind)
        settings = kwargs.pop("vtc_settings", settings)
        self._vtc_report_path = kwargs.pop("vtc_report", report)
        import_modules(str(kwargs.pop("vtc_import", "")).split())
        chosen = _method(method, keep, settings)  # before loading the model, which is slow
        accepted = accepted_arguments(type(self))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if "device" in accepted:
            kwargs.setdefault("device", device)
        if "device_map" in accepted:
            # Built-in defaults ("", "auto") fail with transformers 5 or assume a GPU.
            kwargs.setdefault("device_map", kwargs.get("device", device))
        with _loading_with(_for_transformers(kwargs, accepted)):
            super().__init__(**kwargs)
        if not isinstance(getattr(self, "model", None), torch.nn.Module):
            raise TypeError(f"{type(self).__name__} has no PyTorch model to patch")
        self.vtc_apply(chosen, blind=bool(blind))

    # ---- the patch ------------------------------------------------------------------------------
    def vtc_apply(self, method: Any, *, blind: bool = False) -> None:
        """Replace the model's patch.

        Args:
            method: the new method; `None` leaves the model unpatched.
            blind: whether to show grey images.
        """
        if self.vtc_patch is not None:
            self.vtc_patch.unpatch()
            self.vtc_patch = None
        self.vtc_blind = blind
        if method is not None:
            self.vtc_patch = vtc_patch(self.model, method)  # type: ignore[attr-defined]

    def clean(self) -> None:
        """Called by lmms-eval after a run: write the report, and free the model unless it is
        reused."""
        if self._vtc_report_path and self.vtc_patch is not None:
            report = {"method": self.vtc_patch.method.to_dict(), **self.vtc_patch.report.to_dict()}
            Path(self._vtc_report_path).write_text(json.dumps(report, indent=2), "utf-8")
        if not self.vtc_keep_model:
            super().clean()  # type: ignore[misc]

    # ---- runs -----------------------------------------------------------------------------------
    @contextmanager
    def _vtc_guard(self) -> Iterator[None]:
        """Make exceptions in the model's `generate` end the run, within the block.

        Built-in classes catch every `Exception` and continue with an empty answer, so a broken
        patch would look like a bad score.
        """
        model: Any = self.model  # type: ignore[attr-defined]
        own = vars(model).get("generate")
        original = model.generate
        raised: list[Exception] = []

        def generate(*args: Any, **kwargs: Any) -> Any:
            try:
                out = original(*args, **kwargs)
            except Exception as error:
                raised.append(error)
                raise _Stop(error) from error
            if self.vtc_progress is not None:
                self.vtc_progress(len(out))
            return out

        model.generate = generate
        try:
            yield
        except _Stop:
            pass
        finally:
            if own is None:
                del model.generate
            else:
                model.generate = own
        if raised:  # even if a bare `except:` caught the carrier
            error = raised[0]
            raise RuntimeError(f"generate failed: {type(error).__name__}: {error}") from error

    def _vtc_requests(self, requests: Sequence[Any]) -> list[Any]:
        """The requests, with grey images if the model is blind."""
        if not self.vtc_blind:
            return list(requests)
        # (context, doc_to_messages, ...) in chat classes, otherwise (context, _, doc_to_visual,
        # ...)
        at, how = (2, _grey_visuals) if self.is_simple else (1, grey)  # type: ignore[attr-defined]
        out = []
        for request in requests:
            arguments = list(request.args)
            original = arguments[at]

            def greyed(doc: Any, *rest: Any, _original: Any = original, **kw: Any) -> Any:
                return how(_original(doc, *rest, **kw))

            arguments[at] = greyed
            changed = copy.copy(request)
            changed.arguments = tuple(arguments)
            out.append(changed)
        return out

    def _vtc_answers(
        self, kind: str, requests: Sequence[Any], ask: Callable[[list[Any]], list[Any]]
    ) -> list[Any]:
        """Answers to requests: from the journal if it has them, otherwise from `ask`."""
        if self.vtc_journal is None:
            return ask(list(requests))
        if self.vtc_patch is None:
            raise RuntimeError("vtc_journal: expected a patched model, whose report it records")
        return self.vtc_journal.answers(
            kind, requests, ask, self.vtc_patch.report, self.vtc_progress
        )

    def _vtc_shared(
        self, kind: str, requests: Sequence[Any], ask: Callable[[list[Any]], list[Any]]
    ) -> list[Any]:
        """Answers to this process's requests.

        lmms-eval gives all processes equally many, padded with copies if samples do not divide
        evenly. That is meant for models spread over processes; here it would count samples twice.
        """
        from vtc.eval.harness.parallel import together

        real = [r for r in requests if not (r.metadata or {}).get("__padding_only__")]
        answers = together(lambda: self._vtc_answers(kind, real, ask) if real else [])
        return [*answers, *answers[-1:] * (len(requests) - len(real))]

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        def ask(mine: list[Any]) -> list[Any]:
            with self._vtc_guard():
                return super(VtcModel, self).generate_until(  # type: ignore[misc]
                    self._vtc_requests(mine)
                )

        return self._vtc_shared("generate_until", requests, ask)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        if self.vtc_blind:
            raise NotImplementedError("blind: not supported for tasks with several rounds")

        def ask(mine: list[Any]) -> list[Any]:
            with self._vtc_guard():
                return super(VtcModel, self).generate_until_multi_round(mine)  # type: ignore[misc]

        return self._vtc_shared("generate_until_multi_round", requests, ask)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """(loss, greedy) pairs as `GenerationResult`s: lmms-eval 0.7.3 converts bare pairs to text
        and then cannot score them."""
        from lmms_eval.api.instance import GenerationResult

        def ask(mine: list[Any]) -> list[Any]:
            pairs = super(VtcModel, self).loglikelihood(  # type: ignore[misc]
                self._vtc_requests(mine)
            )
            return [GenerationResult(text=pair) for pair in pairs]

        return self._vtc_shared("loglikelihood", requests, ask)


class _LlavaScores:
    """Log-likelihoods for `llava_hf`, whose implementation fails with transformers 5.

    (It tokenises the prompt with the processor but without images, which is now an error.)
    """

    @torch.inference_mode()
    def loglikelihood(self: Any, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(mean negative log-likelihood, whether it is the greedy answer) of each continuation.

        lmms-eval's built-in classes return the mean loss, not a log-probability, and
        multiple-choice scoring takes the smallest. Greedy compares with the logits *before* each
        token; the built-in class omits this shift.
        """
        results = []
        for request in requests:
            context, target, doc_to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            continuation = target if isinstance(target, str) else target(doc)
            images = list(doc_to_visual(doc))
            if images and "<image>" not in context:
                context = " ".join(["<image>"] * len(images)) + f"\n{context}"
            prompt, whole = self._vtc_texts(context, continuation)
            options: dict[str, Any] = {"return_tensors": "pt"}
            if images:
                options["images"] = images
            inputs = self._image_processor(text=[whole], **options)
            inputs = inputs.to(self._device, self.model.dtype)
            alone = self._image_processor(text=[prompt], **options)["input_ids"][0]
            ids = inputs["input_ids"][0]
            # Length of the common prefix: a token that joins the end of the prompt and the start of
            # the answer belongs to the answer.
            n = min(len(alone), len(ids))
            same = (alone[:n].to(ids.device) == ids[:n]).long().cumprod(0)
            start = int(same.sum())
            labels = ids.clone()
            labels[:start] = -100
            logits = self.model(**inputs, labels=labels[None]).logits[0].float()
            answer = ids[start:]
            scores = logits[start - 1 : -1].log_softmax(-1)
            loss = -scores.gather(1, answer[:, None]).mean()
            greedy = bool((scores.argmax(-1) == answer).all())
            results.append((float(loss), greedy))
            if self.vtc_progress is not None:
                self.vtc_progress(1)
        return results

    def _vtc_texts(self: Any, context: str, continuation: str) -> tuple[str, str]:
        """The prompt, and the prompt with the answer, by the chat template."""
        from lmms_eval.models.simple.llava_hf import VICUNA_CHAT_TEMPLATE

        template = self.chat_template or self.tokenizer.chat_template or VICUNA_CHAT_TEMPLATE
        messages = [
            {"role": "user", "content": context},
            {"role": "assistant", "content": continuation},
        ]
        render = self.tokenizer.apply_chat_template
        options = {"tokenize": False, "chat_template": template}
        return (
            render(messages[:-1], add_generation_prompt=True, **options),
            render(messages, add_generation_prompt=False, **options),
        )


class _Embedded:
    """`llava_hf` with vtc's embedded model by default."""

    def __init__(self, **kwargs: Any) -> None:
        from vtc.eval.embedded.vlm import embedded_path

        kwargs.setdefault("pretrained", str(embedded_path()))
        super().__init__(**kwargs)


def _method(
    method: str | None,
    keep: int | float | str | None,
    settings: Mapping[str, Any] | str | None,
) -> Any:
    if method is None:
        if keep is not None or settings:
            raise ArgumentError("method", "keep and settings need a method, got none")
        return None
    if isinstance(keep, str):
        keep = parse_keep(keep)
    fields: Mapping[str, Any] = (
        json.loads(settings) if isinstance(settings, str) else settings or {}
    )
    if fields:
        if "|" in method:
            raise ArgumentError(
                "settings", "with a composition, write them in the method (todre|fastv:layer=3)"
            )
        method = method + "".join(f":{key}={value!r}" for key, value in fields.items())
    return parse_method(method, keep)


def accepted_arguments(cls: type) -> set[str]:
    """Names of the arguments of all constructors of `cls`."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            names |= set(inspect.signature(vars(base)["__init__"]).parameters)
    return names


def _for_transformers(kwargs: dict[str, Any], accepted: set[str]) -> dict[str, Any]:
    """Remove from `kwargs`, and return, arguments for `from_pretrained` that the class does not
    take.

    Raises:
        ArgumentError: unknown quantization.
        ImportError: bitsandbytes is not installed.
    """
    options: dict[str, Any] = {}
    if "attn_implementation" in kwargs and "attn_implementation" not in accepted:
        options["attn_implementation"] = kwargs.pop("attn_implementation")
    kind = kwargs.pop("quantization", None)
    if kind is not None:
        check_choice("quantization", kind, ("4bit", "8bit"))
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError("quantization: needs `pip install bitsandbytes`")
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{kind}": True})
    return options


@contextmanager
def _loading_with(options: Mapping[str, Any]) -> Iterator[None]:
    """Add `options` to every `from_pretrained` within the block, for built-in classes that cannot
    pass them."""
    from transformers import PreTrainedModel

    if not options:
        yield
        return
    original = vars(PreTrainedModel)["from_pretrained"]

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        return original.__func__(cls, *args, **{**kwargs, **options})

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = original  # type: ignore[method-assign]


@contextmanager
def _without_decord() -> Iterator[None]:
    """If decord, which exists for x86-64 only, is missing, provide a stub within the block.

    lmms-eval's classes import it even without videos; with a video, the stub's error names decord.
    """
    if sys.modules.get("decord") is not None or importlib.util.find_spec("decord") is not None:
        yield
        return

    def missing(*_: Any, **__: Any) -> Any:
        raise ImportError("videos need decord, which is not installed")

    module = types.ModuleType("decord")
    vars(module).update(VideoReader=missing, cpu=missing)
    sys.modules["decord"] = module
    try:
        yield
    finally:
        # Other packages check whether it is installed.
        del sys.modules["decord"]


@cache
def _patched(kind: str, name: str) -> type:
    """The subclass of lmms-eval's built-in class `name` ("simple" or "chat")."""
    from lmms_eval.models import get_model_manifest

    builtin = "llava_hf" if name == EMBEDDED else name
    manifest = get_model_manifest(builtin)
    path = manifest.simple_class_path if kind == "simple" else manifest.chat_class_path
    if path is None:
        raise AttributeError(f"lmms-eval has no {kind} class {builtin!r}")
    module, _, attribute = path.rpartition(".")
    with _without_decord():
        base = getattr(importlib.import_module(module), attribute)
    before: tuple[type, ...] = (_Embedded,) if name == EMBEDDED else ()
    after: tuple[type, ...] = (_LlavaScores,) if builtin == "llava_hf" else ()
    bases = (*before, VtcModel, *after, base)
    doc = f"lmms-eval's {builtin} ({kind}) with a patched model; see `VtcModel`."
    return type(f"{kind}_{name}", bases, {"__module__": __name__, "__doc__": doc})


def __getattr__(name: str) -> type:
    kind, underscore, builtin = name.partition("_")
    if kind not in ("simple", "chat") or not underscore or not builtin:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return _patched(kind, builtin)
    except ValueError as error:  # not in lmms-eval's registry
        raise AttributeError(str(error)) from error
