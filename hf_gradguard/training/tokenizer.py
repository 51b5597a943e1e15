"""Tokenizers: a model's own, one from the hub or a folder, or one that is trained on the text.

Each kind that can be trained is one class, registered by its name.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets import IterableDataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, TrainingArguments

from hf_gradguard.registry import Registry
from hf_gradguard.training import hub
from hf_gradguard.training.arguments import ModelArguments
from hf_gradguard.training.pretrained import model_folder
from hf_gradguard.training.text import TEXT, Text

trainable: Registry[TrainableTokenizer] = Registry("tokenizer", noun="kind")

FOLDER = "tokenizer"
"""In the output folder, the folder in which the tokenizer of a run lies from its beginning."""
STREAM_ROWS = 100_000
"""Rows of a stream that a tokenizer is trained on."""
BATCH = 1000


@dataclass(frozen=True)
class Marks:
    """The tokens with a meaning of their own.

    Args:
        begin: before a sentence, also that of the class.
        end: after a sentence or document.
    """

    pad: str = "<pad>"
    unknown: str = "<unk>"
    begin: str = "<s>"
    end: str = "</s>"
    mask: str = "<mask>"

    def tokens(self) -> list[str]:
        """All of them, in the order of their numbers."""
        return [self.pad, self.unknown, self.begin, self.end, self.mask]


BERT_MARKS = Marks(pad="[PAD]", unknown="[UNK]", begin="[CLS]", end="[SEP]", mask="[MASK]")


class TrainableTokenizer(ABC):
    """A kind of tokenizer."""

    marks: ClassVar[Marks] = Marks()
    finds_marks_in_words: ClassVar[bool] = True
    """Whether a mark that stands within a word of the text is read as one."""

    @abstractmethod
    def build(self, texts: Iterable[list[str]]) -> Tokenizer:
        """A tokenizer for texts, which come in batches, whose first entries are `self.marks.tokens()`."""

    def train(self, texts: Iterable[list[str]], *, with_marks: bool) -> PreTrainedTokenizerFast:
        """The same as a Transformers tokenizer, which saves and loads as any other. The same texts give the same one.

        Args:
            texts: batches of texts, which may be read more than once.
            with_marks: whether a text is put between marks of begin and end, as for BERT.
        """
        tokenizer, marks = self.build(texts), self.marks
        if with_marks:
            tokenizer.post_processor = TemplateProcessing(
                single=f"{marks.begin} $A {marks.end}",
                pair=f"{marks.begin} $A {marks.end} $B:1 {marks.end}:1",
                special_tokens=[(mark, tokenizer.token_to_id(mark)) for mark in (marks.begin, marks.end)],
            )
        return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=tokenizer,
            pad_token=marks.pad,
            unk_token=marks.unknown,
            bos_token=marks.begin,
            cls_token=marks.begin,
            eos_token=marks.end,
            sep_token=marks.end,
            mask_token=marks.mask,
            split_special_tokens=not self.finds_marks_in_words,
            clean_up_tokenization_spaces=False,
        )


@trainable.register("bpe")
@dataclass
class Bpe(TrainableTokenizer):
    """Byte pair encoding of bytes, as GPT-2's (Sennrich et al. 2016, arXiv:1508.07909)."""

    vocab_size: int = 8000

    def __post_init__(self) -> None:
        _at_least(self.vocab_size, 256 + len(self.marks.tokens()))

    def build(self, texts: Iterable[list[str]]) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=self.marks.tokens(),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer


