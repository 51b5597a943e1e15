"""Each recipe trains, evaluates, saves what can be loaded again, tells what came of it, and goes on where it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

import hf_gradguard
from hf_gradguard import RunRecord
from hf_gradguard.patch.applied import applied_to
from tests.training.runs import (
    BERT,
    GPT2,
    MAIN,
    Interrupted,
    assert_same_weights,
    checkpoints,
    interrupt,
    run,
    state,
    weights,
    words,
    write_reviews,
    write_text,
)

AUTO: dict[str, Any] = {
    "clm": AutoModelForCausalLM,
    "mlm": AutoModelForMaskedLM,
    "classifier": AutoModelForSequenceClassification,
}
CLASS: dict[str, Any] = {"clm": GPT2LMHeadModel, "mlm": BertForMaskedLM, "classifier": BertForSequenceClassification}
TASK = {"clm": "text-generation", "mlm": "fill-mask", "classifier": "text-classification"}
METRICS = {
    "clm": {"perplexity", "token_accuracy"},
    "mlm": {"perplexity", "token_accuracy"},
    "classifier": {"accuracy", "f1"},
}
RECIPES = list(MAIN)
LEARNING = {"max_steps": "40", "eval_steps": "20", "save_steps": "20"}
"""Options with which the classifier learns which words are of which class."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, float]]]:
    """A finished run of each recipe, and its metrics."""
    made = {}
    for recipe in RECIPES:
        folder = tmp_path_factory.mktemp(recipe)
        made[recipe] = folder / "out", run(recipe, folder, record="true")
    return made


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_model_is_loaded_by_its_auto_class_and_is_the_best_checkpoint(
    recipe: str, finished: dict[str, Any]
) -> None:
    out, metrics = finished[recipe]
    model, tokenizer = AUTO[recipe].from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    assert type(model) is CLASS[recipe]
    best = state(out)["best_model_checkpoint"]
    reference = CLASS[recipe].from_pretrained(best).eval()
    batch = tokenizer("a fair film, and a statement", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, reference(**batch).logits)
    evaluated = [entry for entry in state(out)["log_history"] if "eval_loss" in entry]
    name = "eval_accuracy" if recipe == "classifier" else "eval_loss"
    sign = -1 if recipe == "classifier" else 1
    expected = min(evaluated, key=lambda entry: sign * entry[name])
    assert Path(best).name == f"checkpoint-{expected['step']}"
    assert metrics[name] == pytest.approx(expected[name])
    assert {f"eval_{key}" for key in METRICS[recipe]} <= metrics.keys()


def test_the_perplexity_told_is_that_of_the_saved_model_by_hand(finished: dict[str, Any]) -> None:
    out, metrics = finished["clm"]
    model, tokenizer = GPT2LMHeadModel.from_pretrained(out).double().eval(), AutoTokenizer.from_pretrained(out)
    lines = (out.parent / "text.txt").read_text().split("\n")
    held_out = lines[len(lines) - math.ceil(0.05 * len(lines)) :]
    stream = [tokenizer.eos_token_id]
    for line in filter(str.strip, held_out):
        stream += [*tokenizer(line)["input_ids"], tokenizer.eos_token_id]
    losses = []
    for start in range(0, 16 * 31, 31):  # sixteen blocks, as --max_eval_samples says
        ids = torch.tensor([stream[start : start + 32]])
        with torch.no_grad():
            log = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses += [-float(log[place, ids[0, place + 1]]) for place in range(ids.shape[1] - 1)]
    assert len(losses) == 16 * 31
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)


