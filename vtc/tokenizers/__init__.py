# SPDX-License-Identifier: Apache-2.0
"""Image tokenizers with a flexible number of tokens, one file each: FlexTok, KARL, SEED, TexTok.

Each is a `torch.nn.Module` that follows the contract `vtc.core.Tokenizer`: images to `Codes` and
back, every image as if it were alone. None is here yet.
"""
