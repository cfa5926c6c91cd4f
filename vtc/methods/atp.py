# SPDX-License-Identifier: Apache-2.0
"""ATP-LLaVA: a small trained network predicts thresholds for every image and prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vtc.core import LayerState, Method, Positions, Rows, Selection
from vtc.core.errors import ArgumentError
from vtc.core.settings import (
    check_choice,
    check_layers,
    check_number,
    check_positions,
    scale_layers,
)
from vtc.ops import top_k

Normalise = Literal["minmax", "log", "rank"]
NORMALISE: tuple[Normalise, ...] = ("minmax", "log", "rank")

_QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
STATISTICS = 2 * (4 + len(_QUANTILES)) + 2 + len(_QUANTILES) + 1
"""Number of values that `statistics` returns."""

_BITS = 12
"""`grid_rate` distinguishes rows and columns below 4096, exactly in fp32."""

_CONFIG, _TENSORS = "config.json", "model.safetensors"


# ---- scores of one image at one layer; training and inference share them ------------------------
def image_scores(
    rows: Tensor, queries: Tensor, text: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention that the tokens of one image receive from each other (eq. 3) and from the text
    (eq. 4).

    Args:
        rows: (r, s) attention probabilities, softmax over all keys, averaged over heads.
        queries: indices of rows that are vision tokens of this image.
        text: indices of rows that are text after this image.
        keys: (n,) the image's columns.

    Returns:
        own and cross, each (n,) fp32: means over the queries. Cross is 0 without text.
    """
    columns = rows.float()[:, keys]
    own = columns[queries].mean(0)
    return own, columns[text].mean(0) if text.shape[0] else torch.zeros_like(own)


def redundant_score(own: Tensor, cross: Tensor, held: Tensor, normalise: Normalise) -> Tensor:
    """(n,) mean of both scores, normalised to [0, 1] within the image.

    Probabilities are about 1 / s, thresholds are in (0, 1): without normalisation training starts
    by dropping every token, and no gradient brings it back. "minmax" is linear, "log" the same on
    the logarithm (attention is so skewed that most tokens otherwise lie below 0.05), "rank" the
    fraction of held tokens with a lower score. If all scores are equal, all become 0.

    Args:
        own, cross: (n,) scores from `image_scores`.
        held: (n,) bool, tokens that set the range; others are clamped to it.
        normalise: "minmax", "log" or "rank".
    """
    score = (own + cross) / 2
    inside = score[held]
    if normalise == "rank":
        ordered = inside.sort().values
        below = torch.searchsorted(ordered, score.contiguous(), right=False)
        return (below / max(inside.shape[0] - 1, 1)).clamp_max(1.0)
    if normalise == "log":
        score, inside = score.clamp_min(1e-12).log(), inside.clamp_min(1e-12).log()
    low, high = inside.min(), inside.max()
    spread = high - low
    return torch.where(spread > 0, (score - low) / spread.clamp_min(1e-30), 0.0).clamp(0.0, 1.0)


def grid_rate(grid: Tensor) -> Tensor:
    """(n,) the smallest sampling rate, in [0, 1), at which a token is on the grid.

    The k-th bits of row and column are the k-th digit of the rate in base 4. Rates up to
    1/4, 1/16, ... take every second, fourth, ... row and column, starting with the first, and
    sparser grids are subsets of denser ones. Only a token's own place counts, not the size of the
    grid or which tokens are held. All frames are sampled alike.

    Args:
        grid: (n, 3) integers (frame, row, column).
    """
    bit = torch.arange(_BITS, device=grid.device)
    row, column = ((grid[:, axis, None] >> bit) & 1 for axis in (1, 2))
    # Diagonal neighbours come second, so that two of four places are as far apart as possible.
    digit = 2 * (row ^ column) + row
    return (digit * 4 ** (_BITS - 1 - bit)).sum(1).float() / 4**_BITS


def spatial_score(grid: Tensor, sampling: float) -> Tensor:
    """(n,) 1 - sampling * rate (eq. 5): above theta_s if the rate is below
    (1 - theta_s) / sampling.

    Args:
        grid: (n, 3) integers (frame, row, column).
        sampling: lambda_sample.
    """
    return 1 - sampling * grid_rate(grid)


