from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from hf_gradguard.patch import Multiplier, attach, read_architecture
from hf_gradguard.patch.activation import replace_activation
from hf_gradguard.patch.init import Initialisation, Kaiming, TFixup, Xavier, gain_of, inits
from hf_gradguard.patch.init.initialisation import sites
from tests.patch.models import ALL, CASES, logits

NAMES = [name for name in inits.names() if name != "none"]
WITHOUT_BATCH = [name for name in NAMES if name != "lsuv"]
LAYERS = 2  # of every model in `models`, in each stack


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def applied(spec, model, seed=0, batch=None):
    anatomy = read_architecture(model)
    inits.parse(spec).apply(anatomy, batch=batch, generator=seeded(seed))
    return anatomy


def xavier_std(part):
    return math.sqrt(2 / sum(part.shape))


def branches_in_stack(site):
    return LAYERS * len({(b.kind, b.stack) for b in site.anatomy.branches if b.stack == site.branch.stack})


def has_cross_attention(site):
    return any(b.kind == "cross_attention" and b.stack == site.branch.stack for b in site.anatomy.branches)


def deepnorm_std(site):
    if site.role in ("query", "key"):
        return xavier_std(site.part)
    if len(site.anatomy.stacks) == 2 and site.branch.stack == "encoder":
        beta = 0.87 * (LAYERS**4 * LAYERS) ** (-1 / 16)
    elif has_cross_attention(site):
        beta = (12 * LAYERS) ** -0.25
    else:
        beta = (8 * LAYERS) ** -0.25
    return beta * xavier_std(site.part)


def t_fixup_std(site):
    scale = 0.67 * LAYERS**-0.25 if site.branch.stack == "encoder" else (9 * LAYERS) ** -0.25
    return xavier_std(site.part) * (1.0 if site.role in ("query", "key") else scale)


def fixup_std(site):
    if site.role == "output":
        return 0.0
    total = sum(LAYERS * len({b.kind for b in s.branches}) for s in site.anatomy.stacks)
    m = 4 if site.branch.kind != "mlp" else {1: 2, 2: 3}[len(site.branch.inner)]
    return xavier_std(site.part) * total ** (-1 / (2 * m - 2))


def gpt2_std(site, std=0.02):
    return std / math.sqrt(branches_in_stack(site)) if site.role == "output" else std


# The standard deviation of each map by its paper, and whether the distribution is uniform.
EXPECTED = {
    "xavier": (lambda site: xavier_std(site.part), True),
    "xavier:gain=0.5,distribution=normal": (lambda site: 0.5 * xavier_std(site.part), False),
    "gpt2": (gpt2_std, False),
    "gpt2:std=0.3": (lambda site: gpt2_std(site, 0.3), False),
    "small": (lambda site: 2 / (LAYERS * 4) if site.role == "output" else math.sqrt(2 / (5 * 16)), False),
    "ds_init": (lambda site: xavier_std(site.part) / math.sqrt(site.branch.layer + 1), True),
    "ds_init:form=code": (lambda site: xavier_std(site.part) / (site.branch.layer + 1) ** 0.25, True),
    "deepnorm": (deepnorm_std, False),
    "t_fixup": (t_fixup_std, True),
    "fixup": (fixup_std, True),
}


@pytest.mark.parametrize("spec", EXPECTED)
@pytest.mark.parametrize("name", ALL)
def test_every_map_has_its_papers_distribution_on_its_own_fans(name, spec):
    expected, is_uniform = EXPECTED[spec]
    scaled = []
    model = CASES[name].make()
    for seed in range(2):
        for site in sites(applied(spec, model, seed)):
            weight, std = site.part.read(), expected(site)
            assert weight.shape == (site.part.out_features, site.part.in_features)
            if std == 0:
                assert weight.eq(0).all()
                continue
            z = weight.flatten() / std
            # 5 standard deviations of the estimate: kurtosis 1.8 or 3
            assert abs(z.square().mean() - 1) < 5 * math.sqrt((0.8 if is_uniform else 2) / z.numel())
            if is_uniform:
                assert 0.9 * math.sqrt(3) < z.abs().max() <= math.sqrt(3) * (1 + 1e-6)
            else:
                assert z.abs().max() > math.sqrt(3)
            scaled.append(z)
    z = torch.cat(scaled).double()
    assert abs(z.mean()) < 5 / math.sqrt(z.numel())
    assert abs(z.square().mean() - 1) < 5 * math.sqrt((0.8 if is_uniform else 2) / z.numel())


