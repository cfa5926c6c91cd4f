# SPDX-License-Identifier: Apache-2.0
"""Stage 2: the language model alone, on symbolic pictures.

    python -m vtc.eval.embedded.training.lm --minutes 35

A vision token is the sum of learned embeddings of its patch's dense labels, row and column, so no
picture is rendered and no tower runs. The model learns to look up, compare, count and spell; the
projector then maps the tower's features to the same embeddings.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from ...tasks.photos import Mosaic, PhotoLibrary, data_folder
from ..scenes.drawing import COLORS, SHAPES
from ..scenes.labels import CHARS, FIELDS, GRID, MAX_TILES, REGIONS
from ..scenes.questions import Asked
from ..scenes.scenes import Scene
from ..scenes.words import DOCUMENT_KEYS
from ..vlm import build_model, build_processor, build_tokenizer
from .common import RUNS, MasterOptimizer, flat, language_forward, rate_at, save, with_muon
from .data import Stream, caption_of, triples_of
from .packs import Packer, answer_loss, choose, embed, evidence_loss, keep_patches


class Symbols(nn.Module):
    """Embeddings of dense labels, rows and columns, whose sum replaces a vision token."""

    def __init__(self, width: int, scale: float = 0.25) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(size, width) for size in FIELDS.values()])
        self.rows, self.columns = nn.Embedding(GRID, width), nn.Embedding(GRID, width)
        for table in self.modules():
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=scale)

    def forward(self, labels: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """(b, k, d) tokens of labels (b, fields, k) at `places` (b, k) of the 24 x 24 grid."""
        total = self.rows(places // GRID) + self.columns(places % GRID)
        for k, table in enumerate(self.tables):
            total = total + table(labels[:, k])
        return total


def start_weights(
    model: LlavaForConditionalGeneration,
    symbols: Symbols,
    tokenizer: PreTrainedTokenizerFast,
    library: PhotoLibrary | None,
) -> None:
    """Initialise more widely than the config's 0.02, close to looking up and copying.

    A label starts as the embedding of its name ("red", "7", "top left"), and the output layer as
    the input embeddings, so that a question's words match patches from the first step.
    """
    for name, weight in model.model.language_model.named_parameters():
        if weight.ndim < 2:
            continue
        last = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.3 if "embed_tokens" in name else weight.shape[1] ** -0.5 * (0.25 if last else 1.0)
        nn.init.normal_(weight, std=std)
    tokens = model.model.language_model.embed_tokens.weight
    config = model.config.text_config
    group = config.num_attention_heads // config.num_key_value_heads
    size = config.hidden_size // config.num_attention_heads
    with torch.no_grad():
        model.lm_head.weight.copy_(0.15 * tokens)
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            keys = attention.k_proj.weight.view(-1, 1, size, config.hidden_size)
            queries = attention.q_proj.weight.view(-1, group, size, config.hidden_size)
            queries.copy_(0.7 * queries + 0.7 * keys)
        for name, names in label_names(library).items():
            table = symbols.tables[list(FIELDS).index(name)]
            for k, text in enumerate(names):
                ids = tokenizer.encode(text, add_special_tokens=False)
                ids = [i for i in ids if i != tokenizer.convert_tokens_to_ids("\u0120")]
                table.weight[1 + k] = tokens[ids].sum(0) / len(ids) ** 0.5


def label_names(library: PhotoLibrary | None) -> dict[str, list[str]]:
    """Names of the labels' classes in questions and answers, from class 1."""
    names = {
        "shape": [f" {shape}" for shape in SHAPES],
        "color": [f" {color}" for color in COLORS],
        "role": [" object", " number", " word", " of", " value"],
        "region": [f" {region}" for region in REGIONS],
        "char": list(CHARS),
        "key": [f" {key}" for key in DOCUMENT_KEYS],
        "tile_row": [str(1 + k) for k in range(MAX_TILES)],
        "tile_col": [str(1 + k) for k in range(MAX_TILES)],
    }
    if library is not None:
        names["photo"] = [f" {name}" for name in library.names]
        names["brand"] = [f" {brand}" for brand in library.brands]
        names["kind"] = [f" {kind}" for kind in library.kinds]
    return names


def make_tokenizer(library: PhotoLibrary | None, scenes: int = 6000) -> PreTrainedTokenizerFast:
    """The tokenizer, built from questions and answers of training pictures."""
    texts: list[str] = []
    stream = Stream(library, 0.3)
    for _ in range(scenes):
        for one in triples_of(stream.draw()):
            texts += [one.question, f" {one.answer}"]
    if library is not None:
        for word in (*library.names, *library.kinds, *library.brands):
            texts += [f" {word}"] * 20
    count = ["What is shown first?", "What comes after", "In which frame does the item change?"]
    count += ["Which image shows", "Which earlier image shows the same item as the last image?"]
    count += ["Read text line", "What is the amount for", "What is the date?", "What is the total?"]
    count += ["Answer the question using a single word or phrase.", "Describe the picture."]
    return build_tokenizer(texts + count * 20)


def draw(stream: Stream, count: int, reading: float) -> list[Scene | Mosaic]:
    """`count` pictures; scenes without text are skipped with probability `reading`."""
    pictures: list[Scene | Mosaic] = []
    while len(pictures) < count:
        picture = stream.draw()
        silent = isinstance(picture, Scene) and not picture.prints
        if not silent or stream.rng.random() >= reading:
            pictures.append(picture)
    return pictures


