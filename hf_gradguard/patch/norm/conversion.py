"""How norms come to act elsewhere, while their weights stay where they are.

A norm that has to act elsewhere is called by a hook there, and switched off where the model calls it: a hook after it
gives back what it got. (What it computes there for nothing is small beside the branch; compiled code leaves it out.)
On an addition in a pre-norm model it is the branch's tap that calls it; see `taps`. New norms, on outputs and at the
end, are of the kind of those that the layer has, with weight one and bias zero. Norms that act nowhere are frozen.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_gradguard.patch.anatomy import Anatomy, Branch, Layer, Stack
from hf_gradguard.patch.container import alike, container_of
from hf_gradguard.patch.norm.placement import Placement
from hf_gradguard.patch.parts import Slot
from hf_gradguard.patch.taps import TapNorms


class MovedNorm(nn.Module):
    """The hooks of a norm that acts before a branch, or not at all, instead of where the model calls it.

    Args:
        norm: the norm, which stays the layer's child.
        argument: which argument of the branch's first module its input is.
    """

    def __init__(self, norm: nn.Module, argument: int | str) -> None:
        super().__init__()
        self.norm = (norm,)  # in a tuple it is no child
        self.argument = argument

    def bypass(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After the norm, where the model calls it: what went in."""
        return args[0] if args else next(iter(kwargs.values()))

    def normalise(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the branch: its input, normalised."""
        return _with_argument(self.argument, args, kwargs, self.norm[0].forward)


class FinalNorm(nn.Module):
    """The norm of what the last layer gives.

    Args:
        norm: the norm.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def after_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the last layer."""
        if isinstance(output, tuple):
            return (self.norm(output[0]), *output[1:])
        return self.norm(output)


@dataclass(frozen=True, eq=False)
class Conversion:
    """A model's norms as they are to be: first `taps` go to `attach_to`, then `hang` does the rest."""

    anatomy: Anatomy
    """Of the converted model: `norm_position` and `norm` of the branches are those after the conversion."""
    taps: Mapping[Branch, TapNorms]
    """What happens in the taps of each branch of `anatomy`."""
    final_norms: Mapping[Stack, nn.Module]
    """New norms after the last layer, by the stack of `before`."""
    placement: Placement | None
    """Where norms are to act; None leaves them as they are."""
    before: Anatomy
    """Of the model as it is."""

    def hang(self) -> None:
        """Puts in all hooks that are not the taps'."""
        if self.placement is None:
            return
        for layer in self.before.layers:
            for branch in layer.branches:
                _move(layer, branch, self.placement)
        for stack in self.before.stacks:
            last = stack.layers[-1]
            if stack in self.final_norms:
                _hang_final(last, self.final_norms[stack])
            elif not self.placement.final and stack.final_norm is not None:
                _hang_bypass(last, stack.final_norm.value, "final_moved", 0)
                container_of(last.module).freeze(stack.final_norm.value)


def convert(anatomy: Anatomy, placement: Placement | None) -> Conversion:
    """Plans a conversion; nothing is changed yet.

    Args:
        anatomy: of the model as it is.
        placement: where its norms are to act; None leaves them as they are.
    """
    if placement is None:
        return Conversion(anatomy, {}, {}, None, anatomy)
    taps: dict[Branch, TapNorms] = {}
    stacks = [_converted(stack, placement, taps) for stack in anatomy.stacks]
    finals = {
        stack: _new_norm(_kind(stack)) for stack in anatomy.stacks if placement.final and stack.final_norm is None
    }
    return Conversion(dataclasses.replace(anatomy, stacks=tuple(stacks)), taps, finals, placement, anatomy)


def _converted(stack: Stack, placement: Placement, taps: dict[Branch, TapNorms]) -> Stack:
    kind = _kind(stack)
    layers = []
    for layer in stack.layers:
        branches = []
        for branch in layer.branches:
            slot, is_new = branch.norm, False
            if placement.own == "sum" and isinstance(slot.value, nn.Identity):
                owner = nn.Module()
                owner.norm = _new_norm(kind)
                slot, is_new = Slot(owner, "norm"), True
            converted = dataclasses.replace(branch, norm_position=placement.position, norm=slot)
            joins = placement.own == "sum" and branch.norm_position == "pre"
            if joins or placement.output:
                output = _new_norm(kind) if placement.output else None
                taps[converted] = TapNorms(output, slot.value if joins else None, is_new)
            branches.append(converted)
        layers.append(dataclasses.replace(layer, branches=tuple(branches)))
    return dataclasses.replace(stack, layers=tuple(layers))


def _move(layer: Layer, branch: Branch, placement: Placement) -> None:
    """Hooks for one branch's own norm."""
    norm: nn.Module = branch.norm.value
    if branch.norm_position == placement.position or isinstance(norm, nn.Identity):
        return
    moved = _hang_bypass(layer, norm, f"{branch.kind}_moved", branch.input.argument)
    if placement.own == "input":
        container_of(layer.module).before(layer.module, branch.entry.input.module, moved.normalise)
    elif placement.own == "off":
        container_of(layer.module).freeze(norm)


def _hang_bypass(layer: Layer, norm: nn.Module, name: str, argument: int | str) -> MovedNorm:
    """Switches a norm off where the model calls it."""
    container, moved = container_of(layer.module), MovedNorm(norm, argument)
    container.add_module(name, moved.train(layer.module.training))
    container.hold(norm.register_forward_hook(moved.bypass, with_kwargs=True))
    return moved


def _hang_final(last: Layer, norm: nn.Module) -> None:
    """A norm after a stack's last layer."""
    container = container_of(last.module)
    final = FinalNorm(alike(norm, last.branches[0].output.weight))
    container.add_module("final", final.train(last.module.training))
    container.hold(last.module.register_forward_hook(final.after_layer))


def _kind(stack: Stack) -> nn.Module:
    """A norm of the stack, to make others like it."""
    found = (branch.norm.value for layer in stack.layers for branch in layer.branches)
    kind: nn.Module = next(norm for norm in found if not isinstance(norm, nn.Identity))
    return kind


def _new_norm(kind: nn.Module) -> nn.Module:
    """A norm of the same kind as another, with weight one and bias zero. To be made before that one has hooks."""
    norm = copy.deepcopy(kind)
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return norm.requires_grad_()


def _with_argument(argument: int | str, args: tuple[Any, ...], kwargs: dict[str, Any], function: Any) -> Any:
    """Arguments with one of them replaced by a function of it."""
    if isinstance(argument, str):
        return args, {**kwargs, argument: function(kwargs[argument])}
    if argument < len(args):
        return (*args[:argument], function(args[argument]), *args[argument + 1 :]), kwargs
    raise RuntimeError(f"the branch was called with {len(args)} positional arguments, so its input is not among them")