@pytest.mark.parametrize("gain", [1.0, 0.5])
@pytest.mark.parametrize("name", ALL)
def test_orthogonal_maps_are_orthogonal_each_for_itself(name, gain):
    for site in sites(applied(f"orthogonal:gain={gain}", CASES[name].make())):
        weight = site.part.read().double() / gain
        short = weight if weight.shape[0] <= weight.shape[1] else weight.T
        assert torch.allclose(short @ short.T, torch.eye(len(short), dtype=torch.float64), atol=1e-5)


TORCH = {
    "xavier": lambda linear, generator: nn.init.xavier_uniform_(linear.weight, generator=generator),
    "xavier:gain=2,distribution=normal": lambda linear, generator: nn.init.xavier_normal_(
        linear.weight, gain=2, generator=generator
    ),
    "orthogonal": lambda linear, generator: nn.init.orthogonal_(linear.weight, generator=generator),
    "gpt2:std=0.5": lambda linear, generator: nn.init.normal_(linear.weight, std=0.5, generator=generator),
}


@pytest.mark.parametrize("spec", TORCH)
def test_fused_weights_are_what_torch_gives_separate_linears_one_after_the_other(spec):
    generator = seeded(3)
    query, key, value, fc = (nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 64))
    for linear in (query, key, value):
        TORCH[spec](linear, generator)

    gpt2, neox, modern = (CASES[name].make() for name in ("gpt2", "gpt_neox-parallel", "modernbert"))
    for model in (gpt2, neox, modern):
        applied(spec, model, seed=3)

    separate = torch.cat([query.weight, key.weight, value.weight])
    assert torch.equal(gpt2.transformer.h[0].attn.c_attn.weight, separate.T)
    assert torch.equal(modern.model.layers[0].attn.Wqkv.weight, separate)
    by_head = [linear.weight[8 * head : 8 * head + 8] for head in range(2) for linear in (query, key, value)]
    assert torch.equal(neox.gpt_neox.layers[0].attention.query_key_value.weight, torch.cat(by_head))
    if spec.startswith("gpt2"):
        return
    TORCH[spec](nn.Linear(16, 16), generator)  # the attention's output comes in between
    TORCH[spec](fc, generator)
    assert torch.equal(gpt2.transformer.h[0].mlp.c_fc.weight, fc.weight.T)