@trainable.register("bytes")
@dataclass
class Bytes(TrainableTokenizer):
    """Each byte of UTF-8 is a token. Nothing is trained."""

    def build(self, texts: Iterable[list[str]]) -> Tokenizer:
        entries = [*self.marks.tokens(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = Tokenizer(models.BPE(vocab={entry: index for index, entry in enumerate(entries)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(_special(self.marks))
        return tokenizer


@trainable.register("wordpiece")
@dataclass
class WordPiece(TrainableTokenizer):
    """Pieces of words, as BERT's (Schuster and Nakajima 2012; Devlin et al. 2019, arXiv:1810.04805)."""

    vocab_size: int = 8000
    lowercase: bool = True

    marks: ClassVar[Marks] = BERT_MARKS

    def __post_init__(self) -> None:
        _at_least(self.vocab_size, 256 + len(self.marks.tokens()))

    def build(self, texts: Iterable[list[str]]) -> Tokenizer:
        # The library numbers letters within words as it meets them in a table of hashes, otherwise in each process, and
        # by these numbers chooses between pieces that are as frequent. So they are found first, and given in order.
        marks = self.marks.tokens()
        letters = sorted(self._learn(texts, marks, 0).keys() - marks)
        tokenizer = self._bare(self._learn(texts, [*marks, *letters], self.vocab_size))
        tokenizer.add_special_tokens(_special(self.marks))
        return tokenizer

    def _learn(self, texts: Iterable[list[str]], first: list[str], vocab_size: int) -> dict[str, int]:
        """The vocabulary of the most frequent pieces, behind those that come first."""
        tokenizer = self._bare({})
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=first,
            # Each character may become two entries, at the begin of a word and within; more would exceed the size.
            limit_alphabet=(self.vocab_size - len(self.marks.tokens())) // 2,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return dict(tokenizer.get_vocab())

    def _bare(self, vocabulary: dict[str, int]) -> Tokenizer:
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=self.marks.unknown))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=self.lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer


@trainable.register("words")
@dataclass
class Words(TrainableTokenizer):
    """What stands between blanks is a token, for corpora with a closed vocabulary. What is rarer than `min_frequency`,
    or beyond the `vocab_size` most frequent (none: all), is `<unk>`, which the text may hold itself."""

    vocab_size: int | None = None
    min_frequency: int = 1

    finds_marks_in_words: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.vocab_size is not None:
            _at_least(self.vocab_size, len(self.marks.tokens()) + 1)
        if self.min_frequency < 1:
            raise ValueError(f"min_frequency={self.min_frequency} must be at least 1")

    def build(self, texts: Iterable[list[str]]) -> Tokenizer:
        # Counted here: the library's trainer gives a mark that stands in the text a second number.
        counts = Counter(word for batch in texts for text in batch for word in text.split())
        marks = self.marks.tokens()
        words = [word for word, count in counts.items() if count >= self.min_frequency and word not in marks]
        entries = [*marks, *sorted(words, key=lambda word: (-counts[word], word))][: self.vocab_size]
        vocabulary = {entry: index for index, entry in enumerate(entries)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=self.marks.unknown))
        # Between all blanks of Unicode, as str.split does; four of them are none for a regular expression.
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\x1c-\x1f]+"), behavior="removed")
        return tokenizer


def run_tokenizer(
    args: TrainingArguments, options: ModelArguments, rows: Text, *, with_marks: bool, default: str
) -> PreTrainedTokenizerBase:
    """The tokenizer of a run: that with which it has begun, if it goes on, else the one that the options name. It is
    trained by one process and kept in the output folder, from where the others and later starts have it.

    Args:
        args: of the training.
        options: which model and tokenizer.
        rows: to train it on, with a column `text`.
        with_marks: whether one that is trained puts a text between marks, as for BERT.
        default: what to train for a new model, where no name is given.

    Raises:
        ValueError: an unknown name, or one whose files hold no vocabulary.
    """
    place = Path(str(args.output_dir), FOLDER)
    name = options.tokenizer_name or options.model_name_or_path or default
    with args.main_process_first(local=False, desc="tokenizer"):
        if not place.is_dir():
            tokenizer = make_tokenizer(name, rows, with_marks=with_marks, revision=options.revision)
            if not args.should_save:
                return tokenizer
            incomplete = place.with_name(f"incomplete-{FOLDER}")
            shutil.rmtree(incomplete, ignore_errors=True)
            tokenizer.save_pretrained(str(incomplete))
            incomplete.rename(place)
        # Read by all processes, at each start, and without the folder's name in it: what was tokenised with an equal
        # one is found in the cache.
        saved = AutoTokenizer.from_pretrained(str(place))
        saved.name_or_path = saved.init_kwargs["name_or_path"] = name
        return saved


def make_tokenizer(name: str, rows: Text, *, with_marks: bool, revision: str = "main") -> PreTrainedTokenizerBase:
    """The tokenizer of a name: on the hub, of a folder, or one of `trainable` with its options. Else as
    `run_tokenizer`."""
    if name.partition(":")[0] in trainable.names():
        return trainable.parse(name).train(_Batches(rows), with_marks=with_marks)
    path = model_folder(name)
    if not Path(path).is_dir():
        kinds = ", ".join(trainable.names())
        hub.prepare(path, "tokenizer", f"give a folder, or have one trained on the text: --tokenizer_name {kinds}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except Exception as error:  # of what is missing or malformed there are many kinds
        raise ValueError(f"no tokenizer can be loaded from {name!r}: {str(error).splitlines()[0]}") from None
    return _whole(tokenizer, name)


def _whole(tokenizer: Any, name: str) -> PreTrainedTokenizerBase:
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(
            f"the tokenizer of {name!r} has {len(tokenizer)} entries: its vocabulary files are missing or of a kind "
            "that is not read. Give another --tokenizer_name, or have one trained: bpe, wordpiece"
        )
    return tokenizer  # type: ignore[no-any-return]


class _Batches:
    """The texts of some rows, to be read as often as needed."""

    def __init__(self, rows: Text) -> None:
        self._rows = rows.take(STREAM_ROWS) if isinstance(rows, IterableDataset) else rows

    def __iter__(self) -> Iterator[list[str]]:
        for batch in self._rows.iter(batch_size=BATCH):
            yield [text for text in batch[TEXT] if text]


def _special(marks: Marks) -> list[AddedToken]:
    return [AddedToken(mark, special=True, normalized=False) for mark in marks.tokens()]


def _at_least(vocab_size: int, least: int) -> None:
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size} must be at least {least}")
