# SPDX-License-Identifier: Apache-2.0
"""`vtc bench`: what a method costs and saves, beside the plain model, the short one and arithmetic.

A *row* is one variant at one precision and batch size. Three kinds of variant are run:

- `unpatched`: the plain model with all vision tokens.
- `short`: the plain model that was given the short sequence outright. Its prompt has as many
  placeholders as a method leaves tokens, and the features are cut to as many behind the vision
  tower. Where a method drops tokens between decoder layers, the sequence is cut before the same
  layers, to the same lengths, by a slice. Nothing is chosen, so this is as fast as any method with
  these lengths can be; what a method takes longer is its selection and vtc's own overhead.
- a method, through `vtc.patch`.

One prefill is one call of the model with pixels, a new cache and the logits of the last position.
Its time is split:

    total      the whole call
    vision     tower and projector, without what is read of them for a method
    selector   choosing, and the attention rows computed for it (`Patch.report`)
    lm         what is left: embedding, merging, decoder layers, output head, vtc's bookkeeping
    prefill    selector + lm, that is total less vision

All variants run the tower on all patches (methods of the stages "pixels" and "encoder" save there),
so `total` hides what a method does to the language model behind a cost that is the same for all.
Ratios are therefore of `prefill`, which is what a speed bar is to be put on; those of `total` are
given too. `beyond` is, for methods whose first layers see everything, the ratio of `after`: the
time from the first layer with fewer tokens on, and all of the selector's, the part of it that lies
in that layer's preparation counted twice rather than not at all. `decode` is the median step of
one new token a row on the cache of that prefill, with an attention mask of the full length, as
`generate` makes them.

`ideal` is the time of the unpatched model times the share of FLOPs that `vtc.cost` says are left
(language model only). Short sequences run at fewer FLOPs a second than long ones, and decoding is
bound by reading weights, so that a ratio above 1 to the ideal is no fault of a method: `short` is
the yardstick for overhead, `ideal` that for the hardware.

Variants run in turns in one process (A B C A B C ...), garbage collected before each and not
within. Ratios are formed within a turn, whose runs share the state of the machine, and their
median and quartiles taken over the turns. On a CPU the clock is `time.perf_counter`; on a GPU CUDA
events, the device synchronised after the prefill and after each step of decoding.

Peak memory is taken in a run of its own that is not timed, one prefill and the decoding steps:
bytes beyond what was allocated before, so activations, cache and selection, without weights and
inputs. On a GPU that is the allocator's `torch.cuda.max_memory_allocated`; on a CPU the running sum
of PyTorch's allocations and frees as `torch.profiler` records them. Resident size would not do: the
C library keeps freed memory, so that a variant would show the peak of the largest before it. What
BLAS and oneDNN allocate for themselves is in neither figure.

Weights are random (or those of the checkpoint if asked for), pixels and text are random, and all
rows of a batch have equal length. Speed does not depend on them, except for methods whose number of
tokens does (thresholds); the tokens that were left in each layer are in every row.
"""

from __future__ import annotations

from .runner import run
from .settings import PRESETS, Settings, Variant, plan
from .tables import blocks, head, notes, table

__all__ = ["PRESETS", "Settings", "Variant", "blocks", "head", "notes", "plan", "run", "table"]
