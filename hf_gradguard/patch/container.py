"""What a patch adds to a layer, in one place, so that it can be taken away again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

CONTAINER = "gradguard_norm"
"""The child of a layer that holds all that a patch adds to it. Trainer gives no weight decay to anything whose name has
a step that ends in `_norm`, so nothing of a patch is decayed, whatever it is called."""


@dataclass(eq=False)
class _End:
    """A hook on a branch's last linear module, which PEFT may replace."""

    path: str
    hook: Callable[..., Any]
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
        self.ends: list[_End] = []  # no children, as they are not modules: what they hold stays where it is

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

    def after_linear(self, layer: nn.Module, path: str, hook: Callable[..., Any]) -> None:
        """A forward hook on a linear module of the layer, or on the adapter that PEFT puts in its place later."""
        module = layer.get_submodule(path)
        if not self.ends:
            self.hold(layer.register_forward_pre_hook(self.follow))
        self.ends.append(_End(path, hook, module, module.register_forward_hook(hook)))

    def follow(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the layer: takes a hook along to the module that stands where its own was, as PEFT's adapters do."""
        for end in self.ends:
            module = layer.get_submodule(end.path)
            if module is not end.module:
                end.handle.remove()
                end.module, end.handle = module, module.register_forward_hook(end.hook)

    def remove(self, layer: nn.Module) -> None:
        """Leaves the layer as it was before `container_of` made this."""
        for handle in [*self.handles, *(end.handle for end in self.ends)]:
            handle.remove()
        for owner, name, value in reversed(self.settings):
            setattr(owner, name, value)
        delattr(layer, CONTAINER)


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


def alike(module: nn.Module, weight: Tensor) -> nn.Module:
    """The module, with the device of a weight, and its dtype where that is one to compute in."""
    return module.to(device=weight.device, dtype=weight.dtype if weight.is_floating_point() else None)
