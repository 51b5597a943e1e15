"""The baselines are what they are said to be, and see the text that the training recipes see."""

from __future__ import annotations

import csv
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from datasets import Dataset
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from hf_gradguard.training import metrics
from hf_gradguard.training.arguments import DataArguments
from hf_gradguard.training.blocks import IGNORED, Layout, make_blocks
from hf_gradguard.training.text import load_text
from hf_gradguard.training.tokenizer import make_tokenizer
from recipes import baseline_ngram, baseline_tfidf
from recipes.baseline_ngram import FALLBACK, KneserNey, Part, count

Tokens = NDArray[np.int64]
Probability = Callable[[tuple[int, ...], int], float]


def prose() -> tuple[Tokens, Tokens, int]:
    """Words of real text, to train with and to hold out, some of which are not in the other; and how many there are."""
    words = " ".join(topics.values()).split()[:14000]
    numbers = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokens = np.array([numbers[word] for word in words])
    return tokens[:13000], tokens[13000:], len(numbers)


def noise() -> tuple[Tokens, Tokens, int]:
    """The same of a few tokens in any order, so that all are frequent; two are only held out."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 6, 2000), rng.integers(0, 8, 500), 8


def textbook_discounts(counts: list[int]) -> tuple[float, ...]:
    n = Counter(counts)
    if not n[1] * n[2] * n[3] * n[4]:
        return FALLBACK
    y = n[1] / (n[1] + 2 * n[2])
    found = tuple(k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))
    return found if min(found) > 0 else FALLBACK


def textbook(tokens: Tokens, vocabulary: int, order: int) -> Probability:
    """p(word | history) of Chen and Goodman (1998), with dictionaries and sets of tuples in place of arrays."""
    words = tokens.tolist()
    every = [[tuple(words[i : i + size]) for i in range(len(words) - size + 1)] for size in range(1, order + 1)]
    after: list[dict[tuple[int, ...], dict[int, int]]] = [defaultdict(dict) for _ in every]
    for size, grams in enumerate(every, 1):
        counts = Counter(grams)
        if size < order:
            counts = Counter(dict.fromkeys(grams, 0))
            counts.update(gram[1:] for gram in set(every[size]))
        for gram, value in counts.items():
            after[size - 1][gram[:-1]][gram[-1]] = value
    taken = [textbook_discounts([value for row in rows.values() for value in row.values()]) for rows in after]

    def probability(history: tuple[int, ...], word: int) -> float:
        size = len(history)
        lower = probability(history[1:], word) if size else 1 / vocabulary
        row = after[size].get(history, {})
        if not (total := sum(row.values())):
            return lower
        discount = {token: (0.0, *taken[size])[min(value, 3)] for token, value in row.items()}
        return (row.get(word, 0) - discount.get(word, 0.0)) / total + sum(discount.values()) / total * lower

    return probability


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("text", [prose, noise])
def test_probabilities_are_those_of_the_textbook(text: Callable[[], tuple[Tokens, Tokens, int]], order: int) -> None:
    train, held_out, vocabulary = text()
    model = KneserNey(count(train, vocabulary, order), vocabulary)
    if text is prose:  # else the test would be of the fallback alone
        assert FALLBACK not in model.discounts
    expected, words = textbook(train, vocabulary, order), held_out.tolist()
    wanted = [expected(tuple(words[max(0, i - order + 1) : i]), words[i]) for i in range(1, len(words))]
    np.testing.assert_allclose(model.probabilities(held_out), wanted, rtol=1e-12)


@pytest.mark.parametrize("text", [prose, noise])
def test_probabilities_of_all_tokens_sum_to_one_in_contexts_seen_and_unseen(
    text: Callable[[], tuple[Tokens, Tokens, int]],
) -> None:
    train, held_out, vocabulary = text()
    model = KneserNey(count(train, vocabulary, 4), vocabulary)
    seen, unseen = train[500:503], np.array([vocabulary - 1, 0, vocabulary - 1])
    for context in (seen, seen[:1], np.array([vocabulary - 1, *seen[:2]]), held_out[:3], unseen, train[-3:]):
        values = [model.probabilities(np.array([*context, token]))[-1] for token in range(vocabulary)]
        assert math.fsum(values) == pytest.approx(1, abs=1e-12)
        assert min(values) > 0


def test_a_single_discount_can_be_given() -> None:
    # By hand: after 0 come 1 (twice) and 2 (once); 1, 2 and 0 have 1, 1 and 2 different tokens before them.
    tokens = np.array([0, 1, 0, 2, 0, 1])
    model = KneserNey(count(tokens, 3, 2), 3, [(0.0, 0.0, 0.0), (0.75, 0.75, 0.75)])
    one, two, zero = (model.probabilities(np.array([0, token]))[0] for token in (1, 2, 0))
    assert one == pytest.approx(1.25 / 3 + 1.5 / 3 * 1 / 4)
    assert two == pytest.approx(0.25 / 3 + 1.5 / 3 * 1 / 4)
    assert zero == pytest.approx(1.5 / 3 * 2 / 4)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    lines = [line for text in topics.values() for line in text.splitlines() if line.strip()]
    paths = {}
    for split, rows in {"train": lines[:1500], "validation": lines[1500:1700], "test": lines[1700:1900]}.items():
        path = tmp_path / f"{split}.txt"
        path.write_text("\n".join(rows), encoding="utf-8")
        paths[f"--{split}_file"] = str(path)
    return paths


def words_of(files: dict[str, str], *more: str) -> list[str]:
    return [word for pair in files.items() for word in pair] + list(more)


@pytest.mark.parametrize("kind", ["bpe:vocab_size=400", "words:min_frequency=2"])
def test_tokens_and_words_are_those_of_train_clm(files: dict[str, str], kind: str) -> None:
    paths = {name[2:]: [path] for name, path in files.items()}
    data = DataArguments(**paths)  # type: ignore[arg-type]
    text = load_text(data)
    tokenizer = make_tokenizer(kind, text["train"], with_marks=False)
    end = tokenizer.eos_token_id
    blocks = make_blocks(text, tokenizer, Layout(64, overlap=1), data, end=end, first=end, keep_rest=True)
    for split, rows in text.items():
        part = baseline_ngram.read(rows, tokenizer)
        own = blocks[split]
        labels = np.concatenate([own[index]["labels"][1:].numpy() for index in range(len(own))])
        labels = labels[labels != IGNORED]
        left_out = len(part.tokens) - 1 - len(labels)
        assert left_out == 0 if split != "train" else left_out < 63
        assert part.tokens[0] == end
        np.testing.assert_array_equal(part.tokens[1 : len(labels) + 1], labels)
        assert part.words == own.words


def test_perplexities_are_those_of_the_metric_that_train_clm_reports() -> None:
    train, held_out, vocabulary = prose()
    model = KneserNey(count(train, vocabulary, 3), vocabulary)
    nll = -np.log(model.probabilities(held_out))
    ones = np.ones(len(nll), dtype=np.int64)
    expected = metrics.Perplexity(keep_in_memory=True).compute(nll=nll, tokens=ones, correct=ones, words=700)
    found = baseline_ngram.perplexities(model, Part(held_out, 700))
    assert found == pytest.approx({name: expected[name] for name in ("perplexity", "perplexity_per_word")})


def test_the_order_is_chosen_in_validation(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    each = {
        order: baseline_ngram.main(words_of(files, "--tokenizer_name", "bytes", "--order", str(order)))
        for order in (1, 4, 6)
    }
    best = min(each, key=lambda order: each[order]["eval_perplexity"])
    assert best != 1
    capsys.readouterr()
    found = baseline_ngram.main(words_of(files, "--tokenizer_name", "bytes", "--order", "6", "1", "4"))
    assert found == each[best]
    assert found["order"] == best
    printed = capsys.readouterr().out
    for order, values in each.items():
        assert f"| {order} |" in printed
        assert f"| {values['eval_perplexity']:.2f} | {values['eval_perplexity_per_word']:.2f} |" in printed
        assert f"| {values['test_perplexity']:.2f} | {values['test_perplexity_per_word']:.2f} |" in printed


def test_the_tokenizer_of_a_run_gives_the_same_tokens_again(files: dict[str, str], tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": Path(files["--train_file"]).read_text(encoding="utf-8").splitlines()})
    folder = tmp_path / "run" / "tokenizer"
    make_tokenizer("bpe:vocab_size=400", rows, with_marks=False).save_pretrained(str(folder))
    trained = baseline_ngram.main(words_of(files, "--tokenizer_name", "bpe:vocab_size=400"))
    assert baseline_ngram.main(words_of(files, "--tokenizer_name", str(folder))) == trained


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--order", "0"], "--order 0 must be at least 1"),
        (["--order", "1000000"], "too few for --order 1000000"),
        (["--streaming"], "--streaming"),
        (["--max_train_samples", "3"], "--max_train_samples counts blocks"),
        (["--tokenizer_name", "./nowhere"], "there is no folder './nowhere'"),
        (["--ordr", "3"], "did you mean '--order'"),
    ],
)
def test_what_an_ngram_model_cannot_do_is_one_line(
    files: dict[str, str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        baseline_ngram.main(words_of(files, "--tokenizer_name", "bytes", *more))
    assert message in capsys.readouterr().err


def write_reviews(folder: Path, rows: Callable[[random.Random, int], tuple[str, str]]) -> dict[str, str]:
    """A csv file for each split."""
    rng, paths = random.Random(0), {}
    for split, size in {"train": 300, "validation": 100, "test": 200}.items():
        path = folder / f"{split}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows(rows(rng, index) for index in range(size))
        paths[f"--{split}_file"] = str(path)
    return paths


def by_order(rng: random.Random, index: int) -> tuple[str, str]:
    """What a review says is told by the order of its words alone."""
    filler = rng.choices(["film", "plot", "actor", "scene", "music", "story"], k=4)
    rng.shuffle(filler)
    kind = ("negative", "positive")[index % 2]
    said = "not good but bad" if kind == "negative" else "not bad but good"
    return " ".join([*filler[:2], said, *filler[2:]]), kind


def by_words(rng: random.Random, index: int) -> tuple[str, str]:
    """What a review says is told by how many of its words are good, mostly, in three classes."""
    kinds = ("bad", "fair", "good")
    kind = kinds[index % 3]
    words = [kind if rng.random() < 0.3 else rng.choice([*kinds, "film", "plot", "actor", "scene"]) for _ in range(6)]
    return " ".join(words), kind


def test_ngrams_are_chosen_in_validation_and_see_the_order_of_words(tmp_path: Path) -> None:
    found = baseline_tfidf.main(words_of(write_reviews(tmp_path, by_order), "--ngrams", "1", "2", "--C", "10"))
    assert (found["ngrams"], found["C"]) == (2, 10)
    assert found["test_accuracy"] == found["test_f1"] == 1
    assert found["plain_test_accuracy"] < 0.65


def test_figures_are_those_of_scikit_learn_on_the_same_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_reviews(tmp_path, by_words)
    found = baseline_tfidf.main(words_of(paths))
    rows = {}
    for name, path in paths.items():
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows[name] = [list(column) for column in zip(*list(csv.reader(file))[1:], strict=True)]
    hits = {}
    for strength in (0.3, 1.0, 3.0, 10.0, 30.0):
        model = make_pipeline(TfidfVectorizer(), LogisticRegression(C=strength)).fit(*rows["--train_file"])
        for split in ("validation", "test"):
            texts, classes = rows[f"--{split}_file"]
            hits[split, strength] = model.predict(texts) == np.array(classes)
    assert found["plain_eval_accuracy"] == pytest.approx(hits["validation", 1.0].mean())
    assert found["plain_test_accuracy"] == pytest.approx(hits["test", 1.0].mean())
    best = max((0.3, 1.0, 3.0, 10.0, 30.0), key=lambda strength: hits["validation", strength].mean())
    assert found["C"] == best
    assert found["test_accuracy"] == pytest.approx(hits["test", best].mean())
    plain = hits["test", 1.0]
    assert f"{plain.mean():.4f} ± {plain.std() / math.sqrt(len(plain)):.4f}" in capsys.readouterr().out


def test_the_plain_model_is_measured_where_others_are_asked_for(tmp_path: Path) -> None:
    paths = write_reviews(tmp_path, by_words)
    plain = baseline_tfidf.main(words_of(paths, "--C", "1"))
    found = baseline_tfidf.main(words_of(paths, "--C", "0.01", "--ngrams", "2"))
    assert (found["ngrams"], found["C"]) == (2, 0.01)
    assert found["plain_test_accuracy"] == plain["test_accuracy"] == plain["plain_test_accuracy"]


def test_classes_may_be_numbers_of_one_type_here_and_another_there(tmp_path: Path) -> None:
    paths = write_reviews(tmp_path, by_words)
    named = baseline_tfidf.main(words_of(paths, "--C", "1"))
    for name, path in paths.items():
        rows = Path(path).read_text(encoding="utf-8").splitlines()
        for number, kind in enumerate(("bad", "fair", "good")):
            spelt = f"{number}.0" if name == "--test_file" else str(number)
            rows = [row.removesuffix(kind) + spelt if row.endswith(f",{kind}") else row for row in rows]
        Path(path).write_text("\n".join(rows), encoding="utf-8")
    assert baseline_tfidf.main(words_of(paths, "--C", "1")) == pytest.approx(named)


def test_a_baseline_learns_from_as_many_rows_as_the_classifier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_reviews(tmp_path, by_words)
    baseline_tfidf.main(words_of(paths, "--max_train_samples", "30", "--max_eval_samples", "20", "--C", "1"))
    assert "train 30, validation 20, test 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--C", "0"], "--C 0 must be above 0"),
        (["--ngrams", "0"], "--ngrams 0 must be at least 1"),
        (["--streaming"], "--streaming"),
        (["--label_column_name", "stars"], "stars"),
    ],
)
def test_what_a_baseline_of_classes_cannot_do_is_one_line(
    tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        baseline_tfidf.main(words_of(write_reviews(tmp_path, by_words), *more))
    assert message in capsys.readouterr().err