def test_the_accuracy_told_is_that_of_the_saved_model_by_hand(finished: dict[str, Any], tmp_path: Path) -> None:
    test_file = write_reviews(tmp_path / "test.csv", 30, seed=5)
    metrics = run("classifier", tmp_path, "--test_file", str(test_file), **LEARNING)
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval(),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    rows = [line.rsplit(",", 1) for line in test_file.read_text().strip().split("\n")[1:]][:16]
    hits = []
    for text, label in rows:
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits
        hits.append(model.config.id2label[int(logits.argmax())] == label.strip())
    assert metrics["test_accuracy"] == pytest.approx(sum(hits) / 16)
    assert metrics["test_accuracy"] > 0.8, "words tell the class"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_card_is_read_by_the_hubs_library_and_says_what_came_of_it(recipe: str, finished: dict[str, Any]) -> None:
    out, metrics = finished[recipe]
    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == TASK[recipe]
    assert card.data.library_name == "transformers"
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found.keys() == METRICS[recipe] | {"loss"}
    for name, value in found.items():
        assert value == pytest.approx(metrics[f"eval_{name}"], abs=1e-4)
    for expected in (
        "## Results",
        "## Gradients",
        "Verdict",
        "8 updates",
        CLASS[recipe].__name__,
        AUTO[recipe].__name__,
    ):
        assert expected in card.text


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_report_opens_and_the_record_has_all_updates(recipe: str, finished: dict[str, Any]) -> None:
    out, _ = finished[recipe]
    page = (out / "gradguard" / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "Verdict" in page
    assert len(RunRecord.load(out / "gradguard").steps) == 8
    saved = json.loads((out / "all_results.json").read_text())
    assert saved["eval_loss"] == finished[recipe][1]["eval_loss"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_second_start_of_a_finished_run_changes_nothing(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Seven updates are no whole epoch, after which Trainer alone makes one more at each start.
    first = run(recipe, tmp_path, max_steps="7", save_steps="7", eval_steps="7")
    kept = {name: (tmp_path / "out" / name).read_bytes() for name in ("model.safetensors", "README.md")}
    assert "Validation: " in capsys.readouterr().out
    again = run(recipe, tmp_path, max_steps="7", save_steps="7", eval_steps="7")
    assert "Validation: " in capsys.readouterr().out
    for name, content in kept.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert checkpoints(tmp_path / "out") == [7]
    timed = ("runtime", "per_second")
    assert {key: value for key, value in first.items() if not key.endswith(timed)} == {
        key: value for key, value in again.items() if not key.endswith(timed)
    }


@pytest.mark.parametrize("died", [5, 8])
@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("clm", ()),
        ("clm", ("--accumulate", "fixed:windows=2", "--clip", "zclip")),
        ("mlm", ()),
        ("mlm", ("--gradient_accumulation_steps", "2")),
        ("classifier", ()),
        ("classifier", ("--patch", "rezero")),
    ],
)
def test_a_run_that_died_goes_on_and_ends_with_the_same_weights(
    recipe: str, more: tuple[str, ...], died: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"save_steps": "2", "max_steps": "10", "eval_steps": "10", "load_best_model_at_end": "false"}
    run(recipe, tmp_path / "whole", *more, **options)
    with monkeypatch.context() as patch:
        interrupt(patch, after=died)
        with pytest.raises(Interrupted):
            run(recipe, tmp_path / "died", *more, **options)
    assert checkpoints(tmp_path / "died" / "out")[-1] < 10
    run(recipe, tmp_path / "died", *more, **options)
    assert_same_weights(tmp_path / "whole" / "out", tmp_path / "died" / "out")
    assert_same_weights(tmp_path / "whole" / "out" / "checkpoint-10", tmp_path / "died" / "out" / "checkpoint-10")


def test_a_run_that_died_when_its_checkpoint_looked_whole_goes_on_with_the_gradients_held_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between Trainer's last file and what callbacks do after it; in window 3 of pairs of windows one is held back."""
    more = ("--accumulate", "fixed:windows=2")
    options = {"save_steps": "3", "eval_steps": "9", "max_steps": "9", "load_best_model_at_end": "false"}
    run("mlm", tmp_path / "whole", *more, **options)

    def dying(*args: Any, **kwargs: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(hf_gradguard.GradGuardCallback, "on_save", dying)
        with pytest.raises(Interrupted):
            run("mlm", tmp_path / "died", *more, **options)
    assert checkpoints(tmp_path / "died" / "out") == [3]
    run("mlm", tmp_path / "died", *more, **options)
    assert_same_weights(tmp_path / "whole" / "out", tmp_path / "died" / "out")


def test_a_run_that_died_after_its_last_update_is_finished_without_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("clm", tmp_path / "whole", load_best_model_at_end="false")
    with monkeypatch.context() as patch:
        patch.setattr("hf_gradguard.training.trainer.RecipeTrainer.save_model", _dying_outside_of_checkpoints)
        with pytest.raises(Interrupted):
            run("clm", tmp_path / "died", load_best_model_at_end="false")
    run("clm", tmp_path / "died", load_best_model_at_end="false")
    assert_same_weights(tmp_path / "whole" / "out", tmp_path / "died" / "out")
    assert checkpoints(tmp_path / "died" / "out") == [4, 8]


def _dying_outside_of_checkpoints(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
    if output_dir is None:
        raise Interrupted
    super(type(self), self).save_model(output_dir, _internal_call)


def test_a_run_goes_on_when_it_is_given_more_updates(tmp_path: Path) -> None:
    run("clm", tmp_path, max_steps="4")
    run("clm", tmp_path, max_steps="8")
    assert state(tmp_path / "out")["global_step"] == 8


def test_a_run_that_brings_nothing_better_ends_early_and_stays_ended(tmp_path: Path) -> None:
    options = {"learning_rate": "0", "max_steps": "40", "eval_steps": "2", "save_steps": "2"}
    for _ in range(2):
        run("classifier", tmp_path, "--early_stopping_patience", "2", **options)
        assert state(tmp_path / "out")["global_step"] == 6, "one evaluation, and two that are no better"
    run("classifier", tmp_path, "--early_stopping_patience", "3", **options)
    assert state(tmp_path / "out")["global_step"] == 8, "more patience, and it goes on"


def test_the_best_of_several_checkpoints_is_kept_and_the_oldest_go(tmp_path: Path) -> None:
    run("classifier", tmp_path, max_steps="12", eval_steps="2", save_steps="2", save_total_limit="2")
    log = [entry for entry in state(tmp_path / "out")["log_history"] if "eval_accuracy" in entry]
    best = max(log, key=lambda entry: entry["eval_accuracy"])["step"]
    assert set(checkpoints(tmp_path / "out")) <= {best, 10, 12}
    assert_same_weights(tmp_path / "out", tmp_path / "out" / f"checkpoint-{best}")


# Models, patches, policies


@pytest.mark.parametrize(
    ("recipe", "kind", "overrides", "expected"),
    [
        ("clm", "bert", BERT, BertLMHeadModel),
        ("classifier", "gpt2", GPT2, GPT2ForSequenceClassification),
    ],
)
def test_the_other_kind_of_model_does_the_same_task(
    recipe: str, kind: str, overrides: str, expected: Any, tmp_path: Path
) -> None:
    metrics = run(recipe, tmp_path, model_type=kind, config_overrides=overrides)
    model = AUTO[recipe].from_pretrained(tmp_path / "out")
    assert type(model) is expected
    if recipe == "clm":
        assert model.config.is_decoder
        ids = torch.tensor([[7, 8, 9, 10]])
        changed = torch.tensor([[7, 8, 9, 11]])
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(ids).logits[0, :3], model(changed).logits[0, :3]), "no look ahead"
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("patch", ["rezero", "completep", "lsuv", "residual=layerscale:init=0.1;norm=pre"])
@pytest.mark.parametrize("recipe", ["clm", "mlm"])
def test_a_patched_model_is_trained_and_loaded_again(recipe: str, patch: str, tmp_path: Path) -> None:
    metrics = run(recipe, tmp_path, "--patch", patch)
    out = tmp_path / "out"
    model = hf_gradguard.load_patched(AUTO[recipe], out) if patch != "lsuv" else AUTO[recipe].from_pretrained(out)
    assert (applied_to(model) is None) == (patch == "lsuv") or patch == "lsuv"
    saved = weights(out)
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in saved.items())
    assert math.isfinite(metrics["eval_loss"])
    assert f"patched with `{patch}`" in (out / "README.md").read_text()
    run(recipe, tmp_path, "--patch", patch)
    assert all(torch.equal(saved[name], value) for name, value in weights(out).items()), "also by a second start"


def test_a_pretrained_folder_is_fine_tuned_with_its_own_tokenizer(tmp_path: Path) -> None:
    run("mlm", tmp_path / "before")
    before = tmp_path / "before" / "out"
    gone = {"model_type": None, "config_overrides": None, "tokenizer_name": None, "model_name_or_path": str(before)}
    metrics = run("classifier", tmp_path / "after", **gone, **LEARNING)
    after = tmp_path / "after" / "out"
    assert AutoTokenizer.from_pretrained(after).get_vocab() == AutoTokenizer.from_pretrained(before).get_vocab()
    assert metrics["eval_accuracy"] > 0.8
    # Without a step they are the weights of the folder, but for the head.
    run("classifier", tmp_path / "still", **gone, learning_rate="0", max_steps="1", eval_steps="1", save_steps="1")
    one, other = weights(before), weights(tmp_path / "still" / "out")
    shared = [name for name in one if name in other]
    assert len(shared) > 20
    assert all(torch.equal(one[name], other[name]) for name in shared)
    card = ModelCard.load(after / "README.md")
    assert card.data.base_model is None, "a folder is no model on the hub"


def test_a_decoder_without_a_mark_of_padding_is_given_one(tmp_path: Path) -> None:
    run("clm", tmp_path / "before", tokenizer_name="bpe:vocab_size=300")
    before = tmp_path / "before" / "out"
    tokenizer = AutoTokenizer.from_pretrained(before)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(before)
    gone = {"model_type": None, "config_overrides": None, "tokenizer_name": None, "model_name_or_path": str(before)}
    metrics = run("classifier", tmp_path / "after", **gone, **LEARNING)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "after" / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "after" / "out")
    assert type(model) is GPT2ForSequenceClassification
    assert loaded.pad_token_id == model.config.pad_token_id == loaded.eos_token_id
    assert metrics["eval_accuracy"] > 0.7


