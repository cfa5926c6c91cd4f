# SPDX-License-Identifier: Apache-2.0
"""`vtc bench`: what a method costs and saves, against the plain model, a short sequence and theory.

A *row* is one variant at one precision and batch size. There are three kinds of variant:

- `unpatched`: the plain model with all vision tokens.
- `short`: the plain model, given the short sequence directly. Its prompt has as many placeholders
  as a method keeps tokens, and the features are truncated to as many after the vision tower. If the
  method drops tokens between decoder layers, a slice cuts the sequence before the same layers, to
  the same lengths. Nothing is selected, so no method with these lengths can be faster; the
  difference is a method's selection and vtc's overhead.
- a method, through `vtc.patch`.

One prefill is one call of the model with pixels, a new cache and the logits of the last position.
Its time is split:

    total      the whole call
    vision     tower and projector, without captures for a method
    selector   selection, and the attention rows computed for it (`Patch.report`)
    lm         the rest: embedding, merging, decoder layers, output head, vtc's bookkeeping
    prefill    selector + lm, i.e. total minus vision

All variants run the tower on all patches (except methods of the stages "pixels" and "encoder"), so
`total` dilutes a method's effect on the language model by a constant cost. Targets and ratios
therefore refer to `prefill`; ratios of `total` are also given. For methods whose first layers see
all tokens, `beyond` is the ratio of `after`: the time from the first layer with fewer tokens, plus
the whole selector. (The part of the selector within that layer's preparation counts twice rather
than not at all.) `decode` is the median step of one new token per row on the cache of that prefill,
with an attention mask of the full length, as in `generate`.

`ideal` is the unpatched model's time multiplied by the fraction of FLOPs left according to
`vtc.cost` (language model only). Short sequences run at fewer FLOP/s than long ones, and decoding
is bound by reading weights, so a ratio to the ideal above 1 is not a method's fault: `short`
measures overhead, `ideal` the hardware.

Variants are interleaved in one process (A B C A B C ...), with garbage collected before each and
not during a run. Ratios are computed within a round, whose runs share the machine's state; median
and quartiles are over the rounds. On a CPU the clock is `time.perf_counter`; on a GPU CUDA events,
with the device synchronised after the prefill and after each decoding step.

Peak memory is measured in a separate, untimed run of a prefill and the decoding steps: bytes beyond
those allocated before, that is activations, cache and selection, without weights and inputs. On a
GPU it is `torch.cuda.max_memory_allocated`; on a CPU the running sum of PyTorch's allocations and
frees in `torch.profiler`. Resident size would not do: the C library keeps freed memory, so a
variant would show the peak of the largest before it. Neither figure includes the internal buffers
of BLAS and oneDNN.

Weights are random (or the checkpoint's, on request), pixels and text are random, and all rows of a
batch have equal length. Speed does not depend on their values, except for methods whose number of
tokens does (thresholds); each row of the results lists the tokens of every layer.
"""

from __future__ import annotations

from .runner import run
from .settings import PRESETS, Settings, Variant, plan
from .tables import blocks, head, notes, table

__all__ = ["PRESETS", "Settings", "Variant", "blocks", "head", "notes", "plan", "run", "table"]