def statistics(own: Tensor, cross: Tensor, redundant: Tensor, original: int) -> Tensor:
    """(STATISTICS,) the inputs of the heads, independent of the tokens' order and number.

    For each raw score times the number of tokens, on a logarithmic scale: mean, deviation, maximum,
    quantiles, and the effective fraction of tokens that it is spread over. For the normalised
    score: mean, deviation and quantiles. Last, the logarithm of the fraction of tokens left.

    Args:
        own, cross, redundant: (n,) scores of the tokens still held.
        original: tokens of the image before any compression.
    """
    n = own.shape[0]
    q = torch.tensor(_QUANTILES, device=own.device)
    found: list[Tensor] = []
    for score in (own.float(), cross.float()):
        x = n * score
        spread = x.mean().square() / x.square().mean().clamp_min(1e-12)
        raw = [x.mean(), x.std(unbiased=False), x.max(), spread]
        found.append((torch.cat([torch.stack(raw), x.quantile(q)]) + 1e-4).log())
    x = redundant.float()
    found += [torch.stack([x.mean(), x.std(unbiased=False)]), x.quantile(q)]
    found.append(x.new_tensor([n / max(original, 1)]).log())
    return torch.cat(found)


def soft_mask(
    redundant: Tensor, spatial: Tensor, theta_r: Tensor, theta_s: Tensor, temperature: float
) -> Tensor:
    """(n,) in (0, 1): the larger of two sharpened sigmoids (eqs. 9-11).

    Args:
        redundant, spatial: (n,) scores.
        theta_r, theta_s: their thresholds.
        temperature: factor of the differences.
    """
    by_score = ((redundant - theta_r) * temperature).sigmoid()
    by_place = ((spatial - theta_s) * temperature).sigmoid()
    return torch.maximum(by_score, by_place)


def hard_mask(
    redundant: Tensor,
    spatial: Tensor,
    theta_r: Tensor | float,
    theta_s: Tensor | float,
) -> Tensor:
    """(n,) bool, whether a token is strictly above either threshold; if none is, the token with the
    highest `redundant` score.

    Args:
        redundant, spatial: (n,) scores.
        theta_r, theta_s: their thresholds.
    """
    keep = (redundant > theta_r) | (spatial > theta_s)
    best = torch.zeros_like(keep)
    best[top_k(redundant, 1)] = True
    return keep | (best & ~keep.any())


class ATPHeads(nn.Module):
    """The trained part: a hidden layer and two heads for each cut (eqs. 6-8).

    The paper does not give the input width; `statistics` of the scores allow any number of
    tokens. Buffers that training sets once standardise them.

    Args:
        cuts: number of cuts.
        width: width of the hidden layer.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, cuts: int, width: int = 64) -> None:
        super().__init__()
        self.cuts, self.width = cuts, width
        self.register_buffer("centre", torch.zeros(cuts, STATISTICS))
        self.register_buffer("spread", torch.ones(cuts, STATISTICS))
        self.hidden = nn.ModuleList(nn.Linear(STATISTICS, width) for _ in range(cuts))
        self.head_r = nn.ModuleList(nn.Linear(width, 1) for _ in range(cuts))
        self.head_s = nn.ModuleList(nn.Linear(width, 1) for _ in range(cuts))

    def forward(self, cut: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """theta_r and theta_s in (0, 1), (...,), from `statistics` (..., STATISTICS)."""
        x = (numbers - self.centre[cut]) / self.spread[cut]
        # Inputs unlike those of training must not drive the thresholds out of range.
        z = self.hidden[cut](x.clamp(-5, 5)).relu()
        theta_r, theta_s = self.head_r[cut](z), self.head_s[cut](z)
        return theta_r.sigmoid().squeeze(-1), theta_s.sigmoid().squeeze(-1)


def save_heads(heads: ATPHeads, folder: Path | str, settings: Mapping[str, Any]) -> Path:
    """Write `config.json` and `model.safetensors`, each completely or not at all.

    Args:
        heads: the trained heads.
        folder: where to write; created if missing.
        settings: "normalise", "sampling" and "layers" that the heads were trained with.

    Returns:
        The folder.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    config = {"method": "atp", "cuts": heads.cuts, "width": heads.width, **settings}
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in heads.state_dict().items()
    }
    save_file(tensors, path / f"{_TENSORS}.tmp")
    (path / f"{_TENSORS}.tmp").chmod(0o644)  # safetensors writes for the owner alone
    (path / f"{_CONFIG}.tmp").write_text(json.dumps(config, indent=2) + "\n")
    for name in (_TENSORS, _CONFIG):
        (path / f"{name}.tmp").replace(path / name)
    return path


def _files(weights: str) -> tuple[Path, Path]:
    """The paths of the tensors and the config that `weights` refers to."""
    path = Path(weights).expanduser()
    tensors = path / _TENSORS if path.is_dir() else path
    config = tensors.with_name(_CONFIG)
    for file in (tensors, config):
        if not file.is_file():
            raise ArgumentError(
                "weights",
                f"expected a folder with {_CONFIG} and {_TENSORS}, or the path of the "
                f"latter, got {weights!r}, where {file.name} is missing",
            )
    return tensors, config


