r"""Perplexity of an n-gram model, to put beside that of a model trained by train_clm.py.

Interpolated modified Kneser-Ney (Chen and Goodman 1999, An empirical study of smoothing techniques for language
modeling, Computer Speech and Language 13) over the same text, splits, tokens and count of words as train_clm.py:

    python recipes/baseline_ngram.py --dataset_name builtin:sotu --order 3 4 5
    python recipes/baseline_ngram.py --dataset_name builtin:sotu --tokenizer_name out/tokenizer

The second takes the tokenizer that a run of train_clm.py has left in its output folder. Of several orders, the one with
the least perplexity in validation is chosen.

What is the same: each document ends with the end mark, which stands in front of the first one too, and every token
after that is predicted once, among all entries of the tokenizer. The context of a token runs on through the documents,
as in packed blocks. What is not: here no block ends, so the first tokens of a block of train_clm.py, which have less
before them there, have all of it here; and the last tokens of the training text, too few for a block, are counted here.

Figures by word can be compared between tokenizers, except where unknown words are all one token; its share is printed.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from hf_gradguard.training import arguments
from hf_gradguard.training.arguments import DataArguments
from hf_gradguard.training.blocks import Blocks, Layout, tokenize
from hf_gradguard.training.text import Text, load_text
from hf_gradguard.training.tokenizer import make_tokenizer
from hf_gradguard.training.trainer import before_training

FALLBACK = (0.5, 1.0, 1.5)
"""D1, D2 and D3+ where a small text, or one of few different tokens, gives no estimate; those of KenLM in that case."""


@dataclass
class NgramArguments:
    """What only this recipe has."""

    tokenizer_name: str = arguments.option(
        "Name on the hub, folder, or one to train on the text: bpe, wordpiece, bytes or words, with options as in "
        "bpe:vocab_size=8000.",
        "bpe",
    )
    order: list[int] = field(
        default_factory=lambda: [5],
        metadata={"help": "Tokens of the longest n-grams; of several the best in validation."},
    )

    def __post_init__(self) -> None:
        if min(self.order) < 1:
            raise ValueError(f"--order {min(self.order)} must be at least 1")


@dataclass(frozen=True)
class Part:
    """The tokens of a split, [tokens], the first of which is context only, and how many words they are."""

    tokens: NDArray[np.int64]
    words: int


@dataclass(frozen=True)
class Grams:
    """The different n-grams of one length in a text, each known by its number in these arrays.

    Args:
        keys: ascending; the number of the n-gram without its last token, times the size of the vocabulary, plus that
            token.
        counts: how often each occurs.
        suffixes: the number of the n-gram without its first token.
    """

    keys: NDArray[np.int64]
    counts: NDArray[np.int64]
    suffixes: NDArray[np.int64]


@dataclass(frozen=True)
class Level:
    """What n-grams of one length add to a probability.

    Args:
        keys: of `Grams`.
        shares: of each n-gram, the part of its context's probability that is its own; at the end a 0, for none.
        weights: of each context, the weight of the probability given one token less; at the end a 1, for none.
    """

    keys: NDArray[np.int64]
    shares: NDArray[np.float64]
    weights: NDArray[np.float64]


def count(tokens: NDArray[np.int64], vocab_size: int, longest: int) -> list[Grams]:
    """The n-grams of one token, of two, and so on to the longest.

    Raises:
        ValueError: the text is shorter than that.
    """
    if len(tokens) < longest:
        raise ValueError(f"the training text has {len(tokens):,} tokens, too few for --order {longest}")
    found = []
    shorter = np.zeros(len(tokens) + 1, dtype=np.int64)  # by their last position; the empty one before the text too
    for length in range(1, longest + 1):
        keys, first, numbers, counts = np.unique(
            shorter[:-1] * vocab_size + tokens[length - 1 :],
            return_index=True,
            return_inverse=True,
            return_counts=True,
        )
        found.append(Grams(keys, counts, shorter[1:][first]))
        shorter = numbers
    return found


def discounts(counts: NDArray[np.int64]) -> tuple[float, ...]:
    """D1, D2 and D3+ of n-grams with these counts (Chen and Goodman 1998, report TR-10-98, equation 26)."""
    n1, n2, n3, n4 = (float(np.count_nonzero(counts == value)) for value in (1, 2, 3, 4))
    if not min(n1, n2, n3, n4):
        return FALLBACK
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return found if min(found) > 0 else FALLBACK


class KneserNey:
    """Interpolated modified Kneser-Ney.

    The longest n-grams have their counts; a shorter one counts the different tokens that stand before it. One token
    without context is interpolated with the same probability for each entry of the vocabulary.

    Args:
        grams: of `count`, as many as the order.
        vocab_size: entries of the vocabulary.
        fixed: D1, D2 and D3+ for each length, in place of those that are estimated.
    """

    def __init__(
        self, grams: Sequence[Grams], vocab_size: int, fixed: Sequence[tuple[float, ...]] | None = None
    ) -> None:
        self.vocab_size = vocab_size
        self.discounts: list[tuple[float, ...]] = []
        """D1, D2 and D3+ of each length."""
        self._levels: list[Level] = []
        for index, own in enumerate(grams):
            counts = own.counts
            if index + 1 < len(grams):
                counts = np.bincount(grams[index + 1].suffixes, minlength=len(own.keys))
            self.discounts.append(discounts(counts) if fixed is None else fixed[index])
            contexts = len(grams[index - 1].keys) if index else 1
            self._levels.append(self._level(own.keys, counts, contexts, self.discounts[-1]))

    def probabilities(self, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of each token but the first, given those before it: [tokens − 1]."""
        values = np.full(len(tokens), 1 / self.vocab_size)
        numbers = np.zeros(len(tokens) + 1, dtype=np.int64)  # of n-grams by their last position; −1 for an unknown one
        for index, level in enumerate(self._levels):
            contexts = numbers[:-1]
            numbers = _find(level.keys, contexts * self.vocab_size + tokens[index:])
            values[index:] = level.shares[numbers] + level.weights[contexts] * values[index:]
        return values[1:]

    def _level(
        self, keys: NDArray[np.int64], counts: NDArray[np.int64], contexts: int, given: tuple[float, ...]
    ) -> Level:
        context = keys // self.vocab_size
        discount = np.array([0.0, *given])[np.minimum(counts, 3)]
        total = np.bincount(context, counts, minlength=contexts)
        is_known = total > 0
        total = np.where(is_known, total, 1)
        weights = np.where(is_known, np.bincount(context, discount, minlength=contexts) / total, 1)
        return Level(keys, np.append((counts - discount) / total[context], 0), np.append(weights, 1))


