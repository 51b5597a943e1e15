"""A tiny model of each entry in the table of architectures, with inputs; Transformers' own classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor

VOCABULARY = 64
WIDTH = 16
LENGTH = 7


@dataclass(frozen=True)
class Case:
    """One architecture, or one variant of it."""

    head: str
    """Class of the model."""
    options: dict[str, Any]
    """What the config gets beside the sizes."""
    is_generative: bool = False
    takes_encoder_states: bool = False

    def config(self, **changes: Any) -> Any:
        config_class = getattr(tf, self.head).config_class
        return config_class(**{"vocab_size": VOCABULARY, **self.options, **changes})

    def make(self, seed: int = 0, **changes: Any) -> Any:
        """The model, with all its weights random, norms and biases too, in evaluation mode."""
        torch.manual_seed(seed)
        model = getattr(tf, self.head)(self.config(**changes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Biases and norms start as constants, which would hide what is done to them
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    def inputs(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def ids() -> Tensor:
            return torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)

        inputs = {"input_ids": ids()}
        if self.takes_encoder_states:
            inputs["encoder_hidden_states"] = torch.randn(2, 5, WIDTH, generator=generator).to(dtype)
        if self.head.endswith("ConditionalGeneration"):
            inputs["decoder_input_ids"] = ids()
        return inputs


_SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
_BERT = {**_SIZES, "intermediate_size": 24, "max_position_embeddings": 40}
_LLAMA = {**_BERT, "num_key_value_heads": 1, "head_dim": 8}
_GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 40}
_NEOX = {**_BERT, "hidden_dropout": 0.1, "attention_dropout": 0.1}
_OPT = {**_SIZES, "ffn_dim": 24, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 40}
_T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
_BART = {
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
    "forced_eos_token_id": None,
}


def _special(**ids: int) -> dict[str, int]:
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **ids}


CASES: dict[str, Case] = {
    "bert": Case("BertForMaskedLM", _BERT),
    "bert-cross": Case(
        "BertLMHeadModel", {**_BERT, "is_decoder": True, "add_cross_attention": True}, takes_encoder_states=True
    ),
    "roberta": Case("RobertaForMaskedLM", {**_BERT, **_special()}),
    "distilbert": Case(
        "DistilBertForMaskedLM",
        {"dim": WIDTH, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 40},
    ),
    "electra": Case("ElectraForMaskedLM", {**_BERT, "embedding_size": 12}),
    "modernbert": Case(
        "ModernBertForMaskedLM",
        {**_BERT, **_special(), "attention_dropout": 0.1, "mlp_dropout": 0.1, "local_attention": 8},
    ),
    "gpt2": Case("GPT2LMHeadModel", _GPT2, is_generative=True),
    "gpt2-cross": Case("GPT2LMHeadModel", {**_GPT2, "add_cross_attention": True}, takes_encoder_states=True),
    "gpt_neox-parallel": Case("GPTNeoXForCausalLM", {**_NEOX, "use_parallel_residual": True}, is_generative=True),
    "gpt_neox-sequential": Case("GPTNeoXForCausalLM", {**_NEOX, "use_parallel_residual": False}, is_generative=True),
    "opt-pre": Case("OPTForCausalLM", {**_OPT, "do_layer_norm_before": True}, is_generative=True),
    "opt-post": Case(
        "OPTForCausalLM", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 12}, is_generative=True
    ),
    "llama": Case("LlamaForCausalLM", {**_LLAMA, "attention_bias": True, "mlp_bias": True}, is_generative=True),
    "mistral": Case("MistralForCausalLM", {**_LLAMA, "attention_dropout": 0.1}, is_generative=True),
    "qwen2": Case("Qwen2ForCausalLM", _LLAMA, is_generative=True),
    "qwen3": Case("Qwen3ForCausalLM", _LLAMA, is_generative=True),
    "t5": Case("T5ForConditionalGeneration", _T5, is_generative=True),
    "t5-gated": Case("T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}, is_generative=True),
    "bart": Case("BartForConditionalGeneration", {**_BART, "decoder_start_token_id": 2}, is_generative=True),
}

ALL = sorted(CASES)
GENERATIVE = sorted(name for name, case in CASES.items() if case.is_generative)


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What the model computes, [batch, length, vocabulary]."""
    return model(**inputs).logits  # type: ignore[no-any-return]


def gradients(model: Any, inputs: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The gradient of each parameter that has one, of a loss that weighs every logit differently."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = logits(model, inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    (out * weights).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_generation(model: Any, case: Case) -> None:
    """Generation with a key-value cache gives the tokens and logits of generation without."""
    runs = [
        model.generate(
            case.inputs()["input_ids"],
            max_new_tokens=6,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
            pad_token_id=0,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert runs[0].sequences.shape[1] > 6
    torch.testing.assert_close(torch.stack(runs[0].logits), torch.stack(runs[1].logits), atol=1e-5, rtol=0)
