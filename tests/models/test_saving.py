"""Saved models come back to the bit, by whoever loads them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from hf_gradguard import RecurrentForCausalLM, patch_model
from hf_gradguard.models.modeling import RecurrentModel
from tests.models.recurrent import CELLS, VOCABULARY, classifier, config, language_model, tokens

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms": {"layer_norm": True, "residual": True},
    "tied": {"tie_word_embeddings": True},
    "tied, narrow embedding": {"tie_word_embeddings": True, "embedding_size": 8},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(2, 7)).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_a_language_model_comes_back_to_the_bit(cell: str, shape: str, tmp_path: Path) -> None:
    model = language_model(cell=cell, **SHAPES[shape])
    model.save_pretrained(tmp_path)
    for kind in (RecurrentForCausalLM, AutoModelForCausalLM):
        loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is RecurrentForCausalLM
        assert not any(info.values())
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.config.to_diff_dict().keys() == model.config.to_diff_dict().keys()


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_a_classifier_comes_back_to_the_bit(pooling: str, tmp_path: Path) -> None:
    model = classifier(pooling=pooling, num_labels=3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.num_labels == 3
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_weight_is_one_and_is_stored_once(tied: bool, tmp_path: Path) -> None:
    model = language_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        assert ("lm_head.weight" in stored.keys()) == (not tied)  # noqa: SIM118  # it is no dictionary
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] == tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("shape", SHAPES)
def test_the_vocabulary_may_grow(shape: str, tmp_path: Path) -> None:
    model = language_model(**SHAPES[shape])
    before = logits(model)
    model.resize_token_embeddings(VOCABULARY + 7)
    assert model.config.vocab_size == model.lm_head.out_features == VOCABULARY + 7
    assert torch.equal(logits(model)[..., :VOCABULARY], before)
    tied = SHAPES[shape].get("tie_word_embeddings", False)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    ids = torch.tensor([[VOCABULARY + 6, 3]])
    assert torch.isfinite(model(ids, labels=ids).loss)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_the_body_of_a_language_model_serves_other_heads(tmp_path: Path) -> None:
    model = language_model()
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is RecurrentModel
    with torch.no_grad():
        assert torch.equal(body(tokens(2, 7)).last_hidden_state, model.model(tokens(2, 7)).last_hidden_state)
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    assert all(torch.equal(one, other) for one, other in zip(body.parameters(), head.model.parameters(), strict=True))


def test_the_auto_classes_make_models_of_a_config() -> None:
    made = AutoConfig.for_model("gradguard_recurrent", cell="gru", vocab_size=30, hidden_size=8, num_layers=2)
    assert made.cell == "gru"
    assert type(AutoModelForCausalLM.from_config(made)) is RecurrentForCausalLM


def test_loading_in_less_precision(tmp_path: Path) -> None:
    language_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


def test_pipelines_take_them(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    backend = Tokenizer(WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w1"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", unk_token="w1", eos_token="w49", padding_side="left"
    )
    texts = ["w3 w4 w5", "w7"]
    model = language_model()
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    write = pipeline("text-generation", model=str(tmp_path / "lm"), device="cpu")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert write(texts, batch_size=2, **options) == [write(text, **options) for text in texts]
    classifier(num_labels=3).save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    judge = pipeline("text-classification", model=str(tmp_path / "classifier"), device="cpu")
    for together, alone in zip(judge(texts, batch_size=2), [judge(text)[0] for text in texts], strict=True):
        assert together["label"] == alone["label"]
        assert together["score"] == pytest.approx(alone["score"], abs=1e-6)


def test_a_patch_for_transformers_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type 'gradguard_recurrent' is not in the table of architectures"):
        patch_model(RecurrentForCausalLM(config()), "rezero")


LOAD = """
import torch
model = transformers.AutoModelForCausalLM.from_pretrained({path!r})
with torch.no_grad():
    print(type(model).__name__, torch.equal(model(torch.tensor({ids})).logits, torch.load({expected!r})))
"""
ORDERS = {
    "before": "import hf_gradguard, transformers",
    "after": "import transformers; transformers.AutoModelForCausalLM; import hf_gradguard",
    "after a model": "from transformers import GPT2LMHeadModel; import transformers, hf_gradguard",
    "before a model": "import hf_gradguard, transformers; from transformers import GPT2LMHeadModel",
    "between": "import transformers, hf_gradguard; from transformers import AutoConfig, Trainer",
}


def run(code: str) -> str:
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("order", [pytest.param(o, marks=[] if o == "before" else [pytest.mark.slow]) for o in ORDERS])
def test_a_plain_import_is_enough_whichever_is_first(order: str, tmp_path: Path) -> None:
    model = language_model()
    model.save_pretrained(tmp_path)
    torch.save(logits(model), tmp_path / "expected")
    load = LOAD.format(path=str(tmp_path), ids=tokens(2, 7).tolist(), expected=str(tmp_path / "expected"))
    assert run(ORDERS[order] + load) == "RecurrentForCausalLM True"


@pytest.mark.slow
def test_trainer_and_auto_classes_import_no_recurrent_model() -> None:
    code = "import sys, hf_gradguard; from transformers import Trainer, AutoModel, AutoModelForCausalLM"
    assert run(f"{code}; print('hf_gradguard.models.modeling' in sys.modules)") == "False"


@pytest.mark.slow
def test_a_config_that_came_from_another_process_is_enough(tmp_path: Path) -> None:
    import pickle

    (tmp_path / "config").write_bytes(pickle.dumps(config()))
    code = [
        "import pickle, transformers",
        f"config = pickle.load(open({str(tmp_path / 'config')!r}, 'rb'))",
        "print(type(transformers.AutoModelForCausalLM.from_config(config)).__name__)",
    ]
    assert run("\n".join(code)) == "RecurrentForCausalLM"
