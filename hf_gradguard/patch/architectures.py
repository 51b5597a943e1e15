"""The table of architectures: one entry for each, or one for each variant that the config chooses.

Names of modules are those of Transformers 5; nothing else is taken from its modelling files. Every path is resolved
when a model is read, so that an entry which no longer fits is noticed then and there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hf_gradguard.patch.entry import Architecture, At, AttentionEntry, Kind, MLPEntry, Rows, StackEntry


def _bert_attention(kind: Kind, module: str) -> AttentionEntry:
    return AttentionEntry(
        kind=kind,
        residual=At(f"{module}.output", 1),
        norm=f"{module}.output.LayerNorm",
        input=At(f"{module}.self"),
        query=f"{module}.self.query",
        key=f"{module}.self.key",
        value=f"{module}.self.value",
        output=f"{module}.output.dense",
        end=f"{module}.output.dropout",
        optional=kind == "cross_attention",
    )


_BERT = Architecture(
    model_type="bert",
    stacks=(
        StackEntry(
            name="encoder",
            layers="encoder.layer",
            norm="post",
            branches=(
                _bert_attention("attention", "attention"),
                _bert_attention("cross_attention", "crossattention"),
                MLPEntry(
                    residual=At("output", 1),
                    norm="output.LayerNorm",
                    input=At("intermediate"),
                    inner=("intermediate.dense",),
                    activation="intermediate.intermediate_act_fn",
                    output="output.dense",
                    end="output.dropout",
                ),
            ),
            embeddings=(
                "embeddings.word_embeddings",
                "embeddings.position_embeddings",
                "embeddings.token_type_embeddings",
            ),
            embedding_norm="embeddings.LayerNorm",
        ),
    ),
)

_ROBERTA = dataclasses.replace(_BERT, model_type="roberta")

_ELECTRA = Architecture(
    model_type="electra",
    stacks=(dataclasses.replace(_BERT.stacks[0], embedding_projection="embeddings_project"),),
)

_DISTILBERT = Architecture(
    model_type="distilbert",
    stacks=(
        StackEntry(
            name="encoder",
            layers="transformer.layer",
            norm="post",
            branches=(
                AttentionEntry(
                    kind="attention",
                    residual=At("attention"),
                    norm="sa_layer_norm",
                    input=At("attention"),
                    query="attention.q_lin",
                    key="attention.k_lin",
                    value="attention.v_lin",
                    output="attention.out_lin",
                    end="attention",
                ),
                MLPEntry(
                    residual=At("ffn"),
                    norm="output_layer_norm",
                    input=At("ffn"),
                    inner=("ffn.lin1",),
                    activation="ffn.activation",
                    output="ffn.lin2",
                    end="ffn",
                ),
            ),
            embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings"),
            embedding_norm="embeddings.LayerNorm",
        ),
    ),
)

_MODERNBERT = Architecture(
    model_type="modernbert",
    stacks=(
        StackEntry(
            name="encoder",
            layers="layers",
            norm="pre",
            branches=(
                AttentionEntry(
                    kind="attention",
                    residual=At("attn_norm"),
                    norm="attn_norm",  # nn.Identity in layer 0, whose input the embeddings' norm has just made
                    input=At("attn"),
                    query=Rows("attn.Wqkv", 0, of=3),
                    key=Rows("attn.Wqkv", 1, of=3),
                    value=Rows("attn.Wqkv", 2, of=3),
                    output="attn.Wo",
                    end="attn",
                ),
                MLPEntry(
                    residual=At("mlp_norm"),
                    norm="mlp_norm",
                    input=At("mlp"),
                    inner=(Rows("mlp.Wi", 0, of=2), Rows("mlp.Wi", 1, of=2)),
                    activation="mlp.act",
                    output="mlp.Wo",
                    end="mlp",
                ),
            ),
            embeddings=("embeddings.tok_embeddings",),
            embedding_norm="embeddings.norm",
            final_norm="final_norm",
        ),
    ),
)

_GPT2 = Architecture(
    model_type="gpt2",
    stacks=(
        StackEntry(
            name="decoder",
            layers="h",
            norm="pre",
            branches=(
                AttentionEntry(
                    kind="attention",
                    residual=At("ln_1"),
                    norm="ln_1",
                    input=At("attn"),
                    query=Rows("attn.c_attn", 0, of=3),
                    key=Rows("attn.c_attn", 1, of=3),
                    value=Rows("attn.c_attn", 2, of=3),
                    output="attn.c_proj",
                    end="attn",
                ),
                AttentionEntry(
                    kind="cross_attention",
                    residual=At("ln_cross_attn"),
                    norm="ln_cross_attn",
                    input=At("crossattention"),
                    query="crossattention.q_attn",
                    key=Rows("crossattention.c_attn", 0, of=2),
                    value=Rows("crossattention.c_attn", 1, of=2),
                    output="crossattention.c_proj",
                    end="crossattention",
                    optional=True,
                ),
                MLPEntry(
                    residual=At("ln_2"),
                    norm="ln_2",
                    input=At("mlp"),
                    inner=("mlp.c_fc",),
                    activation="mlp.act",
                    output="mlp.c_proj",
                    end="mlp",
                ),
            ),
            embeddings=("wte", "wpe"),
            final_norm="ln_f",
        ),
    ),
)

_GPT_NEOX = Architecture(
    model_type="gpt_neox",
    when={"use_parallel_residual": False},
    stacks=(
        StackEntry(
            name="decoder",
            layers="layers",
            norm="pre",
            branches=(
                AttentionEntry(
                    kind="attention",
                    residual=At("input_layernorm"),
                    norm="input_layernorm",
                    input=At("attention"),
                    query=Rows("attention.query_key_value", 0, of=3, per_head=True),
                    key=Rows("attention.query_key_value", 1, of=3, per_head=True),
                    value=Rows("attention.query_key_value", 2, of=3, per_head=True),
                    output="attention.dense",
                    end="post_attention_dropout",
                ),
                MLPEntry(
                    residual=At("post_attention_layernorm"),
                    norm="post_attention_layernorm",
                    input=At("mlp"),
                    inner=("mlp.dense_h_to_4h",),
                    activation="mlp.act",
                    output="mlp.dense_4h_to_h",
                    end="post_mlp_dropout",
                ),
            ),
            embeddings=("embed_in",),
            final_norm="final_layer_norm",
        ),
    ),
)

_GPT_NEOX_PARALLEL = Architecture(
    model_type="gpt_neox",
    when={"use_parallel_residual": True},
    stacks=(dataclasses.replace(_GPT_NEOX.stacks[0], parallel=True),),
)


def _fairseq_attention(kind: Kind, module: str, residual: At, input_argument: int | str) -> AttentionEntry:
    """As OPT and BART name it, after fairseq."""
    return AttentionEntry(
        kind=kind,
        residual=residual,
        norm=f"{module}_layer_norm",
        input=At(module, input_argument),
        query=f"{module}.q_proj",
        key=f"{module}.k_proj",
        value=f"{module}.v_proj",
        output=f"{module}.out_proj",
        end=module,
    )


def _fairseq_mlp(residual: At) -> MLPEntry:
    return MLPEntry(
        residual=residual,
        norm="final_layer_norm",
        input=At("fc1"),
        inner=("fc1",),
        activation="activation_fn",
        output="fc2",
        end="fc2",
    )


_OPT_PRE = Architecture(
    model_type="opt",
    when={"do_layer_norm_before": True},
    stacks=(
        StackEntry(
            name="decoder",
            layers="decoder.layers",
            norm="pre",
            branches=(
                _fairseq_attention("attention", "self_attn", At("self_attn_layer_norm"), "hidden_states"),
                _fairseq_mlp(At("final_layer_norm")),
            ),
            dropout="dropout",
            embeddings=("decoder.embed_tokens", "decoder.embed_positions"),
            embedding_projection="decoder.project_in",
            final_norm="decoder.final_layer_norm",
        ),
    ),
)

_OPT_POST = Architecture(
    model_type="opt",
    when={"do_layer_norm_before": False},
    stacks=(
        dataclasses.replace(
            _OPT_PRE.stacks[0],
            norm="post",
            branches=(
                _fairseq_attention("attention", "self_attn", At("self_attn", "hidden_states"), "hidden_states"),
                _fairseq_mlp(At("fc1")),
            ),
        ),
    ),
)

_LLAMA = Architecture(
    model_type="llama",
    stacks=(
        StackEntry(
            name="decoder",
            layers="layers",
            norm="pre",
            branches=(
                AttentionEntry(
                    kind="attention",
                    residual=At("input_layernorm"),
                    norm="input_layernorm",
                    input=At("self_attn", "hidden_states"),
                    query="self_attn.q_proj",
                    key="self_attn.k_proj",
                    value="self_attn.v_proj",
                    output="self_attn.o_proj",
                    end="self_attn",
                ),
                MLPEntry(
                    residual=At("post_attention_layernorm"),
                    norm="post_attention_layernorm",
                    input=At("mlp"),
                    inner=("mlp.gate_proj", "mlp.up_proj"),
                    activation="mlp.act_fn",
                    output="mlp.down_proj",
                    end="mlp",
                ),
            ),
            embeddings=("embed_tokens",),
            final_norm="norm",
        ),
    ),
)

_MISTRAL = dataclasses.replace(_LLAMA, model_type="mistral")
_QWEN2 = dataclasses.replace(_LLAMA, model_type="qwen2")
_QWEN3 = dataclasses.replace(_LLAMA, model_type="qwen3")


def _t5_attention(kind: Kind, sublayer: str, module: str) -> AttentionEntry:
    return AttentionEntry(
        kind=kind,
        residual=At(f"{sublayer}.layer_norm"),
        norm=f"{sublayer}.layer_norm",
        input=At(f"{sublayer}.{module}"),
        query=f"{sublayer}.{module}.q",
        key=f"{sublayer}.{module}.k",
        value=f"{sublayer}.{module}.v",
        output=f"{sublayer}.{module}.o",
        end=f"{sublayer}.dropout",
    )


def _t5_mlp(sublayer: str, *inner: str) -> MLPEntry:
    return MLPEntry(
        residual=At(f"{sublayer}.layer_norm"),
        norm=f"{sublayer}.layer_norm",
        input=At(f"{sublayer}.DenseReluDense"),
        inner=tuple(f"{sublayer}.DenseReluDense.{name}" for name in inner),
        activation=f"{sublayer}.DenseReluDense.act",
        output=f"{sublayer}.DenseReluDense.wo",
        end=f"{sublayer}.dropout",
    )


def _t5(gated: bool) -> Architecture:
    inner = ("wi_0", "wi_1") if gated else ("wi",)
    encoder = StackEntry(
        name="encoder",
        layers="encoder.block",
        norm="pre",
        branches=(_t5_attention("attention", "layer.0", "SelfAttention"), _t5_mlp("layer.1", *inner)),
        embeddings=("encoder.embed_tokens",),
        final_norm="encoder.final_layer_norm",
    )
    decoder = StackEntry(
        name="decoder",
        layers="decoder.block",
        norm="pre",
        branches=(
            _t5_attention("attention", "layer.0", "SelfAttention"),
            _t5_attention("cross_attention", "layer.1", "EncDecAttention"),
            _t5_mlp("layer.2", *inner),
        ),
        embeddings=("decoder.embed_tokens",),
        final_norm="decoder.final_layer_norm",
    )
    return Architecture(model_type="t5", when={"is_gated_act": gated}, stacks=(encoder, decoder))


def _bart_stack(name: str, *attention: AttentionEntry) -> StackEntry:
    return StackEntry(
        name=name,
        layers=f"{name}.layers",
        norm="post",
        branches=(*attention, _fairseq_mlp(At("fc1"))),
        dropout="dropout",
        embeddings=(f"{name}.embed_tokens", f"{name}.embed_positions"),
        embedding_norm=f"{name}.layernorm_embedding",
    )


_BART_SELF = _fairseq_attention("attention", "self_attn", At("self_attn"), 0)
_BART_CROSS = _fairseq_attention("cross_attention", "encoder_attn", At("encoder_attn"), 0)

_BART = Architecture(
    model_type="bart",
    stacks=(_bart_stack("encoder", _BART_SELF), _bart_stack("decoder", _BART_SELF, _BART_CROSS)),
)

_TABLE: list[Architecture] = [
    _BART,
    _BERT,
    _DISTILBERT,
    _ELECTRA,
    _GPT2,
    _GPT_NEOX,
    _GPT_NEOX_PARALLEL,
    _LLAMA,
    _MISTRAL,
    _MODERNBERT,
    _OPT_POST,
    _OPT_PRE,
    _QWEN2,
    _QWEN3,
    _ROBERTA,
    _t5(gated=False),
    _t5(gated=True),
]

_TO_FILL_IN = """\
from hf_gradguard.patch.entry import Architecture, At, AttentionEntry, MLPEntry, StackEntry