@pytest.mark.parametrize("spec", [spec for spec in TORCH if not spec.startswith("gpt2")])
@pytest.mark.parametrize("name", ALL)
def test_every_map_is_bit_for_bit_what_torch_gives_a_linear_of_its_size(name, spec):
    generator = seeded()
    for site in sites(applied(spec, CASES[name].make())):
        linear = nn.Linear(site.part.in_features, site.part.out_features)
        TORCH[spec](linear, generator)
        assert torch.equal(site.part.read(), linear.weight)


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "linear"])
def test_kaiming_is_what_torch_gives_where_torch_knows_the_activation(activation, distribution):
    model = CASES["bert"].make()
    replace_activation(read_architecture(model), activation)
    applied(f"kaiming:distribution={distribution}", model)

    generator = seeded()
    draw = nn.init.kaiming_normal_ if distribution == "normal" else nn.init.kaiming_uniform_
    for layer in model.bert.encoder.layer:
        for linear, nonlinearity in (
            (layer.attention.self.query, "linear"),
            (layer.attention.self.key, "linear"),
            (layer.attention.self.value, "linear"),
            (layer.attention.output.dense, "linear"),
            (layer.intermediate.dense, "linear"),
            (layer.output.dense, activation),
        ):
            expected = draw(torch.empty_like(linear.weight), a=0.01, nonlinearity=nonlinearity, generator=generator)
            torch.testing.assert_close(linear.weight.detach(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "activation", ["relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid", "relu2", "prelu", "xielu"]
)
def test_kaimings_gain_keeps_the_mean_square_of_a_normal_signal(activation):
    module = ACT2FN[activation]
    z = torch.randn(2_000_000, generator=seeded())
    with torch.no_grad():
        measured = module(z).square().mean() * gain_of(module) ** 2
    assert abs(measured - 1) < 0.02


def test_kaiming_asks_each_branch_for_its_own_activation():
    model = CASES["llama"].make()
    model.model.layers[1].mlp.act_fn = ACT2FN["sigmoid"]
    silu, sigmoid = (mlp.mlp.down_proj for mlp in (model.model.layers[0], model.model.layers[1]))
    squares = []
    for seed in range(20):
        applied("kaiming", model, seed)
        squares.append([w.weight.detach().square().mean() * w.in_features for w in (silu, sigmoid)])
    found = torch.tensor(squares).mean(0)

    z = torch.randn(1_000_000, generator=seeded())
    expected = torch.stack([1 / F.silu(z).square().mean(), 1 / torch.sigmoid(z).square().mean()])
    assert torch.allclose(found, expected, rtol=5 * math.sqrt(2 / (20 * 16 * 24)))


def test_kaiming_refuses_an_activation_that_gives_only_zeros():
    model = CASES["llama"].make()
    model.model.layers[1].mlp.act_fn = nn.Threshold(1e9, 0.0)  # zeros whatever it gets
    with pytest.raises(ValueError, match="mean square"):
        applied("kaiming", model)


def branch_parameters(anatomy):
    found = set()
    for site in sites(anatomy):
        found |= {id(site.part.weight), id(site.part.bias)}
    return found


@pytest.mark.parametrize("spec", NAMES)
@pytest.mark.parametrize("name", ALL)
def test_biases_are_zero_and_everything_outside_the_branches_stays(name, spec):
    case = CASES[name]
    model = case.make()
    before = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}
    buffers = {path: buffer.clone() for path, buffer in model.named_buffers()}
    anatomy = applied(spec, model, batch=case.inputs() if spec == "lsuv" else None)

    own = branch_parameters(anatomy)
    head = anatomy.output_embeddings.weight
    if spec == "t_fixup":
        own |= {id(s.embeddings[0].weight) for s in anatomy.stacks if s.embeddings[0].weight is not head}
    for path, parameter in model.named_parameters():
        assert torch.equal(parameter, before[path]) == (id(parameter) not in own), path
    assert all(site.part.read_bias() is None or site.part.read_bias().eq(0).all() for site in sites(anatomy))
    assert all(torch.equal(buffer, buffers[path]) for path, buffer in model.named_buffers())
    assert logits(model, case.inputs()).isfinite().all()


@pytest.mark.parametrize("spec", NAMES)
@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])
def test_the_seed_decides_and_without_a_generator_torchs_own(name, spec):
    case = CASES[name]
    batch = case.inputs()

    def weights(seed, with_generator):
        model = case.make()
        torch.manual_seed(100 if with_generator else seed)
        inits.parse(spec).apply(
            read_architecture(model), batch=batch, generator=seeded(seed) if with_generator else None
        )
        after = torch.rand(1)
        torch.manual_seed(100)
        assert torch.equal(torch.rand(1), after) == with_generator
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    first = weights(0, True)
    assert torch.equal(weights(0, True), first)
    assert torch.equal(weights(0, False), first)
    assert not torch.equal(weights(1, True), first)


@pytest.mark.parametrize("spec", WITHOUT_BATCH)
def test_a_bfloat16_model_gets_the_float32_values_rounded(spec):
    full, half = CASES["gpt2"].make(), CASES["gpt2"].make().to(torch.bfloat16)
    for wide, narrow in zip(sites(applied(spec, full)), sites(applied(spec, half)), strict=True):
        assert narrow.part.weight.dtype == torch.bfloat16
        assert torch.equal(narrow.part.read(), wide.part.read().to(torch.bfloat16))


def test_gpt2_takes_the_configs_standard_deviation():
    for name, changes in (("bert", {"initializer_range": 0.5}), ("opt-pre", {"init_std": 0.5})):
        model = CASES[name].make(**changes)
        for site in sites(applied("gpt2", model)):
            std = 0.5 / math.sqrt(2 * LAYERS) if site.role == "output" else 0.5
            n = site.part.read().numel()
            assert abs(site.part.read().square().mean() / std**2 - 1) < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_t_fixup_draws_shared_untied_embeddings_once_and_leaves_a_padding_row_zero(name):
    case = CASES[name]
    model = case.make(vocab_size=4096)
    model.set_output_embeddings(nn.Linear(16, 4096, bias=False))
    head = model.get_output_embeddings().weight.detach().clone()
    applied("t_fixup", model)

    shared = model.get_input_embeddings()
    rows = shared.weight.detach()
    if shared.padding_idx is not None:
        assert rows[shared.padding_idx].eq(0).all()
        rows = torch.cat([rows[: shared.padding_idx], rows[shared.padding_idx + 1 :]])
    std = 16**-0.5 * (9 * LAYERS) ** -0.25
    assert abs(rows.square().mean() / std**2 - 1) < 5 * math.sqrt(2 / rows.numel())
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert torch.equal(model.get_encoder().embed_tokens.weight, shared.weight)