def asked(
    picture: Scene | Mosaic, rng: np.random.Generator, args: argparse.Namespace
) -> list[Asked]:
    """Questions on `picture`, sometimes its caption, without the types that `args` excludes."""
    triples = [
        t
        for t in triples_of(picture)
        if t.type not in args.without
        and not (t.question.startswith(tuple(args.solved)) and rng.random() < 0.75)
    ]
    caption = [caption_of(picture)] if rng.random() < args.captions else []
    return caption + choose(triples, args.questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=35)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--keep", type=int, default=96, help="vision tokens per picture")
    parser.add_argument("--questions", type=int, default=9, help="maximum questions per picture")
    parser.add_argument("--captions", type=float, default=0.5, help="fraction with a caption")
    parser.add_argument(
        "--reading", type=float, default=0.0, help="probability of skipping scenes without text"
    )
    parser.add_argument(
        "--solved", nargs="*", default=[], help="beginnings of questions to ask less often"
    )
    parser.add_argument("--without", nargs="*", default=[], help="types of question to leave out")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--photo-share", type=float, default=0.2)
    parser.add_argument("--noise", type=float, default=0.15, help="noise on vision tokens")
    parser.add_argument("--evidence", type=float, default=0.3, help="weight of the evidence loss")
    parser.add_argument("--start", type=Path, default=None, help="lm.pt to continue from")
    parser.add_argument("--out", type=Path, default=RUNS / "lm.pt")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    library = PhotoLibrary(RUNS) if data_folder() else None
    folder = RUNS / "processor"
    if not folder.is_dir():
        build_processor(make_tokenizer(library)).save_pretrained(folder)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    packer = Packer(tokenizer)
    model = build_model(len(tokenizer))
    symbols = Symbols(model.config.text_config.hidden_size)
    start_weights(model, symbols, tokenizer, library)
    symbols = symbols.to(torch.bfloat16)
    language = model.model.language_model.to(torch.bfloat16)
    head = model.lm_head.to(torch.bfloat16)
    first = 0
    if args.start is not None:
        earlier, first = torch.load(args.start, weights_only=False), 4 * 10**6
        language.load_state_dict(earlier["language"])
        head.load_state_dict(earlier["head"])
        symbols.load_state_dict(earlier["symbols"])
    optimizer = MasterOptimizer(with_muon([language, head, symbols]), average=0.998)
    grids = (0.25, 0.1, 0.6, 0.05)
    stream = Stream(library, args.photo_share, worker=1, workers=2, start=first, grids=grids)
    used, step, seen = 0.0, 0, 0
    if args.out.is_file():
        state = torch.load(args.out, weights_only=False)
        optimizer.load_state_dict(state["optimizer"])
        used, step, stream.next = state["seconds"], state["step"], state["next"]

    budget, since, saved = args.minutes * 60, time.monotonic(), time.monotonic()
    scores: dict[str, list[bool]] = defaultdict(list)
    losses: list[float] = []
    aside: list[float] = []
    while used + time.monotonic() - since < budget:
        progress = (used + time.monotonic() - since) / budget
        pictures = draw(stream, args.batch, args.reading)
        labels = [p.labels for p in pictures]
        kept = [keep_patches(lab, args.keep, stream.rng) for lab in labels]
        pack = packer.pack(
            [(k, asked(p, stream.rng, args)) for k, p in zip(kept, pictures, strict=True)]
        )
        chosen = np.stack([flat(lab)[:, k] for lab, k in zip(labels, kept, strict=True)])
        vision = symbols(torch.from_numpy(chosen).long(), pack.vision)
        vision = vision + args.noise * torch.randn_like(vision)
        x = embed(pack, language.embed_tokens.weight, vision)
        states, looks = language_forward(language, x, pack.positions, pack.mask, pack.where)
        loss, right = answer_loss(pack, states, head.weight)
        astray = evidence_loss(pack, looks)
        (loss + args.evidence * astray).backward()
        aside.append(float(astray.detach()))
        optimizer.step(rate_at(progress, args.rate))
        step, seen = step + 1, seen + len(pictures)
        losses.append(float(loss.detach()))
        for kind, ok in zip(pack.types, right, strict=True):
            scores[kind].append(ok)
        if step % 100 == 0:
            line = " ".join(f"{k}={100 * np.mean(v):.0f}" for k, v in sorted(scores.items()))
            seconds = used + time.monotonic() - since
            tokens = pack.ids.shape[1]
            print(
                f"step={step} s={seconds:.0f} n={seen} L={tokens} "
                f"loss={np.mean(losses):.3f} look={np.mean(aside):.3f} {line}",
                flush=True,
            )
            aside.clear()
            losses.clear()
            scores.clear()
        over = used + time.monotonic() - since >= budget
        if time.monotonic() - saved > 180 or over:
            saved = time.monotonic()
            optimizer.swap_average()
            weights = {
                part: {k: v.clone() for k, v in module.state_dict().items()}
                for part, module in (("language", language), ("head", head), ("symbols", symbols))
            }
            optimizer.restore()
            state = {"optimizer": optimizer.state_dict(), "step": step, "next": stream.next}
            save({**weights, **state, "seconds": used + saved - since}, args.out)


if __name__ == "__main__":
    main()
