"""The layout read from a model against expectations written down by hand from each model's source."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from hf_gradguard.observe.layout import Group, Layout, ParameterInfo
from hf_gradguard.observe.structure import read_layout

WIDTH, INNER, HEADS, VOCAB, LAYERS = 8, 12, 2, 19, 3


@dataclass
class Expected:
    """Where things are in one architecture: paths outside the layers, paths below a layer inside."""

    stacks: dict[str, str]
    attention: list[str]
    mlp: list[str]
    embeddings: list[str]
    final_norm: dict[str, str] = field(default_factory=dict)
    head: list[str] = field(default_factory=list)


@dataclass
class Case:
    build: Callable[[], nn.Module]
    expected: Expected

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()


def size(config: type[hf.PreTrainedConfig], **more: object) -> hf.PreTrainedConfig:
    """A tiny configuration: the common sizes where the class knows them."""
    common = {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "vocab_size": VOCAB,
        "pad_token_id": 0,
    }
    known = inspect.signature(config).parameters
    return config(**{key: value for key, value in common.items() if key in known} | more)


BERT_LAYER = {"attention": ["attention"], "mlp": ["intermediate", "output"]}
BART_LAYER = {
    "attention": ["self_attn", "self_attn_layer_norm", "encoder_attn", "encoder_attn_layer_norm"],
    "mlp": ["fc1", "fc2", "final_layer_norm"],
}
LLAMA_LAYER = {"attention": ["input_layernorm", "self_attn"], "mlp": ["post_attention_layernorm", "mlp"]}
GPT2_LAYER = {"attention": ["ln_1", "attn"], "mlp": ["ln_2", "mlp"]}


def opt(norm_first: bool) -> hf.PreTrainedModel:
    config = size(hf.OPTConfig, ffn_dim=INNER, word_embed_proj_dim=4, do_layer_norm_before=norm_first)
    return hf.OPTForCausalLM(config)


def llama_like(model: type[hf.PreTrainedModel], config: type[hf.PreTrainedConfig], **more: object) -> Case:
    build = lambda: model(size(config, num_key_value_heads=1, head_dim=4, tie_word_embeddings=False, **more))  # noqa: E731
    expected = Expected(
        {"": "model.layers"},
        **LLAMA_LAYER,
        embeddings=["model.embed_tokens"],
        final_norm={"": "model.norm"},
        head=["lm_head"],
    )
    return Case(build, expected)


def bert_like(build: Callable[[], nn.Module], name: str, head: list[str], **more: list[str]) -> Case:
    embeddings = [f"{name}.embeddings", *more.get("embeddings", [])]
    return Case(build, Expected({"": f"{name}.encoder.layer"}, **BERT_LAYER, embeddings=embeddings, head=head))


BART = {"d_model": WIDTH, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_layers": LAYERS}
BART |= {"decoder_layers": LAYERS, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER, "vocab_size": VOCAB}

CASES = {
    "bert": bert_like(lambda: hf.BertForMaskedLM(size(hf.BertConfig)), "bert", ["cls"]),
    "bert classifier": bert_like(
        lambda: hf.BertForSequenceClassification(size(hf.BertConfig)), "bert", ["bert.pooler", "classifier"]
    ),
    "roberta": bert_like(lambda: hf.RobertaForMaskedLM(size(hf.RobertaConfig)), "roberta", ["lm_head"]),
    "electra": bert_like(
        lambda: hf.ElectraForPreTraining(size(hf.ElectraConfig, embedding_size=4)),
        "electra",
        ["discriminator_predictions"],
        embeddings=["electra.embeddings_project"],
    ),
    "deberta-v2": bert_like(
        lambda: hf.DebertaV2ForMaskedLM(
            size(
                hf.DebertaV2Config,
                relative_attention=True,
                pos_att_type=["p2c", "c2p"],
                norm_rel_ebd="layer_norm",
                conv_kernel_size=3,
            )
        ),
        "deberta",
        ["cls"],
        embeddings=["deberta.encoder.rel_embeddings", "deberta.encoder.LayerNorm", "deberta.encoder.conv"],
    ),
    "distilbert": Case(
        lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(vocab_size=VOCAB, dim=WIDTH, hidden_dim=INNER, n_layers=LAYERS, n_heads=HEADS)
        ),
        Expected(
            {"": "distilbert.transformer.layer"},
            attention=["attention", "sa_layer_norm"],
            mlp=["ffn", "output_layer_norm"],
            embeddings=["distilbert.embeddings"],
            head=["vocab_transform", "vocab_layer_norm", "vocab_projector"],
        ),
    ),
    "modernbert": Case(
        lambda: hf.ModernBertForMaskedLM(size(hf.ModernBertConfig)),
        Expected(
            {"": "model.layers"},
            attention=["attn_norm", "attn"],
            mlp=["mlp_norm", "mlp"],
            embeddings=["model.embeddings"],
            final_norm={"": "model.final_norm"},
            head=["head", "decoder"],
        ),
    ),
    "gpt2": Case(
        lambda: hf.GPT2LMHeadModel(size(hf.GPT2Config, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS)),
        Expected(
            {"": "transformer.h"},
            **GPT2_LAYER,
            embeddings=["transformer.wte", "transformer.wpe"],
            final_norm={"": "transformer.ln_f"},
        ),
    ),
    "gpt_neo": Case(
        lambda: hf.GPTNeoForCausalLM(
            size(hf.GPTNeoConfig, num_layers=LAYERS, num_heads=HEADS, attention_types=[[["global"], LAYERS]])
        ),
        Expected(
            {"": "transformer.h"},
            **GPT2_LAYER,
            embeddings=["transformer.wte", "transformer.wpe"],
            final_norm={"": "transformer.ln_f"},
        ),
    ),
    "gpt_neox": Case(
        lambda: hf.GPTNeoXForCausalLM(size(hf.GPTNeoXConfig)),
        Expected(
            {"": "gpt_neox.layers"},
            attention=["input_layernorm", "attention"],
            mlp=["post_attention_layernorm", "mlp"],
            embeddings=["gpt_neox.embed_in"],
            final_norm={"": "gpt_neox.final_layer_norm"},
            head=["lm_head"],
        ),
    ),
    "opt, norm first": Case(
        lambda: opt(True),
        Expected(
            {"": "model.decoder.layers"},
            **BART_LAYER,
            embeddings=["model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.project_in"],
            final_norm={"": "model.decoder.final_layer_norm"},
            head=["model.decoder.project_out"],
        ),
    ),
    "opt, norm last": Case(
        lambda: opt(False),
        Expected(
            {"": "model.decoder.layers"},
            **BART_LAYER,
            embeddings=["model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.project_in"],
            head=["model.decoder.project_out"],
        ),
    ),
    "llama": llama_like(hf.LlamaForCausalLM, hf.LlamaConfig),
    "qwen3": llama_like(hf.Qwen3ForCausalLM, hf.Qwen3Config),
    "mixtral": llama_like(hf.MixtralForCausalLM, hf.MixtralConfig, num_local_experts=2),
    "gemma2": Case(
        lambda: hf.Gemma2ForCausalLM(size(hf.Gemma2Config, num_key_value_heads=1, head_dim=4)),
        Expected(
            {"": "model.layers"},
            attention=["input_layernorm", "self_attn", "post_attention_layernorm"],
            mlp=["pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"],
            embeddings=["model.embed_tokens"],
            final_norm={"": "model.norm"},
        ),
    ),
    "mamba": Case(
        lambda: hf.MambaForCausalLM(size(hf.MambaConfig, state_size=4)),
        Expected(
            {"": "backbone.layers"},
            attention=["norm", "mixer"],
            mlp=[],
            embeddings=["backbone.embeddings"],
            final_norm={"": "backbone.norm_f"},
        ),
    ),
    "t5 encoder": Case(
        lambda: hf.T5EncoderModel(
            hf.T5Config(vocab_size=VOCAB, d_model=WIDTH, d_kv=4, d_ff=INNER, num_layers=LAYERS, num_heads=HEADS)
        ),
        Expected(
            {"": "encoder.block"},
            attention=["layer.0"],
            mlp=["layer.1"],
            embeddings=["shared"],
            final_norm={"": "encoder.final_layer_norm"},
        ),
    ),
    "bart": Case(
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
        Expected(
            {"encoder": "model.encoder.layers", "decoder": "model.decoder.layers"},
            **BART_LAYER,
            embeddings=[
                "model.shared",
                *(
                    f"model.{side}.{name}"
                    for side in ("encoder", "decoder")
                    for name in ("embed_positions", "layernorm_embedding")
                ),
            ],
        ),
    ),
    "mbart": Case(
        lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**BART)),
        Expected(
            {"encoder": "model.encoder.layers", "decoder": "model.decoder.layers"},
            **BART_LAYER,
            embeddings=[
                "model.shared",
                *(
                    f"model.{side}.{name}"
                    for side in ("encoder", "decoder")
                    for name in ("embed_positions", "layernorm_embedding")
                ),
            ],
            final_norm={"encoder": "model.encoder.layer_norm", "decoder": "model.decoder.layer_norm"},
        ),
    ),
    "vit": Case(
        lambda: hf.ViTForImageClassification(size(hf.ViTConfig, image_size=8, patch_size=4)),
        Expected(
            {"": "vit.layers"},
            attention=["layernorm_before", "attention"],
            mlp=["layernorm_after", "mlp"],
            embeddings=["vit.embeddings"],
            final_norm={"": "vit.layernorm"},
            head=["classifier"],
        ),
    ),
    "wav2vec2": Case(
        lambda: hf.Wav2Vec2ForCTC(
            size(
                hf.Wav2Vec2Config,
                conv_dim=(4, 4),
                conv_stride=(2, 2),
                conv_kernel=(3, 3),
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
            )
        ),
        Expected(
            {"": "wav2vec2.encoder.layers"},
            attention=["attention", "layer_norm"],
            mlp=["feed_forward", "final_layer_norm"],
            embeddings=[
                "wav2vec2.masked_spec_embed",
                "wav2vec2.feature_extractor",
                "wav2vec2.feature_projection",
                "wav2vec2.encoder.pos_conv_embed",
                "wav2vec2.encoder.layer_norm",
            ],
            head=["lm_head"],
        ),
    ),
}


def below(name: str, paths: list[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def expected_place(name: str, expected: Expected) -> tuple[str, str | None]:
    """Group's name and part of a parameter, by the hand-written paths; exactly one of them must hold it."""
    places: list[tuple[str, str | None]] = []
    for stack, path in expected.stacks.items():
        if below(name, [path]):
            depth, inside = name.removeprefix(f"{path}.").split(".", 1)
            parts = [part for part in ("attention", "mlp") if below(inside, getattr(expected, part))]
            places += [(f"{stack} layer {depth}".strip(), part) for part in parts]
    places += [
        (f"{stack} final norm".strip(), None) for stack, path in expected.final_norm.items() if below(name, [path])
    ]
    places += [(kind, None) for kind in ("embeddings", "head") if below(name, getattr(expected, kind))]
    assert len(places) == 1, f"{name}: the expectation is ambiguous or lacks it: {places}"
    return places[0]


