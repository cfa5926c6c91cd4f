# SPDX-License-Identifier: Apache-2.0
"""Trained projectors between vision tower and language model: TokenFLEX, registers.

Each is a `torch.nn.Module` from patch states (b, n, d_v) to embeddings (b, k, d), where the caller
chooses k; it takes the place of a model's own projector, and every image is projected as if it were
alone. None is here yet.
"""