register_architecture(Architecture(
    model_type={model_type!r},
    stacks=(StackEntry(
        name="decoder",
        layers="layers",                # the ModuleList of layers, from the model without its head
        norm="pre",                     # or "post"
        embeddings=("embed_tokens",),
        final_norm="norm",              # None if there is none
        branches=(                      # paths from here on start at one layer
            AttentionEntry(
                kind="attention",
                residual=At("input_layernorm"),               # whose argument 0 is x, to which the branch is added
                norm="input_layernorm",
                input=At("self_attn", "hidden_states"),
                query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj",
                output="self_attn.o_proj",                    # the branch's last Linear
                end="self_attn",                              # whose output is added to x
            ),
            MLPEntry(
                residual=At("post_attention_layernorm"), norm="post_attention_layernorm", input=At("mlp"),
                inner=("mlp.gate_proj", "mlp.up_proj"), activation="mlp.act_fn",
                output="mlp.down_proj", end="mlp",
            ),
        ),
    ),),
))"""


def list_architectures() -> list[str]:
    """The `model_type`s whose models can be patched, sorted."""
    return sorted({entry.model_type for entry in _TABLE})


def register_architecture(architecture: Architecture) -> None:
    """Makes models of one more `model_type` known, or one more variant of a known one.

    Args:
        architecture: the entry. Its paths are checked when a model is read.

    Raises:
        ValueError: there is an entry for this `model_type` with the same `when`.
    """
    for entry in _TABLE:
        if entry.model_type == architecture.model_type and dict(entry.when) == dict(architecture.when):
            condition = f" with {dict(entry.when)}" if entry.when else ""
            raise ValueError(
                f"there is an entry for model_type {entry.model_type!r}{condition} already; "
                "give the model a model_type of its own, or tell the entries apart by `when`"
            )
    _TABLE.append(architecture)


def find_architecture(config: Any) -> Architecture:
    """The entry for models with this config.

    Raises:
        ValueError: there is none; the message lists what is supported and shows an entry to fill in.
    """
    known = [entry for entry in _TABLE if entry.model_type == config.model_type]
    for entry in known:
        if entry.fits(config):
            return entry
    if known:
        asked = sorted({name for entry in known for name in entry.when})
        found = ", ".join(f"{name}={getattr(config, name, None)!r}" for name in asked)
        variants = "; ".join(", ".join(f"{k}={v!r}" for k, v in entry.when.items()) for entry in known)
        raise ValueError(
            f"no entry for model_type {config.model_type!r} fits a config with {found}; there are entries for "
            f"{variants}. Add one for this variant:\n\n{_TO_FILL_IN.format(model_type=config.model_type)}"
        )
    raise ValueError(
        f"model_type {config.model_type!r} is not in the table of architectures; supported: "
        f"{', '.join(list_architectures())}. For a model of another kind, fill in an entry (the one shown "
        f"is Llama's):\n\n{_TO_FILL_IN.format(model_type=config.model_type)}"
    )
