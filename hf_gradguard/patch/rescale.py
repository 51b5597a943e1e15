"""Constant factors, multiplied into the weights that lie before or behind a place in a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradguard.patch.anatomy import Anatomy, Branch, Stack, configs
from hf_gradguard.patch.parts import Part

TIED = "tie_word_embeddings"
"""The field of a config that says that output embeddings are the input embeddings."""


def scale_output(part: Part, gain: Tensor | float) -> None:
    """Multiplies what a linear map gives: its weight and its bias.

    Args:
        part: the map.
        gain: one number, [1], or one for each output feature, [out_features].
    """
    weight, bias = part.read(), part.read_bias()
    column = torch.as_tensor(gain, dtype=_wide(weight).dtype, device=weight.device).reshape(-1)
    part.write(_wide(weight) * column[:, None])
    if bias is not None:
        part.write_bias(_wide(bias) * column)


def scale_input(part: Part, factor: float) -> None:
    """Multiplies what a linear map gets: its weight alone."""
    part.write(_wide(part.read()) * factor)


def scale_norm(norm: nn.Module, factor: float) -> None:
    """Multiplies what a LayerNorm gives."""
    for parameter in norm.parameters():
        _scale(parameter, factor)


def readers(branch: Branch) -> tuple[Part, ...]:
    """The linear maps of a branch that get the residual stream, in a post-norm model as it is."""
    attention = (branch.query,) if branch.kind == "cross_attention" else (branch.query, branch.key, branch.value)
    return (*(part for part in attention if part is not None), *branch.inner)


def entry_weights(stack: Stack) -> list[nn.Parameter]:
    """The parameters to multiply so that the stream into the first layer is multiplied.

    Raises:
        ValueError: there are no such parameters; the message is the reason.
    """
    norm = None if stack.embedding_norm is None else stack.embedding_norm.value
    projection = stack.embedding_projection
    if norm is not None and not is_layer_norm(norm):
        raise ValueError(f"the embeddings go through a {type(norm).__name__}, which has no weight and bias to scale")
    if norm is not None and (projection is None or _is_behind(norm, projection)):
        return list(norm.parameters())
    if projection is None:
        modules: tuple[nn.Module, ...] = stack.embeddings
    else:
        modules = (projection,) if norm is not None else (projection, *stack.embeddings[1:])
    for module in modules:
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            raise ValueError(f"the embeddings come from a {type(module).__name__} that has no weight to scale")
    return [parameter for module in modules for parameter in module.parameters(recurse=False)]


def scale_entries(anatomy: Anatomy, factors: Mapping[Stack, float]) -> None:
    """Multiplies the streams into some stacks. Embeddings that are tied to the output embeddings are untied before, so
    that logits stay; `refuse_entries` has to allow it.

    Args:
        anatomy: the model's.
        factors: what each stack's stream is multiplied with.
    """
    changed = {stack: factor for stack, factor in factors.items() if factor != 1}
    scales = {weight: factor for stack, factor in changed.items() for weight in entry_weights(stack)}
    if _are_tied(anatomy, scales):
        _untie(anatomy)
    for weight, factor in scales.items():
        _scale(weight, factor)


def refuse_entries(anatomy: Anatomy, factors: Mapping[Stack, float]) -> str | None:
    """Why `scale_entries` can't be done; None if it can."""
    scales: dict[nn.Parameter, float] = {}
    for stack, factor in factors.items():
        try:
            weights = entry_weights(stack)
        except ValueError as error:
            return str(error)
        for weight in weights:
            if scales.setdefault(weight, factor) != factor:
                return f"stacks share their embeddings, and need them × {scales[weight]:.4g} and × {factor:.4g}"
    changed = {weight: factor for weight, factor in scales.items() if factor != 1}
    return _refuse_untying(anatomy) if _are_tied(anatomy, changed) else None


def scale_head(anatomy: Anatomy, factor: float) -> None:
    """Multiplies what the output embeddings make of hidden states, but not their bias. They are untied from the input
    embeddings before; `refuse_head` has to allow it."""
    if _has_tied_head(anatomy):
        _untie(anatomy)
    head: Any = anatomy.output_embeddings
    _scale(head.weight, factor)


def refuse_head(anatomy: Anatomy) -> str | None:
    """Why `scale_head` can't be done; None if it can."""
    return _refuse_untying(anatomy) if _has_tied_head(anatomy) else None


def is_layer_norm(norm: Any) -> bool:
    """Whether a norm is a LayerNorm with a weight, by which it multiplies: another kind may multiply by 1 + weight."""
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None


def _is_behind(norm: Any, projection: Any) -> bool:
    """Whether a norm of the embeddings is of the width that the projection gives, not of that which it takes."""
    return bool(norm.weight.numel() == projection.weight.shape[0])


def _has_tied_head(anatomy: Anatomy) -> bool:
    """Whether output embeddings have their weight in common with other modules."""
    weight = getattr(anatomy.output_embeddings, "weight", None)
    return sum(parameter is weight for _, parameter in anatomy.model.named_parameters(remove_duplicate=False)) > 1


def _are_tied(anatomy: Anatomy, scales: Mapping[nn.Parameter, float]) -> bool:
    """Whether output embeddings are tied to something that is scaled, or would be in a model loaded with a head."""
    if getattr(anatomy.output_embeddings, "weight", None) in scales:
        return True
    tokens = {getattr(stack.embeddings[0], "weight", None) for stack in anatomy.stacks}
    return bool(getattr(anatomy.model.config, TIED, False)) and not tokens.isdisjoint(scales)


def _untie(anatomy: Anatomy) -> None:
    """Gives the output embeddings a weight and a bias of their own."""
    model, head = anatomy.model, anatomy.output_embeddings
    for config in configs(model):
        setattr(config, TIED, False)
    if head is not None:
        for name, old in list(head.named_parameters(recurse=False)):
            setattr(head, name, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
        if getattr(model.config, "scale_decoder_outputs", False):
            # T5 multiplies with 1/√d what goes into tied output embeddings, and takes their being untied for T5 1.1,
            # which does not
            _scale(head.get_parameter("weight"), model.config.d_model**-0.5)
            for config in configs(model):
                config.scale_decoder_outputs = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _refuse_untying(anatomy: Anatomy) -> str | None:
    """Why output embeddings can't be untied from input embeddings: a model loaded untied lacks other ties, too."""
    model, head = anatomy.model, anatomy.output_embeddings
    config = copy.deepcopy(model.config)
    setattr(config, TIED, False)
    if getattr(type(config).from_dict(config.to_dict()), TIED, False):  # T5's config ties whatever it is told
        return None
    names = [name for name, module in model.named_modules() if module is head]
    own = {f"{name}.{parameter}" for name in names for parameter in ("weight", "bias")}
    lost = model.get_expanded_tied_weights_keys(all_submodels=True).keys() - own
    if not lost:
        return None
    return (
        f"the output embeddings have to be untied from the input embeddings, and the same field of the config ({TIED}) "
        f"ties {', '.join(sorted(lost))}"
    )


def _scale(tensor: Tensor, factor: float) -> None:
    tensor.copy_(_wide(tensor.detach()) * factor)


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least, so that a product is rounded once."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
