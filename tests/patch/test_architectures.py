"""The table says where things are: held against what the models compute."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from hf_gradguard.patch import (
    Anatomy,
    Architecture,
    At,
    AttentionEntry,
    Branch,
    Identity,
    MLPEntry,
    Part,
    Point,
    Rows,
    StackEntry,
    architectures,
    attach,
    list_architectures,
    read_architecture,
    register_architecture,
)
from tests.patch.models import ALL, CASES, WIDTH, logits

ATTENTION = ("attention", "cross_attention")


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_TABLE", list(architectures._TABLE))


class Spy:
    """Keeps what goes into and comes out of modules in one forward pass."""

    def __init__(self) -> None:
        self.seen: dict[object, Tensor] = {}

    def argument(self, key: object, point: Point) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            argument = point.argument
            self.seen[key] = kwargs[argument] if isinstance(argument, str) else args[argument]

        point.module.register_forward_pre_hook(hook, with_kwargs=True)

    def output(self, key: object, module: nn.Module) -> None:
        def hook(module: nn.Module, args: object, output: Any) -> None:
            self.seen[key] = output[0] if isinstance(output, tuple) else output

        module.register_forward_hook(hook)


def linear(part: Part, x: Tensor) -> Tensor:
    return F.linear(x, part.read(), part.read_bias())


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.reshape(expected.shape), expected, atol=1e-5, rtol=1e-5)


def attention_of(branch: Branch) -> str:
    return f"{branch.stack} {branch.layer} {branch.kind}"


@pytest.fixture
def heads() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Query, key and value of every attention that runs, each [batch, heads, length, head width]."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        seen.append((query, key, value))
        groups = query.shape[1] // key.shape[1]
        weights = (query @ key.repeat_interleave(groups, 1).transpose(2, 3)).softmax(-1)
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("gradguard_spy", spy)
    return seen


def test_the_table_has_the_architectures_that_are_promised() -> None:
    assert ", ".join(list_architectures()) == (
        "bart, bert, distilbert, electra, gpt2, gpt_neox, llama, mistral, modernbert, opt, qwen2, qwen3, roberta, t5"
    )


@pytest.mark.parametrize("name", ALL)
def test_x_plus_y_of_each_branch_is_what_the_next_one_gets(name: str) -> None:
    """Follows the stream through each stack with nothing but the taps' x and y, and the norms."""
    model, spy = CASES[name].make(), Spy()
    anatomy = read_architecture(model)
    for layer in anatomy.layers:
        spy.argument(layer.module, Point(layer.module, 0))
        spy.output((layer.module, "out"), layer.module)
    for branch in anatomy.branches:
        spy.argument((branch, "x"), branch.residual)
        spy.argument((branch, "input"), branch.input)
        spy.output((branch, "y"), branch.end)
    logits(model, CASES[name].inputs())
    for layer in anatomy.layers:
        stream = spy.seen[layer.module]
        for junction in layer.junctions:
            for branch in junction:
                close(spy.seen[branch, "x"], stream)
                is_pre = branch.norm_position == "pre"
                close(spy.seen[branch, "input"], branch.norm.value(stream) if is_pre else stream)
            stream = stream + sum(spy.seen[branch, "y"].reshape(stream.shape) for branch in junction)
            if junction[0].norm_position == "post":
                stream = junction[0].norm.value(stream)
        close(spy.seen[layer.module, "out"], stream)


@pytest.mark.parametrize("name", ALL)
def test_each_mlp_is_its_inner_maps_activation_and_output(name: str) -> None:
    model, spy = CASES[name].make(), Spy()
    branches = [branch for branch in read_architecture(model).branches if branch.kind == "mlp"]
    for branch in branches:
        spy.argument((branch, "input"), branch.input)
        spy.output((branch, "y"), branch.end)
    logits(model, CASES[name].inputs())
    for branch in branches:
        assert branch.activation is not None
        inner = [linear(part, spy.seen[branch, "input"]) for part in branch.inner]
        product = branch.activation.value(inner[0]) * (inner[1] if inner[1:] else 1)
        close(spy.seen[branch, "y"], linear(branch.output, product))