def places(layout: Layout) -> dict[str, tuple[str, str | None]]:
    return {info.name: (layout.groups[info.group].name, info.part) for info in layout.parameters}


def expected_groups(expected: Expected) -> list[str]:
    names = ["embeddings"]
    for stack in expected.stacks:
        names += [f"{stack} layer {depth}".strip() for depth in range(LAYERS)]
        names += [f"{stack} final norm".strip()] if stack in expected.final_norm else []
    return names + (["head"] if expected.head else [])


@pytest.fixture(params=CASES, name="case")
def _case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_every_parameter_is_in_the_group_and_part_that_its_architecture_says(case: Case) -> None:
    model = case.model()
    layout, _ = read_layout(model)
    assert places(layout) == {name: expected_place(name, case.expected) for name, _ in model.named_parameters()}


def test_groups_come_in_the_order_of_the_forward_pass(case: Case) -> None:
    layout, _ = read_layout(case.model())
    assert [group.name for group in layout.groups] == expected_groups(case.expected)


def test_a_layer_owns_exactly_the_tensors_of_its_module(case: Case) -> None:
    model = case.model()
    layout, tensors = read_layout(model)
    for stack, path in case.expected.stacks.items():
        for depth in range(LAYERS):
            group = layout.groups.index(Group(f"{stack} layer {depth}".strip(), "layer", stack, depth))
            owned = {id(tensor) for tensor, info in zip(tensors, layout.parameters, strict=True) if info.group == group}
            assert owned == {id(parameter) for parameter in model.get_submodule(f"{path}.{depth}").parameters()}


