"""Another activation function in the MLPs of a model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from hf_gradguard.patch.anatomy import Anatomy, configs
from hf_gradguard.patch.parts import Slot
from hf_gradguard.registry import nearest

_FIELDS = ("hidden_act", "activation_function", "hidden_activation", "activation", "feed_forward_proj")
"""What Transformers' configs call the activation."""


@dataclass(frozen=True, eq=False)
class ReplacedActivation:
    """What `replace_activation` did, and the way back."""

    name: str
    """The activation that is there now."""
    field: str | None
    """The field of the config that says so; None where no field decides, so that only GradGuard can load the model."""
    old_modules: tuple[tuple[Slot, Any], ...]
    """Each place with what was there."""
    old_settings: tuple[tuple[Any, str, Any], ...]
    """Each config with a field and its old value."""

    def restore(self) -> None:
        """Puts back the modules themselves, with whatever they have learned, and the config's values."""
        for slot, old in self.old_modules:
            if not isinstance(old, nn.Module):  # a function can't take a module's place by mere assignment
                delattr(slot.owner, slot.name)
            slot.replace(old)
        for config, field, value in self.old_settings:
            setattr(config, field, value)


def check_known(name: str) -> None:
    """Raises ValueError for a name that is not in Transformers' `ACT2FN`; the message has the nearest known."""
    if not isinstance(name, str) or name not in ACT2FN:
        close, known = nearest(str(name), ACT2FN), ", ".join(sorted(ACT2FN))
        raise ValueError(f"unknown activation {name!r}{close}. Known: {known}")


def replace_activation(anatomy: Anatomy, name: str) -> ReplacedActivation:
    """Gives every MLP another activation, in place; in a gated MLP that of the gate.

    The config says so afterwards, and a model saved then loads with the same outputs without GradGuard: true of all
    architectures in the table. For that, whatever else takes its activation from the same field of the config is
    changed too: the layer before the logits in BERT's and DistilBERT's masked language models.

    `prelu` and `xielu` have parameters, one set for each MLP, with their usual start values.

    Args:
        anatomy: where the MLPs are.
        name: any of Transformers' `ACT2FN`: relu, leaky_relu, gelu, silu, sigmoid, tanh and others.

    Returns:
        What was done, with `restore()`.

    Raises:
        ValueError: the name is unknown; the message has the nearest known.
    """
    check_known(name)
    slots = _branch_slots(anatomy)
    field, places = _deciding_field(anatomy.model, set(slots))
    modules = dict(anatomy.model.named_modules())
    for place in sorted(places - set(slots)):
        owner, _, attribute = place.rpartition(".")
        if place in modules:
            slots[place] = Slot(modules[owner], attribute)
    old_modules = tuple((slot, slot.value) for slot in slots.values())
    for slot, _ in old_modules:
        slot.replace(_make(name, slot.owner, anatomy))
    old_settings = []
    for config in configs(anatomy.model):
        for key, value in _settings(config, field, name).items():
            old_settings.append((config, key, getattr(config, key)))
            setattr(config, key, value)
    return ReplacedActivation(name, field, old_modules, tuple(old_settings))


def _branch_slots(anatomy: Anatomy) -> dict[str, Slot]:
    """The activation of each MLP by its path in the model."""
    names = {module: name for name, module in anatomy.model.named_modules()}
    found = [branch.activation for branch in anatomy.branches if branch.activation is not None]
    return {f"{names[slot.owner]}.{slot.name}".lstrip("."): slot for slot in found}


def _deciding_field(model: PreTrainedModel, wanted: set[str]) -> tuple[str | None, set[str]]:
    """The field of the config that decides about the activations at some paths, and all paths about which it does.

    A model of the same class, without weights, is made with `linear` as the field's value, which no model has of
    itself: where it then is, the field decides.
    """
    for field in _FIELDS:
        config = copy.deepcopy(model.config)
        if not (settings := _settings(config, field, "linear")):
            continue
        for key, value in settings.items():
            setattr(config, key, value)
        if hasattr(config, "gradguard"):  # a class that patches what its config says must not do it here
            del config.gradguard
        with torch.device("meta"):
            probe = type(model)(config)
        linear = type(ACT2FN["linear"])
        places = {path for path, module in probe.named_modules() if isinstance(module, linear)}
        if wanted <= places:
            return field, places
    return None, set()


def _settings(config: Any, field: str | None, name: str) -> dict[str, str]:
    """The values that a config needs for an activation; none if it has no such field."""
    if field is None or not isinstance(getattr(config, field, None), str):
        return {}
    if field == "feed_forward_proj":
        # T5's text for the gated MLP, and what is read of it: `gated-gelu` alone would be read as gelu_new
        return {field: f"gated-{name}" if config.is_gated_act else name, "dense_act_fn": name}
    return {field: name}


def _make(name: str, owner: nn.Module, anatomy: Anatomy) -> nn.Module:
    """A new activation, with the device, dtype and mode of the place that it is for."""
    like = next(owner.parameters(), anatomy.branches[0].output.weight)
    default = torch.get_default_dtype()
    if like.is_floating_point():
        # as Transformers makes it: xielu has a dtype of its own, which `.to(dtype)` would change
        torch.set_default_dtype(like.dtype)
    try:
        activation: nn.Module = ACT2FN[name]
    finally:
        torch.set_default_dtype(default)
    return activation.to(like.device).train(owner.training)
