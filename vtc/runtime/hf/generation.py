# SPDX-License-Identifier: Apache-2.0
"""What `generate` is asked for, wherever it is said, and what a patched model refuses of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from vtc.runtime.hf.override import WHOLE


class Request:
    """One call of `generate`, read as `generate` itself reads it.

    Attributes:
        given: its arguments by name, those included that were not named.
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
        """The value that counts: a named argument's, even `None`, else that of the configuration
        given, else that of the model's own; `None` if nobody set it."""
        if name in self.given:
            return self.given[name]
        values = (getattr(config, name, None) for config in self._configs)
        return next((value for value in values if value is not None), None)

    @property
    def prompt_width(self) -> int | None:
        """Tokens in a row of the prompt, padding included; `None` if it comes as embeddings."""
        ids = self.given.get("input_ids")
        ids = self.given.get("inputs") if ids is None else ids
        return None if ids is None else int(ids.shape[1])

    @property
    def drafts(self) -> bool:
        """Whether guesses are asked for, for another model to check: transformers hands the images
        over with the prompt, but leaves them out of all forwards of an assistant."""
        return bool(self.setting("is_assistant"))

    @property
    def guesses(self) -> bool:
        """Whether guessed tokens reach the model together with the prompt."""
        return any(self.setting(name) is not None for name in _GUESSERS)

    def refuse_pieces(self) -> None:
        """
        Raises:
            ValueError: the prompt would come in pieces.
        """
        if (chunk := self.setting("prefill_chunk_size")) is not None:
            raise ValueError(
                "prefill_chunk_size: a patched model takes a prompt with images in one piece, got "
                f"{chunk}; give None, or unpatch"
            )

    def refuse_fullgraph(self) -> None:
        """
        Raises:
            ValueError: decoding would be compiled as a whole.
        """
        config = self.setting("compile_config")
        if getattr(config, "fullgraph", False) and not self.setting("disable_compile"):
            raise ValueError(f"compile_config: expected fullgraph=False, got {config}; {WHOLE}")

    def refuse_drafts(self) -> None:
        """
        Raises:
            ValueError: the next tokens would be guessed from states inside the model.
        """
        named = {name: self.setting(name) for name in ("assistant_early_exit", "use_mtp")}
        if self.setting("speculation_type") == "dflash":
            named["speculation_type"] = "dflash"
        helper = type(self.given.get("assistant_model")).__name__
        if helper.startswith(("Gemma4Assistant", "Gemma4UnifiedAssistant")):
            named["assistant_model"] = helper
        for name, value in named.items():
            if value not in (None, False):
                raise ValueError(
                    f"{name}: the next tokens would be guessed from layers, states or keys of the "
                    f"patched model, which hold fewer tokens than its prompt, got {value}; leave "
                    "it out, or unpatch; prompt_lookup_num_tokens and an assistant_model with a "
                    "cache of its own are fine"
                )

    def refuse_guesses(self, why: str) -> None:
        """
        Raises:
            ValueError: tokens would be guessed at all; `why` says what stands against it.
        """
        for name in (*_GUESSERS, "assistant_early_exit", "use_mtp"):
            if self.setting(name) not in (None, False):
                raise ValueError(
                    f"{name}: a patched model does not decode with guessed tokens: {why}; leave it "
                    "out, or unpatch"
                )


_GUESSERS = ("assistant_model", "prompt_lookup_num_tokens")