def test_tensors_names_shapes_and_types_are_those_of_named_parameters(case: Case) -> None:
    model = case.model()
    layout, tensors = read_layout(model)
    named = list(model.named_parameters())
    assert [id(tensor) for tensor in tensors] == [id(parameter) for _, parameter in named]
    assert [(info.name, info.shape, info.numel) for info in layout.parameters] == [
        (name, tuple(parameter.shape), parameter.numel()) for name, parameter in named
    ]
    assert {info.dtype for info in layout.parameters} == {"float32"}


def test_every_alias_leads_to_the_same_tensor_and_every_name_is_listed_once(case: Case) -> None:
    model = case.model()
    layout, tensors = read_layout(model)
    for info, tensor in zip(layout.parameters, tensors, strict=True):
        assert all(model.get_parameter(alias) is tensor for alias in info.aliases)
    names = [name for info in layout.parameters for name in (info.name, *info.aliases)]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False))


def bert(**more: object) -> nn.Module:
    return hf.BertForMaskedLM(size(hf.BertConfig, **more))


def test_t5_keeps_encoder_and_decoder_apart_and_cross_attention_is_attention() -> None:
    config = hf.T5Config(vocab_size=VOCAB, d_model=WIDTH, d_kv=4, d_ff=INNER, num_layers=2, num_heads=HEADS)
    model = hf.T5ForConditionalGeneration(config)
    layout, _ = read_layout(model)
    assert [group.name for group in layout.groups] == [
        "embeddings",
        "encoder layer 0",
        "encoder layer 1",
        "encoder final norm",
        "decoder layer 0",
        "decoder layer 1",
        "decoder final norm",
    ]
    assert layout.layers == (1, 2, 4, 5)
    place = places(layout)
    for name in place:
        if name.startswith("decoder.block.1.layer.2."):
            assert place[name] == ("decoder layer 1", "mlp")
        elif name.startswith("decoder.block.1."):
            assert place[name] == ("decoder layer 1", "attention")