@pytest.mark.parametrize("name", ALL)
def test_each_query_key_and_value_is_made_by_its_part_and_by_no_other(
    name: str, heads: list[tuple[Tensor, Tensor, Tensor]]
) -> None:
    model = CASES[name].make()
    model.set_attn_implementation("gradguard_spy")
    branches = [branch for branch in read_architecture(model).branches if branch.kind in ATTENTION]
    logits(model, CASES[name].inputs())
    before = list(heads)
    assert len(before) == len(branches)
    for number, branch in enumerate(branches):
        for index, part in enumerate((branch.query, branch.key, branch.value)):
            assert part is not None
            saved = {key: value.clone() for key, value in model.state_dict().items()}
            part.write(torch.zeros(part.shape))
            part.write_bias(0.0)
            heads.clear()
            logits(model, CASES[name].inputs())
            for other, (found, expected) in enumerate(zip(heads[number], before[number], strict=True)):
                if other == index:
                    assert not found.any()
                else:
                    assert torch.equal(found, expected)
                    assert found.any()
            model.load_state_dict(saved)


@pytest.mark.parametrize("name", ALL)
def test_a_value_part_computes_the_values_head_by_head(name: str, heads: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Values are not rotated, so they are the part's output, in the order of the heads."""
    model, spy = CASES[name].make(), Spy()
    model.set_attn_implementation("gradguard_spy")
    branches = [branch for branch in read_architecture(model).branches if branch.kind in ATTENTION]
    for branch in branches:
        assert branch.value is not None
        spy.argument(branch, Point(branch.value.module, 0))
    logits(model, CASES[name].inputs())
    for branch, (_, _, value) in zip(branches, heads, strict=True):
        assert branch.value is not None
        close(linear(branch.value, spy.seen[branch]), value.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", ALL)
def test_attention_without_its_value_part_gives_the_output_bias_alone(name: str) -> None:
    model, spy = CASES[name].make(), Spy()
    branches = [branch for branch in read_architecture(model).branches if branch.kind in ATTENTION]
    for branch in branches:
        assert branch.value is not None
        branch.value.write(torch.zeros(branch.value.shape))
        branch.value.write_bias(0.0)
        spy.output(branch, branch.end)
    logits(model, CASES[name].inputs())
    for branch in branches:
        bias = branch.output.read_bias()
        y = spy.seen[branch]
        close(y, torch.zeros_like(y) if bias is None else bias.expand_as(y))


@pytest.mark.parametrize("name", ALL)
def test_parts_cover_every_weight_of_a_layer_but_the_norms_once(name: str) -> None:
    """What no part covers would be left out by an initialisation: only norms and T5's position table may be."""
    anatomy = read_architecture(CASES[name].make())
    for layer in anatomy.layers:
        covered: dict[nn.Module, int] = {}
        for branch in layer.branches:
            for part in (branch.query, branch.key, branch.value, branch.output, *branch.inner):
                if part is not None:
                    covered[part.module] = covered.get(part.module, 0) + part.out_features * part.in_features
        for module, count in covered.items():
            assert isinstance(module.weight, Tensor)
            assert count == module.weight.numel()
        left = {
            name
            for name, module in layer.module.named_modules()
            if list(module.parameters(recurse=False)) and module not in covered
        }
        assert all("norm" in name.lower() or "ln_" in name or "relative_attention_bias" in name for name in left)


@pytest.mark.parametrize("name", ALL)
def test_writing_a_part_changes_no_other(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for branch in read_architecture(CASES[name].make()).branches:
        parts = [p for p in (branch.query, branch.key, branch.value, branch.output, *branch.inner) if p is not None]
        for part in parts:
            others = [(other, other.read(), other.read_bias()) for other in parts if other is not part]
            values, bias = (torch.randn(size, generator=generator) for size in (part.shape, part.shape[:1]))
            part.write(values)
            part.write_bias(bias)
            assert torch.equal(part.read(), values)
            assert part.bias is None or torch.equal(part.read_bias(), bias)
            for other, weight, other_bias in others:
                assert torch.equal(other.read(), weight)
                assert other_bias is None or torch.equal(other.read_bias(), other_bias)


@pytest.mark.parametrize("name", ALL)
def test_embeddings_and_norms_of_each_stack_meet_the_stream(name: str) -> None:
    """The embeddings' sum, normed and projected, enters the first layer; the last layer's output, normed, leaves."""
    model, spy = CASES[name].make(), Spy()
    anatomy = read_architecture(model)
    for stack in anatomy.stacks:
        spy.argument((stack, "first"), Point(stack.layers[0].module, 0))
        spy.output((stack, "last"), stack.layers[-1].module)
        for embedding in stack.embeddings:
            spy.output(embedding, embedding)
        if stack.final_norm is not None:
            spy.argument((stack, "norm"), Point(stack.final_norm.value, 0))
    logits(model, CASES[name].inputs())
    for stack in anatomy.stacks:
        parts = [spy.seen[embedding] for embedding in stack.embeddings]
        if stack.embedding_projection is not None and stack.embedding_norm is None:  # OPT projects tokens alone
            parts[0] = stack.embedding_projection(parts[0])
        total = torch.stack([part.expand(parts[0].shape) for part in parts]).sum(0)
        if stack.embedding_norm is not None:
            total = stack.embedding_norm.value(total)
            total = stack.embedding_projection(total) if stack.embedding_projection is not None else total
        close(spy.seen[stack, "first"], total)
        if stack.final_norm is not None:
            assert torch.equal(spy.seen[stack, "norm"], spy.seen[stack, "last"])


def test_branches_know_their_place_in_depth() -> None:
    encoder, decoder = read_architecture(CASES["bart"].make()).stacks
    assert [branch.index for branch in encoder.branches] == list(range(4))
    assert [branch.index for branch in decoder.branches] == list(range(6))
    assert {(branch.depth, branch.count) for branch in decoder.branches} == {(2, 6)}
    assert [branch.layer for branch in decoder.branches] == [0, 0, 0, 1, 1, 1]
    assert str(decoder.branches[4]) == "cross_attention of decoder layer 1"
    assert {branch.output.out_features for branch in decoder.branches} == {WIDTH}


@pytest.mark.parametrize(
    ("head", "name", "stacks"),
    [
        ("BertModel", "bert", ["encoder"]),
        ("BertForSequenceClassification", "bert", ["encoder"]),
        ("ElectraForPreTraining", "electra", ["encoder"]),
        ("DistilBertForTokenClassification", "distilbert", ["encoder"]),
        ("GPT2Model", "gpt2", ["decoder"]),
        ("GPT2DoubleHeadsModel", "gpt2", ["decoder"]),
        ("GPTNeoXForQuestionAnswering", "gpt_neox-parallel", ["decoder"]),
        ("OPTModel", "opt-pre", ["decoder"]),
        ("OPTForSequenceClassification", "opt-post", ["decoder"]),
        ("LlamaForSequenceClassification", "llama", ["decoder"]),
        ("Qwen3Model", "qwen3", ["decoder"]),
        ("ModernBertForSequenceClassification", "modernbert", ["encoder"]),
        ("T5Model", "t5", ["encoder", "decoder"]),
        ("T5EncoderModel", "t5", ["encoder"]),
        ("T5ForTokenClassification", "t5", ["encoder"]),
        ("T5ForSequenceClassification", "t5", ["encoder", "decoder"]),
        ("BartForCausalLM", "bart", ["decoder"]),
        ("BartForSequenceClassification", "bart", ["encoder", "decoder"]),
    ],
)
def test_stacks_are_found_whatever_the_head(head: str, name: str, stacks: list[str]) -> None:
    model = dataclasses.replace(CASES[name], head=head).make(eos_token_id=2, pad_token_id=0)
    anatomy = read_architecture(model)
    assert [stack.name for stack in anatomy.stacks] == stacks
    assert all(len(stack.layers) == 2 for stack in anatomy.stacks)


def test_the_head_is_found_where_there_is_one() -> None:
    model = CASES["gpt2"].make()
    assert read_architecture(model).output_embeddings is model.lm_head
    assert read_architecture(model.transformer).output_embeddings is None


def test_the_same_parts_are_found_under_peft_and_compile() -> None:
    def weights(anatomy: Anatomy) -> list[int]:
        return [id(branch.output.weight) for branch in anatomy.branches]

    model = CASES["gpt2"].make()
    expected = weights(read_architecture(model))
    assert weights(read_architecture(torch.compile(model))) == expected
    adapted = get_peft_model(model, LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True))
    assert weights(read_architecture(adapted)) == expected


# A user's own entry

GPT_NEO = Architecture(
    model_type="gpt_neo",
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
                    query="attn.attention.q_proj",
                    key="attn.attention.k_proj",
                    value="attn.attention.v_proj",
                    output="attn.attention.out_proj",
                    end="attn",
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


def gpt_neo() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": WIDTH, "num_layers": 2, "num_heads": 2}
    attention = {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 40}
    return tf.GPTNeoForCausalLM(tf.GPTNeoConfig(**sizes, **attention)).eval()


def gpt_neo_with(**changes: Any) -> Architecture:
    """The entry with something else in its first branch."""
    stack = GPT_NEO.stacks[0]
    first = dataclasses.replace(stack.branches[0], **changes)
    return dataclasses.replace(GPT_NEO, stacks=(dataclasses.replace(stack, branches=(first, stack.branches[1])),))


def test_an_entry_of_a_users_own_works_as_the_others_do() -> None:
    register_architecture(GPT_NEO)
    assert "gpt_neo" in list_architectures()
    model, ids = gpt_neo(), torch.arange(6)[None]
    expected = model(ids).logits
    attach(model, lambda branch: Identity())
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-6, rtol=0)


def test_an_unknown_model_is_refused_with_what_is_known_and_an_entry_to_fill_in() -> None:
    with pytest.raises(ValueError, match="'gpt_neo' is not in the table") as error:
        read_architecture(gpt_neo())
    assert all(known in str(error.value) for known in list_architectures())
    assert "register_architecture(Architecture(\n    model_type='gpt_neo'" in str(error.value)


def test_the_entry_to_fill_in_is_one_that_works() -> None:
    try:
        read_architecture(gpt_neo())
    except ValueError as error:
        text = str(error)
    architectures._TABLE[:] = [entry for entry in architectures._TABLE if entry.model_type != "llama"]
    exec(text[text.index("from hf_gradguard") :].replace("'gpt_neo'", "'llama'"), {**globals()})
    assert len(read_architecture(CASES["llama"].make()).branches) == 4


def test_a_path_that_is_not_there_is_refused_with_entry_path_and_what_is_there() -> None:
    register_architecture(gpt_neo_with(output="attn.attention.o_proj"))
    with pytest.raises(
        ValueError, match=r"'gpt_neo' gives 'attn.attention.o_proj' as output of attention.*h\.0"
    ) as error:
        read_architecture(gpt_neo())
    assert "k_proj, v_proj, q_proj, out_proj" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual": At("norm1")}, "residual of attention.*it has ln_1, attn, ln_2, mlp"),
        ({"output": "attn"}, "GPTNeoAttention and has no weight"),
        ({"value": Rows("attn.attention.v_proj", 0, of=3)}, "1 × 3 parts.*16 output features"),
        ({"end": "attn.attention.bias_"}, "end of attention"),
    ],
)
def test_a_wrong_entry_is_refused(changes: dict[str, Any], message: str) -> None:
    register_architecture(gpt_neo_with(**changes))
    with pytest.raises(ValueError, match=message):
        read_architecture(gpt_neo())


