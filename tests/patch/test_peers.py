"""Patched models beside other people's implementations, where those are installed.

x-transformers is among the tests' own requirements. torchscale and mup are not, as they bring torchvision, or old
versions of other libraries; what is compared with them here, other tests have from the papers' equations.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from hf_gradguard.patch import CONTAINER, Branch, read_architecture
from hf_gradguard.patch.init import beta
from hf_gradguard.patch.model import patch_model
from hf_gradguard.patch.optimizer import param_groups
from hf_gradguard.patch.residual import rules
from tests.patch.models import CASES, WIDTH

LAYERS = 3
HIDDEN = 24


def encoder(**changes: Any) -> Any:
    """A BERT without the biases that x-transformers has not."""
    model = CASES["bert"].make(num_hidden_layers=LAYERS, layer_norm_eps=1e-5, **changes)
    with torch.no_grad():
        for branch in read_architecture(model).branches:
            branch.norm.value.bias.zero_()
            for part in (branch.query, branch.key, branch.value, branch.output if branch.query else None):
                if part is not None:
                    part.write_bias(0.0)
    return model


def streams(model: Any) -> tuple[Tensor, Tensor]:
    """What enters the first layer, and what the last gives."""
    states = model(**CASES["bert"].inputs(), output_hidden_states=True).hidden_states
    return states[0], states[-1]


# x-transformers


def scrambled(model: nn.Module) -> None:
    """Random new parameters, with the biases of new norms left at zero and diagonal reset matrices in gates."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if CONTAINER not in key or key.endswith("norm.bias"):
                continue
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            if "from_reset" in key:
                parameter.copy_(torch.diag(parameter.diagonal()))


def new(layer: Any, branch: Branch) -> Any:
    """What the patch has put at a branch."""
    return getattr(getattr(layer.module, CONTAINER), branch.kind, None)


def copy_branch(branch: Branch, block: Any) -> None:
    block = getattr(block, "fn", block)  # within its layer scale
    if branch.query is not None:
        pairs = [(block.to_q, branch.query), (block.to_k, branch.key), (block.to_v, branch.value)]
        pairs.append((block.to_out, branch.output))
    else:
        pairs = [(block.ff[0][0], branch.inner[0]), (block.ff[2], branch.output)]
    for linear, part in pairs:
        assert part is not None
        linear.weight.copy_(part.read())
        if linear.bias is not None:
            linear.bias.copy_(part.read_bias())


def copy_gate(gate: Any, gru: nn.GRUCell) -> None:
    """GRUCell keeps x where the paper's gate lets y in, so that its z is 1 − z."""
    (w_r, w_z, w_g), (u_r, u_z) = gate.from_y.weight.chunk(3), gate.from_x.weight.chunk(2)
    gru.weight_ih.copy_(torch.cat([w_r, -w_z, w_g]))
    gru.weight_hh.copy_(torch.cat([u_r, -u_z, gate.from_reset.weight]))
    gru.bias_ih.copy_(torch.cat([torch.zeros(WIDTH), gate.bias, torch.zeros(WIDTH)]))
    gru.bias_hh.zero_()


X_TRANSFORMERS: list[tuple[str, dict[str, Any]]] = [
    ("norm=post", {"pre_norm": False}),
    ("norm=pre", {}),
    ("norm=sandwich", {"sandwich_norm": True}),
    ("norm=pre;residual=layerscale:init=0.3", {"use_layerscale": True}),
    ("norm=post;residual=layerscale:init=0.3", {"use_layerscale": True, "pre_norm": False}),
    ("norm=pre;residual=gru_gate:relu=false", {"gate_residual": True}),
    ("norm=sandwich;residual=gru_gate:relu=false,bias=1", {"gate_residual": True, "sandwich_norm": True}),
]