def test_albert_s_shared_layer_is_one_layer() -> None:
    model = hf.AlbertForMaskedLM(size(hf.AlbertConfig, embedding_size=4))
    layout, tensors = read_layout(model)
    shared = model.get_submodule("albert.encoder.albert_layer_groups.0")
    assert [group.name for group in layout.groups] == ["embeddings", "layer 0", "head"]
    owned = {id(tensor) for tensor, info in zip(tensors, layout.parameters, strict=True) if info.group == 1}
    assert owned == {id(parameter) for parameter in shared.parameters()}
    place = places(layout)
    inner = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    assert place["albert.encoder.embedding_hidden_mapping_in.weight"] == ("embeddings", None)
    assert place[f"{inner}.attention.query.weight"] == ("layer 0", "attention")
    assert place[f"{inner}.ffn.weight"] == ("layer 0", "mlp")


def test_parallel_lists_of_attentions_and_feed_forwards_form_layers_together() -> None:
    layout, _ = read_layout(hf.XLMModel(hf.XLMConfig(vocab_size=VOCAB, emb_dim=WIDTH, n_layers=2, n_heads=HEADS)))
    place = places(layout)
    lists = {"attentions": "attention", "layer_norm1": "attention", "ffns": "mlp", "layer_norm2": "mlp"}
    inside = {name: place[name] for name in place if name.split(".")[0] in lists}
    assert inside == {name: (f"layer {name.split('.')[1]}", lists[name.split(".")[0]]) for name in inside}
    assert {place[name] for name in place if name not in inside} == {("embeddings", None)}