def read(rows: Text, tokenizer: PreTrainedTokenizerBase, workers: int | None = None) -> Part:
    """A split as train_clm.py has it: all of its blocks in one."""
    assert isinstance(rows, Dataset)
    end = tokenizer.eos_token_id
    found = tokenize(rows, tokenizer, end, workers)
    size = Blocks(found, Layout(2), first=end).tokens
    blocks = Blocks(found, Layout(size, is_target=False), first=end)
    if size < 2 or blocks.words is None:
        raise ValueError("a split is empty")
    return Part(blocks[0]["input_ids"].numpy(), blocks.words)


def perplexities(model: KneserNey, part: Part) -> dict[str, float]:
    """`perplexity`, by token, and `perplexity_per_word`, as train_clm.py has them."""
    nll = -math.fsum(np.log(model.probabilities(part.tokens)))
    return {
        "perplexity": math.exp(nll / (len(part.tokens) - 1)),
        "perplexity_per_word": math.exp(nll / part.words),
    }


def compare(parts: Mapping[str, Part], vocab_size: int, orders: Sequence[int]) -> dict[str, float]:
    """Prints a table of the orders.

    Returns:
        The values of the one that is best in validation, with the prefix `eval_` or `test_`, and `order`.
    """
    grams = count(parts["train"].tokens, vocab_size, max(orders))
    held_out = {"eval": "validation", **({"test": "test"} if "test" in parts else {})}
    print("| order | n-grams |" + "".join(f" {split} by token | by word |" for split in held_out.values()))
    print("|---|---|" + "---|---|" * len(held_out))
    rows: list[dict[str, float]] = []
    for order in sorted(set(orders)):
        model = KneserNey(grams[:order], vocab_size)
        row: dict[str, float] = {"order": order}
        for prefix, split in held_out.items():
            row.update({f"{prefix}_{name}": value for name, value in perplexities(model, parts[split]).items()})
        rows.append(row)
        size = sum(len(own.keys) for own in grams[:order])
        values = "".join(f" {value:.2f} |" for name, value in row.items() if name != "order")
        print(f"| {order} | {size:,} |{values}", flush=True)
    return min(rows, key=lambda row: row["eval_perplexity"])


def _find(keys: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, places, -1)


def _parse(words: Sequence[str] | None) -> tuple[DataArguments, NgramArguments]:
    data, own = arguments.parse_kinds([DataArguments, NgramArguments], words, __doc__)
    if data.streaming:
        raise ValueError("--streaming: an n-gram model counts all of the text at once; leave it out")
    for name in ("max_train_samples", "max_eval_samples"):
        if getattr(data, name) is not None:
            raise ValueError(f"--{name} counts blocks, and here there are none; leave it out")
    return data, own


def main(words: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the recipe; returns the perplexities of the order that is best in validation."""
    started = time.monotonic()
    with before_training():
        data, own = _parse(words)
        text = load_text(data)
        tokenizer = make_tokenizer(own.tokenizer_name, text["train"], with_marks=False)
        parts = {split: read(rows, tokenizer, data.preprocessing_num_workers) for split, rows in text.items()}
        for split, part in parts.items():
            unknown = np.count_nonzero(part.tokens == tokenizer.unk_token_id) / len(part.tokens)
            note = f", {unknown:.2%} of them {tokenizer.unk_token}" if unknown else ""
            print(f"{split}: {part.words:,} words and ends, {len(part.tokens) - 1:,} tokens{note}")
        best = compare(parts, len(tokenizer), own.order)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"Best in validation: order {best['order']}. {time.monotonic() - started:.0f} s, at most {memory:.1f} GiB.")
    return best


if __name__ == "__main__":
    main()