@pytest.mark.parametrize(("patch", "options"), X_TRANSFORMERS)
def test_norms_gains_and_gates_are_those_of_x_transformers(patch: str, options: dict[str, Any]) -> None:
    library = pytest.importorskip("x_transformers")
    model = encoder()
    patch_model(model, patch)
    scrambled(model)
    anatomy = read_architecture(model)
    sizes = {"dim": WIDTH, "depth": LAYERS, "heads": 2, "attn_dim_head": WIDTH // 2, "ff_mult": HIDDEN / WIDTH}
    peer = library.Encoder(**sizes, norm_add_unit_offset=False, **options).eval()
    branches = [(layer, branch) for layer in anatomy.layers for branch in layer.branches]
    with torch.no_grad():
        for (layer, branch), (norms, block, join) in zip(branches, peer.layers, strict=True):
            copy_branch(branch, block)
            before, after, on_sum = norms
            next(norm for norm in (before, on_sum) if norm is not None).gamma.copy_(branch.norm.value.weight)
            if after is not None:
                after.gamma.copy_(new(layer, branch).norm.weight)
            if "layerscale" in patch:
                block.gamma.copy_(new(layer, branch).rule.gain)
            if "gru_gate" in patch:
                copy_gate(new(layer, branch).rule, join.gru)
        if "post" not in patch:
            peer.final_norm.gamma.copy_(getattr(anatomy.layers[-1].module, CONTAINER).final.norm.weight)
        entering, leaving = streams(model)
        torch.testing.assert_close(peer(entering), leaving, atol=1e-5, rtol=1e-5)


# torchscale


def torchscale_arguments(architecture: str, **depths: int) -> Any:
    library = pytest.importorskip("torchscale.architecture.config")
    sizes = {"embed_dim": WIDTH, "attention_heads": 2, "ffn_embed_dim": HIDDEN}
    sides = ("encoder", "decoder") if architecture == "EncoderDecoder" else (architecture.lower(),)
    options = {f"{side}_{key}": value for side in sides for key, value in sizes.items()}
    config = getattr(library, f"{architecture}Config")
    return config(**options, **depths, deepnorm=True, vocab_size=-1, dropout=0.0, no_output_layer=True)


@pytest.mark.parametrize("encoder_layers", [2, 12, 100])
@pytest.mark.parametrize("decoder_layers", [2, 18])
def test_deepnorms_constants_are_torchscales(encoder_layers: int, decoder_layers: int) -> None:
    layers: Any = pytest.importorskip("torchscale.architecture.encoder_decoder")
    alone = pytest.importorskip("torchscale.architecture.decoder")
    depths = {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
    args = torchscale_arguments("EncoderDecoder", **depths)
    both = layers.EncoderDecoder(args)
    cases = [
        ("bart", both.encoder.layers[0].alpha, both.decoder.layers[0].alpha, depths),
        ("gpt2", None, alone.Decoder(torchscale_arguments("Decoder", decoder_layers=decoder_layers)).layers[0].alpha,
         {"n_layer": decoder_layers}),
    ]  # fmt: skip
    for name, of_encoder, of_decoder, changes in cases:
        model = CASES[name].make(**changes)
        make_rule = rules.parse("deepnorm").make(read_architecture(model))
        for branch in read_architecture(model).branches:
            expected = of_encoder if branch.stack == "encoder" else of_decoder
            assert make_rule(branch).alpha == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["Encoder", "Decoder", "EncoderDecoder"])
def test_deepnorms_initialisation_is_torchscales(kind: str) -> None:
    """torchscale divides weights by 1 ÷ β, which shows in their norms with and without. In the encoder of an
    encoder-decoder it divides by (N⁴M)^(1/16) ÷ 1.15, where the paper multiplies with 0.87 ÷ that; we follow the paper.
    """
    module = {"Encoder": "encoder", "Decoder": "decoder", "EncoderDecoder": "encoder_decoder"}[kind]
    library: Any = pytest.importorskip(f"torchscale.architecture.{module}")
    depths = {"Encoder": {"encoder_layers": 7}, "Decoder": {"decoder_layers": 9}}
    depths["EncoderDecoder"] = {**depths["Encoder"], **depths["Decoder"]}
    name, changes = {
        "Encoder": ("bert", {"num_hidden_layers": 7}),
        "Decoder": ("gpt2", {"n_layer": 9}),
        "EncoderDecoder": ("bart", depths["EncoderDecoder"]),
    }[kind]
    made = []
    for is_scaled in (True, False):
        args = torchscale_arguments(kind, **depths[kind])
        args.deepnorm = is_scaled
        torch.manual_seed(2)
        made.append(dict(getattr(library, kind)(args).named_parameters()))
    anatomy = read_architecture(CASES[name].make(**changes))
    for stack in anatomy.stacks:
        expected = beta(anatomy, stack.branches[0])
        if kind == "EncoderDecoder" and stack.name == "encoder":
            expected *= 1.15 / 0.87
        scaled = [
            key for key in made[0]
            if any(part in key for part in ("fc1.weight", "fc2.weight", "out_proj.weight", "v_proj.weight"))
            and (kind != "EncoderDecoder" or key.startswith(stack.name))
        ]  # fmt: skip
        assert len(scaled) >= 4 * len(stack.layers)
        for key in scaled:
            assert (made[0][key].norm() / made[1][key].norm()).item() == pytest.approx(expected, rel=1e-3)


def test_a_bert_with_deepnorm_is_torchscales_encoder() -> None:
    library: Any = pytest.importorskip("torchscale.architecture.encoder")
    model = CASES["bert"].make(num_hidden_layers=LAYERS, layer_norm_eps=1e-5)
    patch_model(model, "residual=deepnorm;norm=post;activation=gelu;init=deepnorm")
    args = torchscale_arguments("Encoder", encoder_layers=LAYERS)
    peers = [library.EncoderLayer(args, depth).eval() for depth in range(LAYERS)]
    entering, leaving = streams(model)
    x = entering.detach()
    for peer, layer in zip(peers, model.bert.encoder.layer, strict=True):
        attention, norm = peer.self_attn, layer.attention.output.LayerNorm
        pairs = [
            (attention.q_proj, layer.attention.self.query), (attention.k_proj, layer.attention.self.key),
            (attention.v_proj, layer.attention.self.value), (attention.out_proj, layer.attention.output.dense),
            (peer.ffn.fc1, layer.intermediate.dense), (peer.ffn.fc2, layer.output.dense),
            (peer.self_attn_layer_norm, norm), (peer.final_layer_norm, layer.output.LayerNorm),
        ]  # fmt: skip
        for theirs, ours in pairs:
            theirs.load_state_dict(ours.state_dict())
        x, _ = peer(x, encoder_padding_mask=None)
    torch.testing.assert_close(x, leaving, atol=1e-5, rtol=1e-5)


# mup


def test_learning_rates_by_width_are_those_of_mup() -> None:
    """Adam's, with CompleteP at a depth whose factor is one: only width is scaled then."""
    library = pytest.importorskip("mup")

    def model(width: int) -> Any:
        config = tf.GPT2Config(
            vocab_size=50, n_embd=width, n_layer=2, n_head=2, n_positions=20, tie_word_embeddings=False
        )
        return tf.GPT2LMHeadModel(config)

    wide = model(64)
    library.set_base_shapes(wide, model(16), delta=model(32), do_assert=False, rescale_params=False)
    expected: dict[int, SimpleNamespace] = {}
    for group in library.MuAdamW(wide.parameters(), lr=0.01, weight_decay=0.1).param_groups:
        for parameter in group["params"]:
            expected[id(parameter)] = SimpleNamespace(lr=group["lr"], weight_decay=group["weight_decay"])
    names = {id(parameter): key for key, parameter in wide.named_parameters()}
    patch_model(wide, "completep:base_width=16,base_depth=2")
    seen = set()
    for group in param_groups(wide, lr=0.01, weight_decay=0.1):
        for parameter in group["params"]:
            name, peer = names[id(parameter)], expected[id(parameter)]
            assert group["lr"] == pytest.approx(peer.lr), name
            if group["weight_decay"]:
                assert group["weight_decay"] == pytest.approx(peer.weight_decay), name
            seen.add(name)
    assert seen == set(names.values())