def test_layers_at_a_wrong_path_are_refused() -> None:
    stack = dataclasses.replace(GPT_NEO.stacks[0], layers="layers")
    register_architecture(dataclasses.replace(GPT_NEO, stacks=(stack,)))
    with pytest.raises(ValueError, match="'layers' as layers, but GPTNeoModel has no such module: it has wte, wpe"):
        read_architecture(gpt_neo())


def test_layers_that_are_no_list_are_refused() -> None:
    stack = dataclasses.replace(GPT_NEO.stacks[0], layers="wte")
    register_architecture(dataclasses.replace(GPT_NEO, stacks=(stack,)))
    with pytest.raises(ValueError, match="give the path of the list"):
        read_architecture(gpt_neo())


def test_an_entry_for_a_known_model_type_is_refused_unless_when_tells_them_apart() -> None:
    with pytest.raises(ValueError, match="there is an entry for model_type 'llama' already"):
        register_architecture(dataclasses.replace(GPT_NEO, model_type="llama"))
    register_architecture(dataclasses.replace(GPT_NEO, model_type="llama", when={"mlp_bias": None}))


def test_a_variant_that_no_entry_fits_is_refused_with_what_the_config_has() -> None:
    architectures._TABLE[:] = [entry for entry in architectures._TABLE if not entry.when.get("do_layer_norm_before")]
    with pytest.raises(ValueError, match=r"fits a config with do_layer_norm_before=True; .*do_layer_norm_before=False"):
        read_architecture(CASES["opt-pre"].make())


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear holds no Transformers model"):
        read_architecture(nn.Linear(2, 2))
