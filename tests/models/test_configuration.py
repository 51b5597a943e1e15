"""What can't be is refused when it is written, in words."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from hf_gradguard import RecurrentConfig, RecurrentForCausalLM


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "ltsm"}, "cell='ltsm' is unknown; did you mean 'lstm'.. Known: lstm, gru, rnn_tanh, rnn_relu"),
        ({"pooling": "first"}, "pooling='first' is unknown.* Known: last, mean, max"),
        ({"recurrent_init": "ortogonal"}, "recurrent_init='ortogonal' is unknown; did you mean 'orthogonal'"),
        ({"input_init": "identity"}, "input_init='identity' is unknown"),
        ({"bias_init": 0}, "bias_init=0 is unknown"),
        ({"hidden_size": 0}, "hidden_size=0 must be a whole number of at least 1"),
        ({"num_hidden_layers": -1}, "num_layers=-1 must be a whole number of at least 1"),
        ({"vocab_size": True}, "vocab_size=True must be a whole number"),
        ({"embedding_size": 2.5}, r"embedding_size=2.5 must be .* \(or None, for that of the layers\)"),
        ({"layer_dropout": 1.0}, "layer_dropout=1.0 must be a number from 0 up to, but not including, 1"),
        ({"recurrent_dropout": -0.1}, "recurrent_dropout=-0.1 must be a number from 0"),
        ({"input_dropout": "0.1"}, "input_dropout='0.1' must be a number"),
        ({"residual": 1}, "residual=1 must be True or False"),
        ({"init_range": 0}, "init_range=0 must be a number above 0"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps=inf must be a number above 0"),
        ({"forget_bias": float("nan")}, r"forget_bias=nan must be a number \(or None, to leave it to bias_init\)"),
        ({"dropout": 0.1}, "no option 'dropout'; did you mean '.*_dropout'"),
        ({"layernorm": True}, "no option 'layernorm'; did you mean 'layer_norm'"),
        ({"num_layer": 3}, "no option 'num_layer'; did you mean 'num_layers'"),
        ({"initializer_range": 0.02}, "no option 'initializer_range'; did you mean 'init_range'"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"RecurrentConfig.*{message}"):
        RecurrentConfig(**options)


def test_a_value_set_later_is_refused_by_the_model() -> None:
    config = RecurrentConfig()
    config.cell = "ltsm"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="did you mean 'lstm'"):
        RecurrentForCausalLM(config)


def test_what_transformers_gives_any_config_is_taken() -> None:
    given: dict[str, Any] = {
        "num_labels": 3,
        "problem_type": "multi_label_classification",
        "sep_token_id": 4,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "max_length": 30,
        "attn_implementation": "eager",
        "output_attentions": False,
        "name_or_path": "here",
        "architectures": ["RecurrentForCausalLM"],
        "dtype": "float32",
        "my_own_note": "kept",
    }
    config = RecurrentConfig(**given)
    assert config.num_labels == 3
    assert config.my_own_note == "kept"  # type: ignore[attr-defined]


def test_the_number_of_layers_has_two_names() -> None:
    config = RecurrentConfig(num_hidden_layers=5)
    assert config.num_layers == config.num_hidden_layers == 5
    config.num_hidden_layers = 4
    assert config.num_layers == 4
    assert "num_hidden_layers" not in config.to_dict()


@pytest.mark.parametrize("options", [{}, {"embedding_size": 8, "cell": "gru", "forget_bias": None, "pooling": "max"}])
def test_a_config_comes_back_from_its_dictionary_and_from_pickle(options: dict[str, Any]) -> None:
    config = RecurrentConfig(**options)
    for other in (RecurrentConfig.from_dict(config.to_dict()), pickle.loads(pickle.dumps(config))):
        assert other.to_dict() == config.to_dict()
    assert [config.input_width(layer) for layer in (0, 1)] == [options.get("embedding_size", 200), 200]