def test_windows_that_are_held_back_make_fewer_updates(tmp_path: Path) -> None:
    run("mlm", tmp_path, "--accumulate", "fixed:windows=2", record="true")
    record = RunRecord.load(tmp_path / "out" / "gradguard")
    assert len(record.steps) == 8
    card = (tmp_path / "out" / "README.md").read_text()
    assert "4 updates, 4 deferred" in card or "4 deferred" in card
    assert "accumulate=fixed:windows=2" in card


# Text


@pytest.mark.parametrize("recipe", ["clm", "mlm"])
def test_a_stream_is_trained_on_like_a_file(recipe: str, tmp_path: Path) -> None:
    held_out = write_text(tmp_path / "held_out.txt", 8000)
    more = ("--streaming", "--shuffle_buffer", "10", "--validation_file", str(held_out))
    metrics = run(recipe, tmp_path, *more)
    assert state(tmp_path / "out")["global_step"] == 8
    assert math.isfinite(metrics["eval_perplexity"])
    again = run(recipe, tmp_path / "again", *more)
    assert again["eval_perplexity"] == metrics["eval_perplexity"]


@pytest.mark.parametrize("died", [3, 15])
@pytest.mark.parametrize("recipe", ["clm", "mlm"])
def test_a_stream_that_died_goes_on_and_ends_with_the_same_weights(
    recipe: str, died: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out, short = write_text(tmp_path / "held_out.txt", 8000), write_text(tmp_path / "short.txt", 1500)
    more = ("--streaming", "--shuffle_buffer", "10", "--validation_file", str(held_out))
    options = {"save_steps": "2", "max_steps": "20", "eval_steps": "20", "load_best_model_at_end": "false"}
    options["train_file"] = str(short)  # read from its beginning again before the end
    run(recipe, tmp_path / "whole", *more, **options)
    with monkeypatch.context() as patch:
        interrupt(patch, after=died)
        with pytest.raises(Interrupted):
            run(recipe, tmp_path / "died", *more, **options)
    run(recipe, tmp_path / "died", *more, **options)
    assert state(tmp_path / "died" / "out")["global_step"] == 20
    assert_same_weights(tmp_path / "whole" / "out", tmp_path / "died" / "out")


def test_a_file_of_options_does_what_the_command_line_does(tmp_path: Path) -> None:
    expected = run("clm", tmp_path)
    given = words("clm", tmp_path)
    options: dict[str, Any] = {}
    for word in given:
        if word.startswith("--"):
            options[word[2:]] = True
        else:
            options[next(reversed(options))] = word
    options["output_dir"] = str(tmp_path / "other")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    found = MAIN["clm"]([str(tmp_path / "run.yaml")])
    assert found["eval_loss"] == expected["eval_loss"]
    assert_same_weights(tmp_path / "out", tmp_path / "other")


def test_perplexity_by_word_is_told_where_all_is_evaluated(tmp_path: Path) -> None:
    lines = ["one two three", "four  five", "", "six"]
    (tmp_path / "held_out.txt").write_text("\n".join(lines * 20))
    metrics = run("clm", tmp_path, "--validation_file", str(tmp_path / "held_out.txt"), max_eval_samples="100000")
    words_and_ends = 20 * (3 + 1 + 2 + 1 + 1 + 1)
    tokens = 20 * sum(len(line) + 1 for line in lines if line)
    expected = math.exp(math.log(metrics["eval_perplexity"]) * tokens / words_and_ends)
    assert metrics["eval_perplexity_per_word"] == pytest.approx(expected, rel=1e-6)
