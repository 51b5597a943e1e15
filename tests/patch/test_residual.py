"""Each residual rule's formula, start, options and facts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_gradguard.patch import Branch, Multiplier, read_architecture
from hf_gradguard.patch.model import patch_model
from hf_gradguard.patch.residual import (
    GRUGate,
    HighwayGate,
    InputGate,
    OutputGate,
    ResidualPatch,
    SigmoidTanhGate,
    rules,
)
from tests.patch import plain
from tests.patch.models import CASES, logits

NAMES = [name for name in rules.names() if name != rules.absent]
GATES: dict[str, Callable[..., Any]] = {
    "gru_gate": GRUGate,
    "highway_gate": HighwayGate,
    "output_gate": OutputGate,
    "input_gate": InputGate,
    "sigmoid_tanh_gate": SigmoidTanhGate,
}
D = 6


def double(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scrambled(module: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    """Random float64 parameters, and a look at them."""
    module.double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(double(*parameter.shape, seed=seed + number))
    return {key: value.detach() for key, value in module.named_parameters()}


def anatomy_of(name: str, **changes: Any) -> Any:
    return read_architecture(CASES[name].make(**changes))


def made(spec: str, anatomy: Any) -> list[Any]:
    make_rule = rules.parse(spec).make(anatomy)
    return [make_rule(branch) for branch in anatomy.branches]


def gains(spec: str, anatomy: Any) -> list[Any]:
    patch = rules.parse(spec)
    return [patch.gain(rule) for rule in made(spec, anatomy)]


# Formulas


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("name", sorted(GATES))
def test_a_gate_is_the_papers_formula(name: str, shape: tuple[int, ...], relu: bool) -> None:
    gate = GATES[name](D, relu=relu)
    weights = scrambled(gate)
    x, y = double(*shape, D, seed=1), double(*shape, D, seed=2)
    expected = plain.GTRXL[name](weights, x, y.clamp(min=0) if relu else y)
    torch.testing.assert_close(gate(x, y), expected, atol=1e-12, rtol=1e-12)


def test_the_gru_gate_is_pytorchs_gru_cell_where_the_reset_matrix_is_diagonal() -> None:
    """A cell has its reset gate behind the matrix, and its update gate is the share that is kept."""
    gate, cell = GRUGate(D, relu=False), nn.GRUCell(D, D).double()
    weights = scrambled(gate)
    diagonal = torch.diag(double(D, seed=9))
    with torch.no_grad():
        gate.from_reset.weight.copy_(diagonal)
        w_r, w_z, w_g = weights["from_y.weight"].chunk(3)
        u_r, u_z = weights["from_x.weight"].chunk(2)
        cell.weight_ih.copy_(torch.cat((w_r, -w_z, w_g)))
        cell.weight_hh.copy_(torch.cat((u_r, -u_z, diagonal)))
        cell.bias_ih.zero_()
        cell.bias_hh.copy_(torch.cat((torch.zeros(D), weights["bias"], torch.zeros(D))))
    x, y = double(7, D, seed=1), double(7, D, seed=2)
    torch.testing.assert_close(gate(x, y), cell(y, x), atol=1e-12, rtol=1e-12)


def test_the_lstm_gate_is_pytorchs_lstm_cell_but_for_the_tanh_on_the_cell_state() -> None:
    anatomy = anatomy_of("gpt2")
    width = anatomy.branches[0].output.out_features
    x = c = double(2, 3, width, seed=1)
    for number, gate in enumerate(made("lstm_gate", anatomy)):
        weights = scrambled(gate, seed=10 * number)
        cell = nn.LSTMCell(width, width).double()
        with torch.no_grad():
            cell.weight_ih.copy_(weights["cell.weight"][:, :width])
            cell.weight_hh.copy_(weights["cell.weight"][:, width:])
            cell.bias_ih.copy_(weights["cell.bias"])
            cell.bias_hh.zero_()
        y = double(2, 3, width, seed=100 + number)
        h, c = (t.view(2, 3, width) for t in cell(y.flatten(0, 1), (x.flatten(0, 1), c.flatten(0, 1))))
        x, given = h / torch.tanh(c) * c, x
        torch.testing.assert_close(gate(given, y), x, atol=1e-10, rtol=1e-10)
    assert number == 3


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_a_multiplier_is_the_formula(shape: tuple[int, ...]) -> None:
    y = double(*shape, 16, seed=2)
    for spec, expected in (
        ("rezero:init=0.3", 0.3 * y),
        ("skipinit:init=-2", -2 * y),
        ("layerscale:init=0.7", 0.7 * y),
    ):
        rule = made(spec, anatomy_of("gpt2"))[0].double()
        torch.testing.assert_close(rule.scale(y), expected, atol=1e-6, rtol=1e-6)


# How they begin


def test_rezero_shares_one_gain_of_zero_in_a_layer() -> None:
    for name, of_layer in (("gpt2", 2), ("gpt2-cross", 3), ("gpt_neox-parallel", 2)):
        found = made("rezero", anatomy_of(name))
        assert [len({id(rule) for rule in found[i : i + of_layer]}) for i in (0, of_layer)] == [1, 1]
        assert len({id(rule) for rule in found}) == 2
        assert all(rule.gain.shape == (1,) and rule.gain.item() == 0 and rule.gain.requires_grad for rule in found)


def test_layers_of_two_stacks_share_nothing() -> None:
    assert len({id(rule) for rule in made("rezero", anatomy_of("t5"))}) == 4


@pytest.mark.parametrize("spec", ["rezero:shared=false", "skipinit"])
def test_a_gain_for_each_branch(spec: str) -> None:
    found = made(spec, anatomy_of("gpt2"))
    assert len({id(rule) for rule in found}) == 4
    assert all(rule.gain.shape == (1,) and rule.gain.item() == 0 and rule.gain.requires_grad for rule in found)


@pytest.mark.parametrize(
    ("depth", "start"), [(1, 0.1), (12, 0.1), (18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6), (36, 1e-6)]
)
def test_layerscale_begins_by_depth(depth: int, start: float) -> None:
    anatomy = anatomy_of("gpt2")
    branch = dataclasses.replace(anatomy.branches[0], depth=depth)
    gain = rules.parse("layerscale").make(anatomy)(branch).gain  # type: ignore[union-attr]
    torch.testing.assert_close(gain.detach(), torch.full((16,), start))
    assert gain.requires_grad


@pytest.mark.parametrize(
    ("spec", "name", "expected"),
    [
        ("branch_scale", "gpt2", 1 / 10**0.5),
        ("branch_scale", "gpt2-cross", 1 / 15**0.5),
        ("branch_scale:scale=0.25", "gpt2", 0.25),
        ("branch_scale:exponent=0.5", "gpt2", 1 / 5**0.5),
        ("branch_scale:exponent=1,base_depth=2", "gpt2", 2 / 5),
        ("completep", "gpt2", 1 / 5),
        ("completep:base_depth=2", "gpt2-cross", 2 / 5),
        ("completep:alpha=0.5", "gpt2", 1 / 5**0.5),
        ("completep:base_width=4", "gpt2", 1 / 5),
    ],
)
def test_a_constant_gain_by_depth(spec: str, name: str, expected: float) -> None:
    found = gains(spec, anatomy_of(name, n_layer=5))
    assert found == pytest.approx([expected] * len(found), rel=1e-12)
    assert not any(list(rule.parameters()) for rule in made(spec, anatomy_of(name)))


def test_deepnorms_alpha_is_that_of_the_paper() -> None:
    """Figure 2; the numbers were worked out by hand."""
    assert gains("deepnorm", anatomy_of("bert", num_hidden_layers=8)) == pytest.approx([1 / 2] * 16)
    assert gains("deepnorm", anatomy_of("opt-post", num_hidden_layers=8)) == pytest.approx([1 / 2] * 16)
    assert gains("deepnorm", anatomy_of("bert-cross", num_hidden_layers=27)) == pytest.approx([1 / 3] * 81)
    both = [rule.alpha for rule in made("deepnorm", anatomy_of("bart", encoder_layers=4, decoder_layers=27))]
    assert both[:8] == pytest.approx([0.81 * 2**0.5 * 3 ** (3 / 16)] * 8)
    assert both[8:] == pytest.approx([3.0] * 81)


@pytest.mark.parametrize("name", ["gru_gate", "highway_gate", "output_gate", "sigmoid_tanh_gate"])
def test_gates_begin_nearly_shut(name: str) -> None:
    x, y = torch.randn(50, 16), torch.randn(50, 16)
    change = [(made(f"{name}:bias={bias}", anatomy_of("gpt2"))[0](x, y) - x).norm().item() for bias in (0, 2, 5)]
    assert change[0] > 1.5 * change[1] > 3 * change[2] > 0


@pytest.mark.parametrize("layers", [2, 12, 100])
def test_gates_whose_bias_begins_by_depth_let_a_third_of_the_stream_through(layers: int) -> None:
    """With gates that see nothing of x and y but their bias, x is what is left when y is zero."""
    x = torch.ones(1, 16)
    for name in ("gru_gate", "highway_gate"):
        found = x
        for gate in made(f"{name}:bias=none", anatomy_of("gpt2", n_layer=layers)):
            with torch.no_grad():
                for key, parameter in gate.named_parameters():
                    parameter.mul_(key == "bias")
                found = gate(found, torch.zeros(1, 16))
        torch.testing.assert_close(
            found, torch.full((1, 16), (1 - 1 / (2 * layers)) ** (2 * layers)), rtol=1e-4, atol=0
        )
        assert 0.3 < found.min() < 0.37
    paper = made("gru_gate", anatomy_of("gpt2", n_layer=layers))[0]
    assert paper.bias.unique().tolist() == [2.0]


def test_a_gates_matrices_are_xavier_each_by_its_own_fans() -> None:
    torch.manual_seed(0)
    gate = GRUGate(64)
    for matrix in (*gate.from_y.weight.chunk(3), *gate.from_x.weight.chunk(2), gate.from_reset.weight):
        bound = (6 / 128) ** 0.5
        assert 0.95 * bound < matrix.abs().max() <= bound
    assert sum(p.numel() for p in gate.parameters()) == 6 * 64**2 + 64


def test_the_lstm_gate_begins_by_depth() -> None:
    anatomy = anatomy_of("gpt2", n_layer=8)
    for spec, expected in (("lstm_gate", torch.tensor(16.0).log().item()), ("lstm_gate:forget_bias=1.5", 1.5)):
        i, f, g, o = made(spec, anatomy)[0].cell.bias.chunk(4)
        torch.testing.assert_close(torch.stack((-i, f)), torch.full((2, 16), expected))
        assert not g.any()
        assert not o.any()


# What is said of them


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_says_what_it_is(name: str) -> None:
    patch = rules.parse(name)
    assert 20 < len(patch.summary) < 100
    assert "\n" not in patch.summary
    assert "arXiv" in patch.citation
    assert patch.norm in ("pre", "post", "none")
    assert not patch.preserving
    documents = "".join(cls.__doc__ or "" for cls in type(patch).__mro__)
    assert all(number in documents for number in re.findall(r"arXiv (\S+?);?(?: |$)", patch.citation))


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_folds_or_says_why_not(name: str) -> None:
    patch = rules.parse(name)
    anatomy = anatomy_of("bert")
    for rule in made(name, anatomy):
        gain = patch.gain(rule)
        assert (gain is None) == (patch.unfoldable is not None)
        assert not (isinstance(gain, Tensor) and gain.requires_grad)


@pytest.mark.parametrize(
    "spec",
    [
        *NAMES,
        "rezero:init=0.5,shared=False",
        "layerscale:init=0.1",
        "branch_scale:exponent=1,base_depth=4",
        "completep:alpha=0.5,base_depth=4,base_width=8",
        "gru_gate:bias=1,relu=false",
        "lstm_gate:forget_bias=2",
    ],
)
def test_a_rule_is_the_same_after_it_was_written_as_text(spec: str) -> None:
    patch = rules.parse(spec)
    assert rules.parse(rules.text(patch)) == patch


# What is refused


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rezro", r"unknown residual rule 'rezro'; did you mean 'rezero'\?\. Known: branch_scale, completep, deepnorm"),
        ("layerscale:initial=1", r"unknown option 'initial'; did you mean 'init'\?"),
        ("layerscale:init=inf", "init=inf must be a finite number"),
        ("rezero:init=nan", "init=nan must be a finite number"),
        ("skipinit:init=nan", "init=nan must be a finite number"),
        ("rezero:shared=1", "shared='1' must be true or false"),
        ("branch_scale:scale=0", "scale=0.0 must be above 0"),
        ("branch_scale:exponent=-1", "exponent=-1.0 must be above 0"),
        ("branch_scale:scale=1,exponent=1", "scale=1.0 and exponent=1.0 both say what s is; give one"),
        ("branch_scale:base_depth=2", "base_depth=2 has a meaning only with exponent"),
        ("branch_scale:exponent=1,base_depth=0", "base_depth=0 must be a whole number of at least 1"),
        ("completep:alpha=0", "alpha=0.0 must be above 0"),
        ("completep:base_depth=0", "base_depth=0 must be a whole number of at least 1"),
        ("completep:base_width=0", "base_width=0 must be a whole number of at least 1"),
        ("gru_gate:bias=nan", "bias=nan must be a finite number"),
        ("highway_gate:bias=inf", "bias=inf must be a finite number"),
        ("output_gate:bias=inf", "bias=inf must be a finite number"),
        ("sigmoid_tanh_gate:bias=inf", "bias=inf must be a finite number"),
        ("input_gate:bias=1", "unknown option 'bias'"),
        ("lstm_gate:forget_bias=inf", "forget_bias=inf must be a finite number"),
    ],
)
def test_impossible_options_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rules.parse(spec)


def refused(name: str, spec: str, message: str, model: Any = None) -> None:
    """The rule is refused, and the model is what it was."""
    model = CASES[name].make() if model is None else model
    expected = logits(model, CASES[name].inputs())
    with pytest.raises(ValueError, match=message):
        patch_model(model, f"residual={spec}")
    assert torch.equal(logits(model, CASES[name].inputs()), expected)


@pytest.mark.parametrize("spec", ["gru_gate", "highway_gate", "lstm_gate"])
def test_gates_that_weigh_x_against_y_are_refused_with_parallel_residual(spec: str) -> None:
    refused("gpt_neox-parallel", spec, rf"residual='{spec}.* attention of decoder layer 0 .*parallel residual")


@pytest.mark.parametrize("name", ["gpt2", "opt-pre", "t5"])
def test_deepnorm_is_refused_where_the_norm_is_before_the_branch(name: str) -> None:
    refused(name, "deepnorm", r"norm of attention of .* layer 0 .* is before the branch; make it a post-norm model")


class Centred(nn.Module):
    """A norm without an epsilon."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)