def test_t_fixup_takes_the_width_of_narrow_embeddings():
    model = CASES["electra"].make(vocab_size=4096, tie_word_embeddings=False)
    applied("t_fixup", model)
    embedding = model.electra.embeddings.word_embeddings
    rows = embedding.weight.detach()[1:]
    std = 12**-0.5 * (9 * LAYERS) ** -0.25
    assert abs(rows.square().mean() / std**2 - 1) < 5 * math.sqrt(2 / rows.numel())
    assert embedding.weight[embedding.padding_idx].eq(0).all()


@pytest.mark.parametrize("name", ALL)
def test_fixup_makes_every_branch_zero(name):
    case = CASES[name]
    model = case.make()
    outputs = []
    for branch in applied("fixup", model).branches:
        branch.end.register_forward_hook(lambda module, args, output: outputs.append(output))
    logits(model, case.inputs())
    assert len(outputs) == len(read_architecture(model).branches)
    assert all((y[0] if isinstance(y, tuple) else y).eq(0).all() for y in outputs)


def test_it_works_on_a_model_with_residual_rules_and_leaves_their_parameters():
    model, vanilla = CASES["gpt2"].make(), CASES["gpt2"].make()
    attach(model, lambda branch: Multiplier(0.3))
    applied("xavier", model)
    applied("xavier", vanilla)
    ours = dict(model.named_parameters())
    assert all(torch.equal(ours[path], parameter) for path, parameter in vanilla.named_parameters())
    gains = [parameter for path, parameter in ours.items() if "gradguard_norm" in path]
    assert len(gains) == 4
    assert all(gain == 0.3 for gain in gains)


@pytest.mark.parametrize("spec", NAMES)
def test_every_initialisation_says_what_it_is_and_comes_back_from_its_text(spec):
    init = inits.parse(spec)
    assert isinstance(init, Initialisation)
    assert init.summary
    assert any(character.isdigit() for character in init.citation)
    assert inits.parse(inits.text(init)) == init
    assert init.needs_batch == (spec == "lsuv")


def test_none_is_no_initialisation():
    assert inits.parse_optional("none") is None
    assert inits.parse_optional("xavier:gain=0.5") == Xavier(gain=0.5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("xaver", "unknown init initialisation 'xaver'; did you mean 'xavier'"),
        ("xavier:gian=2", "unknown option 'gian'; did you mean 'gain'"),
        ("xavier:gain=0", "gain=0.0 must be above 0"),
        ("xavier:gain=nan", "gain=nan must be above 0"),
        ("orthogonal:gain=-1", "gain=-1.0 must be above 0"),
        ("xavier:distribution=norml", "did you mean 'normal'"),
        ("gpt2:std=-0.02", "std=-0.02 must be above 0"),
        ("ds_init:form=papers", "did you mean 'paper'"),
        ("lsuv:tolerance=0", "tolerance=0.0 must be above 0"),
    ],
)
def test_impossible_options_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        inits.parse(spec)


@pytest.mark.parametrize("make", [Xavier, Kaiming])
def test_an_unknown_distribution_is_refused_in_python_too(make):
    with pytest.raises(ValueError, match="'unifrom'; did you mean 'uniform'"):
        make(distribution="unifrom")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda linear: linear.to("meta"), "meta device"),
        (lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight.to(torch.int8), False)), "quantised"),
    ],
)
def test_weights_that_cannot_be_written_are_refused_before_anything_is(spoil, message):
    model = CASES["bert"].make()
    linear = model.bert.encoder.layer[1].output.dense
    spoil(linear)
    before = model.bert.encoder.layer[0].attention.self.query.weight.detach().clone()
    with pytest.raises(ValueError, match=f"output projection of mlp of encoder layer 1 .*{message}"):
        TFixup().apply(read_architecture(model))
    assert torch.equal(model.bert.encoder.layer[0].attention.self.query.weight, before)
