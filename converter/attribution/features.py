"""What an explanation gives weights to: the features of a sample, and the sample without some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import InputError, TensorError
from onnx_lathe.runtime.extras import require
from onnx_lathe.runtime.samples import Array, Feeds, Samples
from onnx_lathe.runtime.tensors import TensorSpec

GRID = 6
"""An image is cut into this many rows and columns of patches at most."""
MOST_BLOCKS = 64
"""A wide vector is cut into this many blocks of neighbouring entries."""

Kind = Literal["image", "tokens", "entries"]
MeanOf = Callable[[tuple[int, ...]], NDArray[np.float64]]

_AT_REST = ("type", "position")
"""Integer inputs whose names hold one of these, and all masks, tell how to read another input; they stay."""
_STAND_INS = ("[MASK]", "<mask>", "[PAD]", "<pad>", "[UNK]", "<unk>")
"""Tokens that can stand where one is taken away, the best first."""


@dataclass(frozen=True)
class Tokens:
    """How token numbers are to be read.

    Attributes:
        baseline: The number that stands where a token is taken away.
        special: Numbers that are no part of the text.
        tokenizer: The tokenizer; None where numbers are all there is.
    """

    baseline: int = 0
    special: frozenset[int] = frozenset()
    tokenizer: Any = None

    def text(self, token: int) -> str:
        """Return a token as a reader knows it."""
        return str(token) if self.tokenizer is None else str(self.tokenizer.id_to_token(token))


@dataclass(frozen=True)
class Explained:
    """A sample to explain.

    Attributes:
        index: Its place among the samples.
        feeds: All inputs, each with a first axis of one.
        name: The input that is explained.
        kind: What its features are.
        groups: The feature that each entry belongs to, ``int64 [...]`` as the input; -1 for those that stay.
        baseline: What an entry becomes that is taken away; broadcasts to the input.
        labels: What each feature is called.
    """

    index: int
    feeds: Feeds
    name: str
    kind: Kind
    groups: NDArray[np.int64]
    baseline: Array
    labels: tuple[str, ...]

    @property
    def values(self) -> Array:
        """The input that is explained, without its first axis."""
        return self.feeds[self.name][0]

    def without(self, kept: NDArray[np.bool_]) -> Feeds:
        """Return a batch with some features taken away: ``bool [batch, features]`` says which are kept."""
        always = np.ones((len(kept), 1), dtype=bool)
        entries = np.concatenate([kept, always], axis=1)[:, self.groups]
        others = {name: np.repeat(array, len(kept), axis=0) for name, array in self.feeds.items() if name != self.name}
        return {**others, self.name: np.where(entries, self.values, self.baseline).astype(self.values.dtype)}


def read_tokens(tokenizer: Path | None, baseline: int | None) -> Tokens:
    """Return how to read token numbers.

    Args:
        tokenizer: A ``tokenizer.json``, or a folder with one.
        baseline: What stands where a token is taken away; None for the tokenizer's mask (or padding), or 0.

    Raises:
        DependencyError: The package ``tokenizers`` is not installed.
        InputError: There is no such tokenizer.
    """
    if tokenizer is None:
        return Tokens(baseline or 0)
    require("tokenizers", extra="zoo")
    from tokenizers import Tokenizer

    path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if not path.is_file():
        raise InputError(
            str(path), got="no such file", expected="a tokenizer.json of Hugging Face", mend="Check the path."
        )
    try:
        loaded = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises nothing more particular
        raise InputError(
            str(path),
            got=f"a tokenizer that cannot be read ({error})",
            expected="a tokenizer.json of Hugging Face",
            mend="Save the tokenizer again.",
        ) from error
    added = loaded.get_added_tokens_decoder()
    known = [number for token in _STAND_INS if (number := loaded.token_to_id(token)) is not None]
    stand_in = baseline if baseline is not None else next(iter(known), 0)
    return Tokens(stand_in, frozenset(number for number, token in added.items() if token.special), loaded)


def choose_input(specs: Sequence[TensorSpec], named: str | None) -> TensorSpec:
    """Return the input to explain: the one named, or the only one that is no mask, token type or position.

    Raises:
        TensorError: There is no input of that name, or it holds no numbers.
        InputError: Several could be explained and none is named.
    """
    if named is not None:
        tensors.check_names("input", [named], [spec.name for spec in specs])
        chosen = [spec for spec in specs if spec.name == named]
    else:
        chosen = [spec for spec in specs if not _at_rest(spec)]
    if len(chosen) != 1:
        raise InputError(
            "--input",
            got=f"no name, and {len(chosen)} inputs that could be explained: {', '.join(s.name for s in chosen)}",
            expected=f"one of {', '.join(spec.name for spec in specs)}",
            mend="Name the input to explain.",
        )
    if chosen[0].dtype.kind not in "fiub":
        raise TensorError(
            f"input {chosen[0].name!r}",
            got="text",
            expected="numbers, of which some can be replaced by a baseline",
            mend="Explain the part of the model behind its tokenizer, or name another input.",
        )
    return chosen[0]


def mean_sample(samples: Samples, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return the mean of the samples whose input ``name`` has this shape, without the first axis."""
    alike = [batch[name] for batch in samples.batches if batch[name].shape[1:] == shape]
    return np.sum([array.sum(axis=0, dtype=np.float64) for array in alike], axis=0) / sum(map(len, alike))