def test_deepnorm_is_refused_where_a_norm_has_no_epsilon() -> None:
    model = CASES["bert"].make()
    model.bert.encoder.layer[1].output.LayerNorm = Centred()
    refused("bert", "deepnorm", "epsilon of the norm of mlp of encoder layer 1, but Centred has no", model)
    assert {norm.eps for norm in model.modules() if isinstance(norm, nn.LayerNorm)} == {1e-12}


def test_the_lstm_gate_is_refused_where_a_branch_may_run_twice_or_not_at_all() -> None:
    refused("bert", "lstm_gate", "chunk_size_feed_forward=1 runs", CASES["bert"].make(chunk_size_feed_forward=1))
    refused("opt-pre", "lstm_gate", "layerdrop=0.5 leaves some out", CASES["opt-pre"].make(layerdrop=0.5))
    refused("bart", "lstm_gate", "decoder_layerdrop=0.5", CASES["bart"].make(decoder_layerdrop=0.5))
    model = CASES["gpt2"].make()
    for layer in model.transformer.h:
        layer.gradient_checkpointing = True
    refused("gpt2", "lstm_gate", "gradient_checkpointing=False, or use residual='gru_gate'", model)


def test_a_patched_model_is_refused() -> None:
    model = CASES["bert"].make()
    patch_model(model, "residual=deepnorm")
    with pytest.raises(ValueError, match="is patched already"):
        patch_model(model, "residual=deepnorm")
    assert model.bert.encoder.layer[0].output.LayerNorm.eps == pytest.approx(1e-12 / 2)


def test_a_rule_of_ones_own_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_policies", dict(rules._policies))

    @rules.register("constant")
    @dataclasses.dataclass(frozen=True)
    class Constant(ResidualPatch):
        summary, citation, norm = "x + by·y", "nobody", "pre"
        by: float = 2.0

        def make(self, anatomy: Any) -> Callable[[Branch], Multiplier]:
            return lambda branch: Multiplier(self.by, learnable=False)

    model, other = CASES["gpt2"].make(), CASES["gpt2"].make()
    patch_model(model, "residual=constant:by=0.25")
    patch_model(other, "residual=branch_scale:scale=0.25")
    assert torch.equal(logits(model, CASES["gpt2"].inputs()), logits(other, CASES["gpt2"].inputs()))
