"""What a patch adds to a layer, in one place, so that it can be taken away again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from hf_gradguard.patch.parts import below_adapters

CONTAINER = "gradguard_norm"
"""The child of a layer that holds all that a patch adds to it. Trainer gives no weight decay to anything whose name has
a step that ends in `_norm`, so nothing of a patch is decayed, whatever it is called."""


@dataclass(eq=False)
class _Following:
    """A hook on a linear module, which PEFT may replace."""

    path: str
    hook: Callable[..., Any]
    is_before: bool
    module: nn.Module
    handle: RemovableHandle


class Container(nn.Module):
    """The modules that a patch adds to one layer, the hooks that they hang in, and what was there before.

    Hooks are methods of the modules in here, so deepcopy, pickle, `.to` and `torch.compile` take them along.
    """

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[RemovableHandle] = []
        self.settings: list[tuple[nn.Module, str, Any]] = []
        self.frozen: list[tuple[nn.Module, str]] = []
        self.following: list[_Following] = []  # no children, as they are not modules: what they hold stays where it is

    def hold(self, *handles: RemovableHandle) -> None:
        """Keeps hooks, to remove them with the container."""
        self.handles.extend(handles)

    def set(self, owner: nn.Module, name: str, value: Any) -> None:
        """Sets an attribute of a module of the layer until the container is taken away."""
        self.settings.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def old_settings(self, owner: nn.Module) -> dict[str, Any]:
        """The attributes of a module that `set` has changed, as they were."""
        return {name: value for module, name, value in reversed(self.settings) if module is owner}

    def freeze(self, norm: nn.Module) -> None:
        """Takes a norm that is off out of training until the container is taken away: it gets no gradient, for which
        DDP would wait, and an optimizer needs no state for it."""
        self.frozen += [(norm, name) for name, parameter in norm.named_parameters() if parameter.requires_grad]
        self.keep_frozen()

    def keep_frozen(self) -> None:
        """Freezes anew what is frozen: for loading, which puts other parameters in place of those that were there."""
        for norm, name in self.frozen:
            norm.get_parameter(name).requires_grad_(False)

    def before(self, layer: nn.Module, path: str, hook: Callable[..., Any]) -> None:
        """A forward pre-hook, with keyword arguments, on a module of the layer, or on the adapter that PEFT puts in
        place of a linear one later."""
        self._hang(layer, path, hook, is_before=True)

    def after(self, layer: nn.Module, path: str, hook: Callable[..., Any]) -> None:
        """A forward hook on a module of the layer, or on the adapter that PEFT puts in place of a linear one later."""
        self._hang(layer, path, hook, is_before=False)

    def _hang(self, layer: nn.Module, path: str, hook: Callable[..., Any], *, is_before: bool) -> None:
        module = layer.get_submodule(path)
        handle = _register(module, hook, is_before)
        if not _is_linear(module):
            self.hold(handle)
            return
        if not self.following:
            self.hold(layer.register_forward_pre_hook(self.follow))
        self.following.append(_Following(path, hook, is_before, module, handle))

    def follow(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the layer: takes hooks along to the modules that stand where theirs were, as PEFT's adapters do."""
        for each in self.following:
            module = layer.get_submodule(each.path)
            if module is not each.module:
                each.handle.remove()
                each.module, each.handle = module, _register(module, each.hook, each.is_before)

    def remove(self, layer: nn.Module) -> None:
        """Leaves the layer as it was before `container_of` made this."""
        for handle in [*self.handles, *(each.handle for each in self.following)]:
            handle.remove()
        for norm, name in self.frozen:
            norm.get_parameter(name).requires_grad_(True)
        for owner, name, value in reversed(self.settings):
            setattr(owner, name, value)
        delattr(layer, CONTAINER)


def _register(module: nn.Module, hook: Callable[..., Any], is_before: bool) -> RemovableHandle:
    if is_before:
        return module.register_forward_pre_hook(hook, with_kwargs=True)
    return module.register_forward_hook(hook)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(below_adapters(module), nn.Linear | Conv1D)


def container_of(layer: nn.Module) -> Container:
    """The container of a layer; a new one where there is none yet."""
    if not hasattr(layer, CONTAINER):
        layer.add_module(CONTAINER, Container().train(layer.training))
    found: Container = getattr(layer, CONTAINER)
    return found


def is_patched(model: nn.Module) -> bool:
    """Whether any layer of a model has a container."""
    return any(hasattr(module, CONTAINER) for module in model.modules())


def remove_all(model: nn.Module) -> None:
    """Takes away every container in a model."""
    for layer in [module for module in model.modules() if hasattr(module, CONTAINER)]:
        container: Container = getattr(layer, CONTAINER)
        container.remove(layer)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # compiled code does not look whether hooks are still there


def alike(module: nn.Module, weight: Tensor) -> nn.Module:
    """The module, with the device of a weight, and its dtype where that is one to compute in."""
    return module.to(device=weight.device, dtype=weight.dtype if weight.is_floating_point() else None)