def explained(
    samples: Samples, index: int, specs: Sequence[TensorSpec], name: str, tokens: Tokens, mean_of: MeanOf
) -> Explained:
    """Return the sample at ``index`` with its features.

    Images (two axes, or three of which one holds channels) are cut into patches and have the samples' mean of each
    channel as their baseline. Integers along one axis are tokens: those that are attended to, are not special and are
    not the baseline; padding behind them is cut off where the model allows. Everything else is cut into blocks of
    entries with the samples' mean as their baseline.

    Args:
        samples: All samples.
        index: Which one.
        specs: The inputs of the model.
        name: The input to explain.
        tokens: How to read it where it holds tokens.
        mean_of: `mean_sample` of a shape, kept.
    """
    one = samples.take([index]).batches[0]
    feeds = {spec.name: one[spec.name] for spec in specs}
    values = feeds[name][0]
    if values.dtype.kind in "iu" and values.ndim == 1:
        fixed = next(isinstance(spec.shape[-1], int) for spec in specs if spec.name == name)
        return _tokens(index, feeds if fixed else _attended(feeds, name), name, tokens)
    mean = mean_of(values.shape)
    if values.ndim in (2, 3):
        return _patches(index, feeds, name, mean)
    groups = _cut(values.size, MOST_BLOCKS)
    blocks = [np.flatnonzero(groups == block) for block in np.unique(groups)]
    labels = tuple(f"{block[0]}" if len(block) == 1 else f"{block[0]} to {block[-1]}" for block in blocks)
    return Explained(index, feeds, name, "entries", groups.reshape(values.shape), _like(mean, values), labels)


def channel_axis(shape: Sequence[int]) -> int | None:
    """Return which axis of an image holds its channels; None for an image of two axes."""
    if len(shape) == 2:
        return None
    return 2 if shape[0] > 4 >= shape[2] else 0


def _at_rest(spec: TensorSpec) -> bool:
    name = spec.name.lower()
    return "mask" in name or (spec.dtype.kind in "iu" and any(word in name for word in _AT_REST))


def _masks(feeds: Feeds, name: str) -> list[Array]:
    """Return the attention masks of the tokens ``name``, ``[1, length]``."""
    return [array for other, array in feeds.items() if "mask" in other.lower() and array.shape == feeds[name].shape]


def _attended(feeds: Feeds, name: str) -> Feeds:
    """Cut the padding behind the last token that is attended to: it costs time and tells nothing."""
    length = feeds[name].shape[1]
    end = max((int(np.flatnonzero(mask[0]).max(initial=-1)) + 1 for mask in _masks(feeds, name)), default=length)
    whole = feeds[name].shape
    return {other: array[:, : max(1, end)] if array.shape == whole else array for other, array in feeds.items()}


def _tokens(index: int, feeds: Feeds, name: str, tokens: Tokens) -> Explained:
    values = feeds[name][0]
    present = (values != tokens.baseline) & ~np.isin(values, sorted(tokens.special))
    for mask in _masks(feeds, name):
        present &= mask[0] != 0
    groups = np.where(present, np.cumsum(present) - 1, -1)
    labels = tuple(tokens.text(int(token)) for token in values[present])
    return Explained(index, feeds, name, "tokens", groups, np.asarray(tokens.baseline), labels)


def _patches(index: int, feeds: Feeds, name: str, mean: NDArray[np.float64]) -> Explained:
    values = feeds[name][0]
    channels = channel_axis(values.shape)
    height, width = (size for axis, size in enumerate(values.shape) if axis != channels)
    groups = _cut(height, GRID)[:, None] * min(GRID, width) + _cut(width, GRID)
    mean = mean.mean(axis=tuple(axis for axis in range(mean.ndim) if axis != channels), keepdims=True)
    if channels is not None:
        groups = np.broadcast_to(np.expand_dims(groups, channels), values.shape)
    labels = tuple(f"row {patch // min(GRID, width)}, column {patch % min(GRID, width)}" for patch in np.unique(groups))
    return Explained(index, feeds, name, "image", groups, _like(mean, values), labels)


def _cut(size: int, most: int) -> NDArray[np.int64]:
    """Return which of at most ``most`` equal parts each of ``size`` places lies in."""
    places = np.arange(size, dtype=np.int64)
    return places * min(size, most) // max(1, size)


def _like(mean: Array, values: Array) -> Array:
    return (mean if values.dtype.kind == "f" else np.rint(mean)).astype(values.dtype)