@lru_cache(maxsize=16)
def _read_config(tensors: Path, config: Path, stamp: tuple[int, int]) -> dict[str, Any]:
    """The checked config; `stamp` invalidates the cache when a file changes."""
    try:
        found = json.loads(config.read_text())
        heads = ATPHeads(int(found["cuts"]), int(found["width"]))
        check_choice("normalise", found["normalise"], NORMALISE)
        float(found["sampling"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ArgumentError(
            "weights",
            f"{config.name} next to {tensors.name} is not a config of ATP heads: {error!r}",
        ) from None
    wanted = {name: list(tensor.shape) for name, tensor in heads.state_dict().items()}
    try:
        with safe_open(tensors, framework="pt") as file:
            got = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArgumentError(
            "weights", f"{tensors.name} is not a safetensors file: {error}"
        ) from None
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            raise ArgumentError(
                "weights",
                f"tensor {name!r} of {tensors.name} must be {wanted.get(name, 'absent')} "
                f"by its config, got {got.get(name, 'none')}",
            )
    return cast(dict[str, Any], found)


@lru_cache(maxsize=16)
def _read_heads(tensors: Path, cuts: int, width: int, device: str, stamp: int) -> ATPHeads:
    heads = ATPHeads(cuts, width)
    heads.load_state_dict(load_file(tensors))
    return heads.to(device).float().eval().requires_grad_(False)


def load_heads(weights: str, device: torch.device | str = "cpu") -> tuple[ATPHeads, dict[str, Any]]:
    """The heads in a folder, shared between calls (do not modify), and their config.

    Args:
        weights: folder with `config.json` and `model.safetensors`, or the path of the latter.
        device: where the heads go.

    Raises:
        ArgumentError: missing or malformed files.
    """
    tensors, config = _files(weights)
    stamp = tensors.stat().st_mtime_ns
    found = _read_config(tensors, config, (stamp, config.stat().st_mtime_ns))
    heads = _read_heads(tensors, int(found["cuts"]), int(found["width"]), str(device), stamp)
    return heads, found


# ---- the method ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class ATP(Method):
    """Keep tokens with high attention, or on a sparse grid, by learned thresholds.

    Before each cut, S_self is the attention that a vision token receives from the image's remaining
    tokens in the layer that just ran, mean over queries and heads (eq. 3); S_cross is what it
    receives from the prompt's text after the image (eq. 4). Both are probabilities over all keys.
    Their mean is normalised to [0, 1] within the image. A token is kept if this is above theta_r or
    if S_spatial = 1 - sampling * rate is above theta_s (eq. 5), where rate is the smallest at which
    nested uniform grids contain it: theta_s selects a grid of (1 - theta_s) / sampling of all
    tokens. Small trained heads compute both thresholds from statistics of the scores (eqs. 6-8),
    for each image and cut. An image keeps at least one token.

    Cuts come after layers 4, 14 and 24 of 32, here counted from 1 (the paper does not
    say), so before 0-based layers 4, 14 and 24; in other depths at 12.5, 43.75 and 75 %.

    There is no official code. Choices that the paper leaves open, or on which re-implementations
    differ: probabilities and the query axis in S_self, statistics as the heads' input,
    normalisation, nested grids, and at least one token. Heads are specific to the model they were
    trained on; `vtc.training.atp` trains them. They also set the budget: there is no `keep`.

    Args:
        weights: folder with `config.json` and `model.safetensors`, or the path of the latter.
        theta_r: a fixed threshold in [0, 1] instead of trained heads; needs `theta_s`.
        theta_s: likewise; 1 keeps no token for its place, 0 a third of the grid.
        layers: 0-based layers before which tokens are dropped, at least 1; `None` for those of the
            weights if the model has the same depth, else for the published fractions.
        normalise: "minmax", "log" or "rank"; `None` for that of the weights, else "minmax".
        sampling: the lambda_sample of eq. 5; `None` for that of the weights, else 3.
        positions: "original" (as published) or "contiguous".

    Raises:
        ArgumentError: neither heads nor both thresholds, a value out of range, malformed weights,
            or settings that contradict them.
        ArgumentTypeError: a setting of the wrong type.
    """

    name = "atp"
    title = "ATP-LLaVA: adaptive token pruning"
    reads_places = True
    paper = "arXiv:2412.00447"
    year = 2025
    trained = True

    weights: str | None = None
    theta_r: float | None = None
    theta_s: float | None = None
    layers: tuple[int, ...] | None = None
    normalise: Normalise | None = None
    sampling: float | None = None
    positions: Positions = "original"

    @classmethod
    def example(cls) -> Method:
        """With fixed thresholds, as heads are trained for a model."""
        return cls(theta_r=0.5, theta_s=0.5)

    def __post_init__(self) -> None:
        fixed = (self.theta_r, self.theta_s)
        if self.weights is None and fixed == (None, None):
            raise ArgumentError(
                "weights",
                "atp needs trained heads, got none; give ATP.from_pretrained(folder), "
                "weights=folder, or fixed thresholds theta_r and theta_s",
            )
        if self.weights is not None and fixed != (None, None):
            given = "theta_s" if self.theta_r is None else "theta_r"
            raise ArgumentError(given, "trained heads set it; give both thresholds or weights")
        if self.weights is None:
            check_number("theta_r", self.theta_r, "[0, 1]")
            check_number("theta_s", self.theta_s, "[0, 1]")
        if self.sampling is not None:
            check_number("sampling", self.sampling, "(0, inf)")
        object.__setattr__(self, "layers", check_layers("layers", self.layers, lowest=1))
        if self.normalise is not None:
            check_choice("normalise", self.normalise, NORMALISE)
        check_positions(self.positions)
        if self.weights is None:
            return
        if not isinstance(self.weights, str):
            object.__setattr__(self, "weights", str(self.weights))
        config = load_heads(self.weights)[1]
        for name in ("normalise", "sampling"):
            value = getattr(self, name)
            if value is not None and value != config[name]:
                raise ArgumentError(
                    name, f"the heads were trained with {config[name]!r}, got {value!r}"
                )
        if self.layers is not None and len(self.layers) != config["cuts"]:
            raise ArgumentError(
                "layers", f"the heads are for {config['cuts']} cuts, got {len(self.layers)}"
            )

    @classmethod
    def from_pretrained(cls, folder: str | Path, **settings: Any) -> ATP:
        """The method with the heads that `vtc.training.atp.train` wrote to `folder`.

        Raises:
            ArgumentError: missing or malformed files, or settings that contradict them.
        """
        return cls(weights=str(folder), **settings)

    def _setting(self, name: str) -> Any:
        value = getattr(self, name)
        if value is None and self.weights is not None:
            return load_heads(self.weights)[1][name]
        defaults = {"normalise": "minmax", "sampling": 3.0}
        return defaults[name] if value is None else value

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        """By default after 12.5, 43.75 and 75 % of the layers, rounded half up.

        Raises:
            ArgumentError: layers that do not ascend, or that the model does not have.
        """
        given = self.layers
        if given is None and self.weights is not None:
            config = load_heads(self.weights)[1]
            if config.get("num_layers") == num_layers and config.get("layers") is not None:
                given = tuple(config["layers"])
        return atp_layers(given, num_layers)

    def leaves(self, sizes: tuple[int, ...], held: int, cut: int, cuts: int) -> None:
        """`None`: the thresholds decide for each image."""
        return None

    def taps(self, num_layers: int) -> dict[int, Rows]:
        """Vision and text rows of the layer before each cut."""
        return {layer - 1: "vision_text" for layer in self.prune_layers(num_layers)}

    def prune(self, state: LayerState) -> Selection | None:
        """Ascending indices among the sample's vision tokens, or `None` if all stay."""
        cut = self.prune_layers(state.num_layers).index(state.layer)
        rows, vision = state.attention[state.layer - 1], state.vision
        place = ((state.image >= 0) | state.text).nonzero().squeeze(1)
        sampling, normalise = float(self._setting("sampling")), self._setting("normalise")
        image = state.image[vision]
        keep = torch.ones_like(image, dtype=torch.bool)
        for ordinal, original in enumerate(state.original):
            mine = (image == ordinal).nonzero().squeeze(1)
            if not mine.shape[0]:
                continue
            keys = vision[mine]
            queries = (state.image[place] == ordinal).nonzero().squeeze(1)
            text = (state.text[place] & (place > keys[-1])).nonzero().squeeze(1)
            own, cross = image_scores(rows, queries, text, keys)
            redundant = redundant_score(own, cross, torch.ones_like(own).bool(), normalise)
            spatial = spatial_score(state.grid[keys], sampling)
            theta_r: Tensor | float
            theta_s: Tensor | float
            if self.weights is not None:
                heads = load_heads(self.weights, own.device)[0]
                numbers = statistics(own, cross, redundant, original)
                theta_r, theta_s = heads(cut, numbers)
            else:
                assert self.theta_r is not None
                assert self.theta_s is not None
                theta_r, theta_s = self.theta_r, self.theta_s
            keep[mine] = hard_mask(redundant, spatial, theta_r, theta_s)
        if bool(keep.all()):
            return None
        return Selection(keep.nonzero().squeeze(1))


def atp_layers(given: tuple[int, ...] | None, num_layers: int) -> tuple[int, ...]:
    """The 0-based layers before which ATP drops tokens in a decoder of `num_layers`.

    Args:
        given: the user's layers, or `None` for the published fractions of the depth.
        num_layers: decoder layers.

    Raises:
        ArgumentError: layers that do not ascend, or that the decoder does not have.
    """
    return scale_layers(given, (0.125, 0.4375, 0.75), num_layers)