def test_the_layers_of_all_stages_form_one_stack_with_what_is_between_stages_beside_the_layer_before() -> None:
    config = hf.SwinConfig(image_size=16, patch_size=2, embed_dim=4, depths=[1, 2], num_heads=[1, 2], window_size=2)
    layout, tensors = read_layout(model := hf.SwinModel(config))
    assert [layout.groups[index].depth for index in layout.layers] == [0, 1, 2]
    for depth, paths in enumerate(["0.blocks.0 0.downsample", "1.blocks.0", "1.blocks.1"]):
        modules = [model.get_submodule(f"encoder.layers.{path}") for path in paths.split()]
        group = layout.layers[depth]
        owned = {id(tensor) for tensor, info in zip(tensors, layout.parameters, strict=True) if info.group == group}
        assert owned == {id(parameter) for module in modules for parameter in module.parameters()}


def test_a_tied_weight_is_listed_once_with_its_other_name() -> None:
    layout, _ = read_layout(hf.GPT2LMHeadModel(size(hf.GPT2Config, n_embd=WIDTH, n_layer=1, n_head=HEADS)))
    tied = [info for info in layout.parameters if "wte" in info.name or "lm_head" in info.name]
    assert [(info.name, info.aliases) for info in tied] == [("transformer.wte.weight", ("lm_head.weight",))]


def test_frozen_layers_are_left_out_and_depths_stay_true() -> None:
    model = bert()
    for path in ("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"):
        model.get_submodule(path).requires_grad_(False)
    layout, tensors = read_layout(model)
    assert layout.groups == (Group("layer 2", "layer", "", 2), Group("head", "head"))
    assert [id(tensor) for tensor in tensors] == [id(p) for p in model.parameters() if p.requires_grad]


def test_a_model_with_nothing_to_train_has_an_empty_layout() -> None:
    layout, tensors = read_layout(bert().requires_grad_(False))
    assert (layout, tensors) == (Layout((), ()), [])
    assert layout.group_squares(np.zeros((4, 0))).shape == (4, 0)


def test_a_model_of_one_layer_has_one_layer() -> None:
    layout, _ = read_layout(bert(num_hidden_layers=1))
    assert [group.name for group in layout.groups] == ["embeddings", "layer 0", "head"]


@pytest.fixture(name="process_group")
def _process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_around_the_model_changes_nothing() -> None:
    model = bert()
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert read_layout(wrapped)[0] == read_layout(model)[0]


@pytest.mark.usefixtures("process_group")
def test_ddp_around_a_compiled_model_and_the_reverse_change_nothing() -> None:
    model = bert()
    plain = read_layout(model)[0]
    assert read_layout(nn.parallel.DistributedDataParallel(torch.compile(model)))[0] == plain
    assert read_layout(torch.compile(nn.parallel.DistributedDataParallel(model)))[0] == plain


@pytest.mark.usefixtures("process_group")
def test_fully_sharded_parameters_keep_their_place_and_full_shape() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = bert()
    plain = read_layout(model)[0]
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.get_submodule("bert.encoder.layer").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert read_layout(model)[0] == plain


def test_compiled_layers_inside_a_model_change_nothing() -> None:
    model = bert()
    plain = read_layout(model)[0]
    layers = model.get_submodule("bert.encoder.layer")
    assert isinstance(layers, nn.ModuleList)
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer)
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    assert read_layout(model)[0] == plain


