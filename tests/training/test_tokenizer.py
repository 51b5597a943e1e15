"""Tokenizers that are trained on the text say what they were given, and are the same after saving and loading."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_gradguard.training.arguments import ModelArguments, RecipeArguments
from hf_gradguard.training.blocks import tokenize
from hf_gradguard.training.tokenizer import FOLDER, make_tokenizer, run_tokenizer, trainable

ENGLISH = ["The quick brown fox jumps over the lazy dog.", "A fox, a dog; the quick and the lazy!"] * 20
KINDS = ["bpe:vocab_size=300", "bytes", "wordpiece:vocab_size=300", "words"]
MARKS = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
SPACES = [chr(code) for code in range(0x110000) if chr(code).isspace()]


def trained(spec: str, texts: list[str] | None = None, *, with_marks: bool = False) -> PreTrainedTokenizerBase:
    return trainable.parse(spec).train([ENGLISH if texts is None else texts], with_marks=with_marks)


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def any_text(generator: random.Random) -> str:
    """Some characters of all of Unicode."""
    ranges = [(0, 32), (32, 127), (127, 0x250), (0x2000, 0x2070), (0x250, 0xD800), (0xE000, 0x110000)]
    return "".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(generator.randrange(40)))


# Each kind


@pytest.mark.parametrize("spec", ["bytes", "bpe:vocab_size=300"])
@pytest.mark.parametrize("with_marks", [False, True])
def test_any_text_comes_back_as_it_was(spec: str, with_marks: bool) -> None:
    tokenizer, generator = trained(spec, with_marks=with_marks), random.Random(0)
    texts = [any_text(generator) for _ in range(500)] + [*SPACES, " a  b\n\t", "<s> a </s><mask>", "\x00"]
    for text in texts:
        found = ids(tokenizer, text)
        assert tokenizer.decode(found[with_marks : len(found) - with_marks]) == text


def test_with_bytes_each_byte_is_a_token_and_nothing_is_trained() -> None:
    tokenizer, other = trained("bytes"), trained("bytes", [])
    assert tokenizer.get_vocab() == other.get_vocab()
    assert len(tokenizer) == 256 + len(MARKS)
    generator = random.Random(1)
    for _ in range(200):
        text = any_text(generator)
        assert len(ids(tokenizer, text)) == len(text.encode())
    # Equal bytes are equal tokens, wherever they stand.
    number = {byte: ids(tokenizer, chr(byte))[0] for byte in range(128)}
    assert len(set(number.values())) == 128
    assert ids(tokenizer, "two words") == [number[byte] for byte in b"two words"]


@pytest.mark.parametrize(("spec", "size"), [("bpe:vocab_size=280", 280), ("wordpiece:vocab_size=280", 280)])
def test_a_vocabulary_is_no_larger_than_asked_for(spec: str, size: int) -> None:
    rare = ["".join(chr(0x4E00 + index) for index in range(start, start + 20)) for start in range(0, 900, 20)]
    many = [f"word{index} {index * 7919}" for index in range(500)]
    for texts in (many, rare, many + rare):
        tokenizer = trained(spec, texts)
        assert len(tokenizer) <= size
        assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert len(trained(spec, many)) == size


def test_wordpieces_are_those_of_bert() -> None:
    tokenizer = trained("wordpiece:vocab_size=300", with_marks=True)
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert ids(tokenizer, "THE Quíck fox") == ids(tokenizer, "the quick fox")
    assert ids(tokenizer, "the 漢 fox")[2] == tokenizer.unk_token_id
    assert tokenizer.decode(ids(tokenizer, "The lazy dog."), skip_special_tokens=True) == "the lazy dog."
    pieces = tokenizer.tokenize("jumpover")
    assert "".join(piece.removeprefix("##") for piece in pieces) == "jumpover"
    assert all(piece.startswith("##") for piece in pieces[1:])
    cased = trained("wordpiece:vocab_size=300,lowercase=false")
    assert ids(cased, "The") != ids(cased, "the")


def test_words_are_what_stands_between_blanks() -> None:
    words = ["It's", "a", "dog,", "it's", "a", "fox", "<unk>", "x<unk>y", "</s>z"]
    tokenizer = trained("words", [" ".join(words)])
    counts = Counter(word for word in words if word != "<unk>")
    vocabulary = [*MARKS, *sorted(counts, key=lambda word: (-counts[word], word))]
    assert tokenizer.get_vocab() == {word: index for index, word in enumerate(vocabulary)}
    for space in SPACES:
        text = space.join(words) + space
        assert text.split() == words
        assert ids(tokenizer, text) == [vocabulary.index(word) for word in words]
    generator = random.Random(0)
    for _ in range(300):
        text = any_text(generator)
        assert len(ids(tokenizer, text)) == len(text.split())
    assert tokenizer.decode(ids(tokenizer, "a fox it's")) == "a fox it's"


def test_a_word_that_is_unknown_or_written_as_unknown_has_one_number() -> None:
    text = "the <unk> cat <unk> sat"
    tokenizer = trained("words", [text])
    assert tokenizer.unk_token_id == 1
    assert ids(tokenizer, "<unk> the zebra") == [1, ids(tokenizer, "the")[0], 1]
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer))), "no number beyond the size"
    assert len(tokenizer) == len(MARKS) + 3
    assert ids(tokenizer, "the<unk>") == [1], "one word, which is not in the vocabulary"


@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        ("words", "abcdef"),
        ("words:min_frequency=2", "abcd"),
        ("words:vocab_size=7", "ab"),
        ("words:vocab_size=9,min_frequency=3", "ab"),
        ("words:vocab_size=1000", "abcdef"),
    ],
)
def test_rare_words_are_left_out_if_that_is_asked_for(spec: str, kept: str) -> None:
    tokenizer = trained(spec, ["a a a a b b b", "c c d d", "e f"])
    assert sorted(set(tokenizer.get_vocab()) - set(MARKS)) == list(kept)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("bpe:vocab_size=260", "vocab_size=260 must be at least 261"),
        ("wordpiece:vocab_size=0", "vocab_size=0 must be at least 261"),
        ("words:vocab_size=5", "vocab_size=5 must be at least 6"),
        ("words:min_frequency=0", "min_frequency=0 must be at least 1"),
        ("bpe:vocab_siz=500", "did you mean 'vocab_size'"),
        ("bpe:vocab_size=many", "must be of type int"),
        ("bytes:vocab_size=3", "takes no options"),
    ],
)
def test_options_that_do_not_fit_are_told(spec: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        make_tokenizer(spec, Dataset.from_dict({"text": ENGLISH}), with_marks=False)


@pytest.mark.parametrize("spec", KINDS)
def test_marks_are_put_around_a_text_where_they_are_asked_for_only(spec: str) -> None:
    bare, marked = trained(spec), trained(spec, with_marks=True)
    begin, end = marked.cls_token_id, marked.sep_token_id
    assert bare.get_vocab() == marked.get_vocab()
    for text in ("the quick fox", "", "dog"):
        assert ids(marked, text) == [begin, *ids(bare, text), end]
    assert marked("the fox", add_special_tokens=False)["input_ids"] == ids(bare, "the fox")
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    assert [getattr(bare, f"{name}_id") for name in names] == [0, 1, 2, 3, 4]
    assert (bare.bos_token_id, bare.eos_token_id) == (2, 3)


@pytest.mark.parametrize("with_marks", [False, True])
@pytest.mark.parametrize("spec", KINDS)
def test_saved_and_loaded_it_gives_the_same(spec: str, with_marks: bool, tmp_path: Path) -> None:
    tokenizer, generator = trained(spec, with_marks=with_marks), random.Random(0)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*ENGLISH[:2], "the <unk> <mask> fox</s> x<s>y", *(any_text(generator) for _ in range(100))]
    for text in texts:
        assert ids(loaded, text) == ids(tokenizer, text)
        assert loaded.decode(ids(loaded, text)) == tokenizer.decode(ids(tokenizer, text))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.all_special_ids == tokenizer.all_special_ids
    assert loaded.pad(loaded(["a", "a fox"]))["input_ids"] == tokenizer.pad(tokenizer(["a", "a fox"]))["input_ids"]


# That of a run


def run(folder: Path, rows: Dataset, **options: str) -> PreTrainedTokenizerBase:
    args = RecipeArguments(output_dir=str(folder), report_to="none", use_cpu=True)
    folder.mkdir(exist_ok=True)
    given = ModelArguments(**{"model_type": "gpt2", **options})
    return run_tokenizer(args, given, rows, with_marks=True, default="bpe:vocab_size=300")


@pytest.fixture
def rows(tmp_path: Path) -> Dataset:
    Dataset.from_dict({"text": ENGLISH}).save_to_disk(str(tmp_path / "rows"))
    return Dataset.load_from_disk(str(tmp_path / "rows"))


def test_a_run_keeps_the_tokenizer_with_which_it_began(tmp_path: Path, rows: Dataset) -> None:
    one = run(tmp_path / "out", rows)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FOLDER]
    other = run(tmp_path / "out", Dataset.from_dict({"text": ["something else entirely"]}))
    assert one.get_vocab() == other.get_vocab()
    assert ids(one, ENGLISH[0]) == ids(other, ENGLISH[0])


def test_what_was_tokenised_is_found_by_the_next_start_and_by_the_next_run(tmp_path: Path, rows: Dataset) -> None:
    found = [tokenize(rows, run(tmp_path / name, rows), 3).cache_files for name in ("one", "one", "two")]
    assert found[0] == found[1] == found[2] != []
    other = run(tmp_path / "three", rows, tokenizer_name="bpe:vocab_size=290")
    assert tokenize(rows, other, 3).cache_files != found[0]


def test_one_that_was_left_unfinished_is_made_anew(tmp_path: Path, rows: Dataset) -> None:
    (tmp_path / "out" / f"incomplete-{FOLDER}").mkdir(parents=True)
    (tmp_path / "out" / f"incomplete-{FOLDER}" / "tokenizer.json").write_text('{"half')
    assert len(run(tmp_path / "out", rows)) <= 300
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FOLDER]


def test_a_stream_is_enough_to_train_on(rows: Dataset) -> None:
    stream = rows.to_iterable_dataset()
    for spec in KINDS:
        from_stream = make_tokenizer(spec, stream, with_marks=False)
        assert from_stream.get_vocab() == make_tokenizer(spec, rows, with_marks=False).get_vocab()


# Those of folders


def test_a_folder_is_loaded_and_its_model_gives_the_default(tmp_path: Path, rows: Dataset) -> None:
    trained("words").save_pretrained(tmp_path / "mine")
    found = make_tokenizer(str(tmp_path / "mine"), rows, with_marks=True)
    assert found.get_vocab() == trained("words").get_vocab()
    args = {"model_type": None, "model_name_or_path": str(tmp_path / "mine")}
    assert run(tmp_path / "out", rows, **args).get_vocab() == found.get_vocab()


def test_a_folder_without_a_vocabulary_is_told(tmp_path: Path, rows: Dataset) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(ValueError, match="no tokenizer can be loaded from"):
        make_tokenizer(str(folder), rows, with_marks=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"vocabulary files are missing|no tokenizer can be loaded") as caught:
        make_tokenizer(str(folder), rows, with_marks=True)
    assert str(folder) in str(caught.value)
    # GPT-2's old pair of files under names that are not read gives a vocabulary of one entry, without an error.
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folder / "encoder.json").write_text("{}")
    with pytest.raises(ValueError, match=r"vocabulary files are missing|no tokenizer can be loaded"):
        make_tokenizer(str(folder), rows, with_marks=True)
    (folder / "tokenizer.json").write_text('{"cut off')
    with pytest.raises(ValueError, match="no tokenizer can be loaded"):
        make_tokenizer(str(folder), rows, with_marks=True)


def test_a_name_that_is_nowhere_is_told_with_the_kinds_that_can_be_trained(rows: Dataset) -> None:
    with pytest.raises(ValueError, match=r"tokenizer 'wordpeice' .* --tokenizer_name bpe, bytes, wordpiece, words"):
        make_tokenizer("wordpeice", rows, with_marks=True)
    with pytest.raises(ValueError, match="there is no model 'builtin:minilmm'; did you mean 'builtin:minilm'"):
        make_tokenizer("builtin:minilmm", rows, with_marks=True)


@pytest.mark.parametrize("spec", KINDS)
def test_the_same_text_gives_the_same_tokenizer(spec: str) -> None:
    # Of many words are as frequent as others, which is where an order by chance would show.
    texts = [
        " ".join(f"w{index * 7919 % 997:o}x{index % 13:b}" for index in range(start, start + 50)) for start in range(40)
    ]
    one, other = (trained(spec, texts).backend_tokenizer.to_str() for _ in range(2))
    assert one == other
