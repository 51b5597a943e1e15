"""What one unit of a layer is: the weights that make one of its outputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hf_gradguard.observe.layout import HEAD, Layout


@dataclass(frozen=True)
class Units:
    """The units of a model's trainable parameters, which do not change while it trains."""

    dimensions: tuple[tuple[int, ...], ...]
    """The dimensions along which each parameter's units are counted `[P]`; a unit's norm is taken over the others.
    Empty for a parameter that is one unit: a vector or a scalar."""
    final: frozenset[int]
    """Indices of the parameters of the final linear layer, which makes the model's predictions."""


def read_units(model: nn.Module, layout: Layout, parameters: Sequence[nn.Parameter]) -> Units:
    """Finds the units of every parameter from the module that owns it.

    A unit is a row of a Linear, Embedding or recurrent layer, a filter of a convolution, a column of Transformers'
    `Conv1D`, which stores its weight as [in, out], and a row of each of the matrices that a mixture of experts keeps in
    one tensor.

    The final linear layer is what `get_output_embeddings()` gives, also where it is tied to the embeddings. A model
    without one, such as a classifier, has as its final layer the last linear layer of the layout's head, and none where
    the layout has no head.

    Args:
        model: any module; may be wrapped.
        layout: of this model.
        parameters: the layout's parameters, in its order `[P]`.
    """
    owners: dict[nn.Parameter, nn.Module] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, module)
    head = {
        parameter
        for parameter, info in zip(parameters, layout.parameters, strict=True)
        if layout.groups[info.group].kind == HEAD
    }
    last = _final_linear(model, head)
    final = set() if last is None else set(last.parameters())
    return Units(
        dimensions=tuple(_unit_dimensions(owners[parameter], parameter) for parameter in parameters),
        final=frozenset(index for index, parameter in enumerate(parameters) if parameter in final),
    )


def _unit_dimensions(owner: nn.Module, parameter: nn.Parameter) -> tuple[int, ...]:
    from transformers.pytorch_utils import Conv1D

    if parameter.dim() < 2:
        return ()
    if isinstance(owner, Conv1D | _ConvTransposeNd):
        return (1,)
    if parameter.dim() == 2 or isinstance(owner, _ConvNd | nn.Bilinear):
        return (0,)
    if parameter.numel() == max(parameter.shape):  # a vector that is shaped to be broadcast
        return ()
    # A stack of matrices. Experts that store theirs as [in, out] say so.
    *stack, rows, columns = range(parameter.dim())
    return (*stack, columns if getattr(owner, "is_transposed", False) else rows)


def _final_linear(model: nn.Module, head: Collection[nn.Parameter]) -> nn.Module | None:
    from transformers.pytorch_utils import Conv1D

    linear: nn.Module | None = None
    for module in model.modules():
        find = getattr(module, "get_output_embeddings", None)
        output = None if find is None else find()
        if isinstance(output, nn.Module):
            return output
        if isinstance(module, nn.Linear | Conv1D) and any(parameter in head for parameter in module.parameters()):
            linear = module
    return linear