@pytest.mark.parametrize("targets", [["query", "value", "dense"], "all-linear"])
def test_lora_adapters_are_where_the_modules_they_adapt_are(targets: list[str] | str) -> None:
    peft = pytest.importorskip("peft")
    model = hf.BertForSequenceClassification(size(hf.BertConfig))
    base = places(read_layout(model)[0])
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS"))
    place = places(read_layout(adapted)[0])
    assert any("lora_A" in name for name in place)
    for name in place:
        original = name.removeprefix("base_model.model.").split(".lora_")[0].replace(".modules_to_save.default", "")
        assert place[name] == base[original if original in base else f"{original}.weight"]


def test_lora_on_codebook_heads_does_not_turn_them_into_layers() -> None:
    peft = pytest.importorskip("peft")

    class Codebooks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, HEADS, INNER) for _ in range(2))
            self.heads = nn.ModuleList(nn.Linear(WIDTH, VOCAB) for _ in range(2))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            for block in self.blocks:
                x = block(x)
            return [head(x) for head in self.heads]

    adapted = peft.get_peft_model(Codebooks(), peft.LoraConfig(r=2, target_modules=["linear1", "heads.0", "heads.1"]))
    place = places(read_layout(adapted)[0])
    assert {group for name, (group, _) in place.items() if "heads" in name} == {"head"}
    assert {group for name, (group, _) in place.items() if "linear1" in name} == {"layer 0", "layer 1"}


def test_order_of_use_beats_order_of_definition() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(WIDTH, VOCAB)
            self.last = nn.LayerNorm(WIDTH)
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, HEADS, INNER) for _ in range(2))
            self.first = nn.Linear(VOCAB, WIDTH)
            self.tokens = nn.Embedding(VOCAB, VOCAB)

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            if len(self.blocks) > 0 and self.last.eps > 0:
                x = self.first(self.tokens(x))
            return x

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.encode(x)
            for block in self.blocks:
                x = block(x)
            return self.out(self.last(x))

    layout, _ = read_layout(Backwards())
    group = {name.split(".")[0]: place[0] for name, place in places(layout).items() if not name.startswith("blocks")}
    assert group == {"tokens": "embeddings", "first": "embeddings", "last": "final norm", "out": "head"}
    parts = {name.split(".")[2]: part for name, (group, part) in places(layout).items() if group == "layer 1"}
    assert parts == {
        "self_attn": "attention",
        "norm1": "attention",
        "linear1": "mlp",
        "linear2": "mlp",
        "norm2": "mlp",
    }


def test_a_list_of_estimators_with_a_softmax_beside_the_layers_is_no_stack() -> None:
    class Estimator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.project(x).softmax(-1)

    class Estimated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, HEADS, INNER) for _ in range(2))
            self.estimators = nn.ModuleList(Estimator() for _ in range(2))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            for block in self.blocks:
                x = block(x)
            return [estimator(x) for estimator in self.estimators]

    layout, _ = read_layout(Estimated())
    assert [group.name for group in layout.groups] == ["layer 0", "layer 1", "head"]


def test_attention_that_takes_no_mask_is_attention() -> None:
    config = size(hf.YolosConfig, image_size=[8, 8], patch_size=4, num_detection_tokens=2)
    place = places(read_layout(hf.YolosModel(config, add_pooling_layer=False))[0])
    layer = {name.removeprefix("encoder.layer.1."): part for name, (group, part) in place.items() if group == "layer 1"}
    for name in layer:
        assert layer[name] == ("attention" if below(name, ["layernorm_before", "attention"]) else "mlp")


def test_experts_that_receive_a_mask_of_routes_are_mlp() -> None:
    config = hf.NllbMoeConfig(**BART, num_experts=2, encoder_sparse_step=1, decoder_sparse_step=1)
    place = places(read_layout(hf.NllbMoeModel(config))[0])
    experts = {part for name, (_, part) in place.items() if ".ffn." in name}
    assert experts == {"mlp"}


