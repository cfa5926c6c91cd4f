# SPDX-License-Identifier: Apache-2.0
"""The effective settings of a call of `generate`, and those that a patched model refuses."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from vtc.core.errors import ArgumentError


class Request:
    """One call of `generate`, with settings resolved as `generate` resolves them.

    Args:
        model: the model, with its `generation_config`.
        original: its `generate`.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Attributes:
        given: all arguments by name, positional ones included.
    """

    def __init__(
        self,
        model: Any,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        named = inspect.signature(original).bind_partial(*args).arguments if args else {}
        self.given: dict[str, Any] = {**named, **kwargs}
        self._configs = (
            self.given.get("generation_config"),
            getattr(model, "generation_config", None),
        )

    def setting(self, name: str) -> Any:
        """The effective value of a setting.

        Args:
            name: of the argument or of the field of the generation config.

        Returns:
            The argument if it is given, even `None`; else the value in the given config; else the
            value in the model's config; `None` if none is set.
        """
        if name in self.given:
            return self.given[name]
        values = (getattr(config, name, None) for config in self._configs)
        return next((value for value in values if value is not None), None)

    @property
    def prompt_width(self) -> int | None:
        """Tokens per row of the prompt, padding included; `None` for embeddings."""
        ids = self.given.get("input_ids")
        ids = self.given.get("inputs") if ids is None else ids
        return None if ids is None else int(ids.shape[1])

    @property
    def drafts(self) -> bool:
        """Whether the model is the assistant in assisted decoding. transformers passes the images
        with the prompt, but omits them from every forward of an assistant."""
        return bool(self.setting("is_assistant"))

    @property
    def guesses(self) -> bool:
        """Whether assisted decoding feeds candidate tokens together with the prompt."""
        return any(self.setting(name) is not None for name in _GUESSERS)

    def refuse_pieces(self) -> None:
        """Refuse chunked prefill.

        Raises:
            ArgumentError: `prefill_chunk_size` is set.
        """
        if (chunk := self.setting("prefill_chunk_size")) is not None:
            raise ArgumentError(
                "prefill_chunk_size",
                f"a patched model takes a prompt with images in one piece, got "
                f"{chunk}; give None, or unpatch",
            )

    def refuse_compiling(self, why: str) -> None:
        """Refuse to compile decoding as one graph, and warn that otherwise it runs as it is.

        Args:
            why: the reason.

        Raises:
            ArgumentError: `compile_config` has `fullgraph=True` and compiling is not disabled.
        """
        config = self.setting("compile_config")
        if config is None or self.setting("disable_compile"):
            return
        if getattr(config, "fullgraph", False):
            raise ArgumentError(
                "compile_config", f"expected fullgraph=False, got {config}: {why}; or unpatch"
            )
        warnings.warn(f"compile_config: what cannot be compiled runs as it is: {why}", stacklevel=2)

    def refuse_drafts(self) -> None:
        """Refuse assisted decoding that drafts from the patched model's own layers, states or keys.

        Raises:
            ArgumentError: early exit, multi-token prediction, DFlash or a Gemma 4 assistant is set.
        """
        named = {name: self.setting(name) for name in ("assistant_early_exit", "use_mtp")}
        if self.setting("speculation_type") == "dflash":
            named["speculation_type"] = "dflash"
        helper = type(self.given.get("assistant_model")).__name__
        if helper.startswith(("Gemma4Assistant", "Gemma4UnifiedAssistant")):
            named["assistant_model"] = helper
        for name, value in named.items():
            if value not in (None, False):
                raise ArgumentError(
                    name,
                    f"the next tokens would be guessed from layers, states or keys of the "
                    f"patched model, which hold fewer tokens than its prompt, got {value}; leave "
                    "it out, or unpatch; prompt_lookup_num_tokens and an assistant_model with a "
                    "cache of its own are fine",
                )

    def refuse_guesses(self, why: str) -> None:
        """Refuse all assisted decoding.

        Args:
            why: the reason, for the error.

        Raises:
            ArgumentError: an assistant, prompt lookup, early exit or multi-token prediction is set.
        """
        for name in (*_GUESSERS, "assistant_early_exit", "use_mtp"):
            if self.setting(name) not in (None, False):
                raise ArgumentError(
                    name,
                    f"a patched model does not decode with guessed tokens: {why}; leave it "
                    "out, or unpatch",
                )


_GUESSERS = ("assistant_model", "prompt_lookup_num_tokens")
