"""The card of a run is read by the hub's own library, and names as bases only what is there."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import GPT2Config, GPT2LMHeadModel

from hf_gradguard import GradGuardConfig
from hf_gradguard.training import card
from hf_gradguard.training.arguments import DataArguments, ModelArguments, RecipeArguments
from hf_gradguard.training.card import Origin


def written(
    folder: Path, model: dict[str, Any], data: dict[str, Any], metrics: dict[str, float], **options: Any
) -> ModelCard:
    trainer = SimpleNamespace(
        args=RecipeArguments(output_dir=str(folder / "my-run"), report_to="none", use_cpu=True, **options),
        model=GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=100)),
        guard=None,
        guard_config=GradGuardConfig(),
        state=SimpleNamespace(epoch=1.5, global_step=1234),
    )
    origin = Origin(ModelArguments(**model), DataArguments(**data), "text-generation", "AutoModelForCausalLM")
    (folder / "README.md").write_text(card.write(trainer, origin, metrics), encoding="utf-8")  # type: ignore[arg-type]
    return ModelCard.load(folder / "README.md")


LOCAL = {"train_file": ["some/where/a.txt", "b.txt"]}
METRICS = {"eval_loss": 1.25, "eval_runtime": 3.0, "eval_samples_per_second": 9.0, "epoch": 1.0}


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("gpt2", "gpt2"),
        ("me/tiny", "me/tiny"),
        ("builtin:minilm", None),
        ("./mine", None),
        ("/a/mine", None),
        ("mine", None),
    ],
)
def test_a_base_is_named_if_it_is_on_the_hub(
    name: str, base: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    found = written(tmp_path, {"model_name_or_path": name}, LOCAL, METRICS)
    assert found.data.base_model == base
    assert f"from `{name}` (fine-tuned)" in found.text
    scratch = written(tmp_path, {"model_name_or_path": name, "from_scratch": True}, LOCAL, METRICS)
    assert "(new weights)" in scratch.text


@pytest.mark.parametrize(
    ("data", "named", "source"),
    [
        ({"dataset_name": "wikitext", "dataset_config_name": "wikitext-2"}, "wikitext", "wikitext wikitext-2"),
        ({"dataset_name": "builtin:sotu"}, None, "builtin:sotu"),
        (LOCAL, None, "a.txt, b.txt"),
    ],
)
def test_a_dataset_is_named_if_it_is_on_the_hub(
    data: dict[str, Any], named: str | None, source: str, tmp_path: Path
) -> None:
    found = written(tmp_path, {"model_type": "gpt2"}, data, METRICS)
    assert found.data.datasets == named
    assert f"trained on {source}." in found.text
    assert {result.dataset_name for result in found.data.eval_results} == {source}


def test_results_are_those_of_the_test_split_where_there_is_one(tmp_path: Path) -> None:
    found = written(tmp_path, {"model_type": "gpt2"}, LOCAL, {**METRICS, "test_loss": 1.5, "test_perplexity": 4.48})
    results = {result.metric_type: (result.metric_value, result.dataset_split) for result in found.data.eval_results}
    assert results == {"loss": (1.5, "test"), "perplexity": (4.48, "test")}
    for told in ("| eval_loss | 1.25 |", "| test_perplexity | 4.48 |"):
        assert told in found.text
    for hidden in ("runtime", "per_second", "| epoch |"):
        assert hidden not in found.text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none_does_not_spoil_the_card(value: float, tmp_path: Path) -> None:
    found = written(tmp_path, {"model_type": "gpt2"}, LOCAL, {"eval_loss": value})
    (result,) = found.data.eval_results
    assert repr(result.metric_value) == repr(value)


def test_a_patched_model_is_loaded_with_this_library(tmp_path: Path) -> None:
    found = written(tmp_path, {"model_type": "gpt2", "patch": "rezero"}, LOCAL, METRICS)
    assert "patched with `rezero`" in found.text
    assert "import hf_gradguard" in found.text
    assert "import hf_gradguard" not in written(tmp_path, {"model_type": "gpt2"}, LOCAL, METRICS).text
    for told in ("# my-run", "1.50, 1,234", "AutoModelForCausalLM.from_pretrained", "transformers 5", "seed | 42"):
        assert told in found.text


def test_a_model_that_goes_to_the_hub_is_loaded_by_its_name_there(tmp_path: Path) -> None:
    found = written(tmp_path, {"model_type": "gpt2"}, LOCAL, METRICS, hub_model_id="me/mine")
    assert 'from_pretrained("me/mine")' in found.text
    assert "# mine" in found.text