def test_a_layer_that_stands_in_its_list_twice_counts_where_it_stands_first() -> None:
    shared, last = (nn.TransformerEncoderLayer(WIDTH, HEADS, INNER) for _ in range(2))
    layout, _ = read_layout(nn.Sequential(shared, shared, last))
    assert [group.name for group in layout.groups] == ["layer 0", "layer 2"]
    assert all(len(info.aliases) == (info.name.startswith("0.")) for info in layout.parameters)


def test_without_a_stack_every_module_with_weights_is_a_layer_and_the_last_linear_is_the_head() -> None:
    layers = [nn.Linear(4, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 6), nn.Linear(6, 2)]
    layout, _ = read_layout(nn.Sequential(nn.Embedding(VOCAB, 4), *layers))
    assert {name: group for name, (group, _) in places(layout).items()} == {
        "0.weight": "embeddings",
        "1.weight": "layer 0",
        "1.bias": "layer 0",
        "2.weight": "layer 0",
        "2.bias": "layer 0",
        "4.weight": "layer 1",
        "4.bias": "layer 1",
        "5.weight": "head",
        "5.bias": "head",
    }


def test_every_level_of_a_recurrent_module_is_a_layer() -> None:
    model = nn.ModuleDict(
        {
            "tokens": nn.Embedding(VOCAB, 4),
            "rnn": nn.LSTM(4, 5, num_layers=3, bidirectional=True, proj_size=2),
            "out": nn.Linear(4, VOCAB),
        }
    )
    layout, _ = read_layout(model)
    place = places(layout)
    recurrent = {name: group for name, (group, _) in place.items() if name.startswith("rnn")}
    assert len(recurrent) == 3 * 2 * 5
    for level in range(3):
        assert {group for name, group in recurrent.items() if f"_l{level}" in name} == {f"layer {level}"}
    assert place["tokens.weight"] == ("embeddings", None)
    assert place["out.weight"] == ("head", None)


def test_a_single_linear_is_a_layer() -> None:
    assert [group.name for group in read_layout(nn.Linear(2, 2))[0].groups] == ["layer 0"]


def test_a_thousand_layers_are_a_thousand_groups() -> None:
    with torch.device("meta"):
        layout, tensors = read_layout(
            hf.BertModel(size(hf.BertConfig, num_hidden_layers=1000), add_pooling_layer=False)
        )
    assert len(layout.layers) == 1000
    assert len(tensors) == 16 * 1000 + 5
    assert np.bincount(layout.group_of).tolist() == [5] + [16] * 1000


def test_half_precision_is_named() -> None:
    assert {info.dtype for info in read_layout(nn.Linear(2, 2).bfloat16())[0].parameters} == {"bfloat16"}


def test_group_squares_are_the_sums_over_each_group_s_parameters() -> None:
    layout, _ = read_layout(hf.BartForConditionalGeneration(hf.BartConfig(**BART)))
    squares = np.random.default_rng(0).random((3, 2, len(layout.parameters)))
    expected = np.stack([squares[..., layout.group_of == index].sum(-1) for index in range(len(layout.groups))], -1)
    np.testing.assert_allclose(layout.group_squares(squares), expected, rtol=1e-14)


def test_one_nan_makes_its_group_nan_and_no_other() -> None:
    layout, _ = read_layout(bert())
    squares = np.ones(len(layout.parameters))
    bad = next(index for index, info in enumerate(layout.parameters) if "layer.1." in info.name)
    squares[bad] = np.nan
    is_nan = np.isnan(layout.group_squares(squares))
    assert [group.name for group, nan in zip(layout.groups, is_nan, strict=True) if nan] == ["layer 1"]


def test_group_squares_refuse_another_number_of_parameters() -> None:
    layout = Layout((Group("layer 0", "layer", "", 0),), (ParameterInfo("w", 0, None, (2, 3), "float32"),))
    with pytest.raises(ValueError, match=r"2 entries on the last axis, the layout has 1 parameters"):
        layout.group_squares(np.ones(2))


def test_a_layout_survives_json(case: Case) -> None:
    layout, _ = read_layout(case.model())
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
