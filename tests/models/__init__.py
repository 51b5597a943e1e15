"""Tiny models of Transformers' own classes, and text for them that every Python has."""

from __future__ import annotations

from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers as tf
from torch import nn

VOCABULARY = 256
LENGTH = 16


def text_blocks(count: int, length: int = LENGTH) -> list[list[int]]:
    """The first `count` blocks of `length` bytes of English text."""
    data = "\n".join(topics.values()).encode()[: count * length]
    return [list(data[start : start + length]) for start in range(0, count * length, length)]


def language_data(count: int, length: int = LENGTH) -> list[dict[str, Any]]:
    """Examples for a language model, the labels being the text itself."""
    return [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in text_blocks(count, length)]


def _bert_like(prefix: str, head: str, **extra: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(tf, f"{prefix}Config")(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=40,
            **extra,
        )
        return getattr(tf, head)(config)  # type: ignore[no-any-return]

    return make


def _gpt2() -> nn.Module:
    config = tf.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2, n_positions=40)
    return tf.GPT2LMHeadModel(config)


def _opt() -> nn.Module:
    config = tf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        ffn_dim=32,
        word_embed_proj_dim=16,
        max_position_embeddings=40,
    )
    return tf.OPTForCausalLM(config)


def _llama_like(prefix: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(tf, f"{prefix}Config")(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=32,
            max_position_embeddings=40,
        )
        return getattr(tf, f"{prefix}ForCausalLM")(config)  # type: ignore[no-any-return]

    return make


def _t5() -> nn.Module:
    config = tf.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config)


def _bart() -> nn.Module:
    config = tf.BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=40,
    )
    return tf.BartForConditionalGeneration(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": _bert_like("Bert", "BertForMaskedLM"),
    "roberta": _bert_like("Roberta", "RobertaForMaskedLM", pad_token_id=1),
    "gpt2": _gpt2,
    "opt": _opt,
    "llama": _llama_like("Llama"),
    "qwen3": _llama_like("Qwen3"),
    "t5": _t5,
    "bart": _bart,
    "modernbert": _bert_like("ModernBert", "ModernBertForMaskedLM", pad_token_id=0, local_attention=8),
}


def make(name: str, seed: int = 0) -> nn.Module:
    """One of `MODELS`, the same weights for the same seed."""
    torch.manual_seed(seed)
    return MODELS[name]()
