"""What a patch has done to a model, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_gradguard.integrations.optimizer_check import OptimizerCheck
from hf_gradguard.patch.activation import ReplacedActivation
from hf_gradguard.patch.anatomy import configs
from hf_gradguard.patch.config import PatchConfig
from hf_gradguard.patch.container import remove_all

ATTRIBUTE = "gradguard_patch"
"""The attribute of a patched model that holds its `AppliedPatch`."""
FIELD = "gradguard"
"""The field of a patched model's config, and of its `config.json`, that says how it is patched."""
QUANTIZATION = "quantization_config"
"""The field of a config by which Transformers finds who takes part in loading a checkpoint; see `loading`."""
FORMAT = 1


@dataclass(eq=False)
class AppliedPatch:
    """A patch as it is on a model."""

    config: PatchConfig
    activation: ReplacedActivation | None = None
    original: dict[str, Tensor] | None = None
    """With `keep_original`: every weight as it was, on the CPU."""
    check: OptimizerCheck | None = None
    """Where the residual rule scales the optimizer's options: sees that they are."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's config that the patch has changed, with what they were."""

    def describe(self) -> dict[str, Any]:
        """What `config.json` says of it."""
        return {"format": FORMAT, "patch": self.config.to_dict(), "original": dict(self.settings)}

    def take_away(self, model: PreTrainedModel) -> None:
        """Leaves the model as it was, but for what has happened to its weights; those too, where they were kept."""
        remove_all(model)
        self.check = None
        if self.activation is not None:
            self.activation.restore()
        for config in configs(model):
            for name in (FIELD, QUANTIZATION):
                if hasattr(config, name):
                    delattr(config, name)
        delattr(model, ATTRIBUTE)
        if self.original is not None:
            with torch.no_grad():
                state = {_without_adapters(name): tensor for name, tensor in model.state_dict().items()}
                for name, tensor in self.original.items():
                    state[name].copy_(tensor)


def _without_adapters(name: str) -> str:
    """The name that a weight has without the adapters that PEFT has put around it."""
    return ".".join(step for step in name.split(".") if step not in ("base_layer", "original_module"))


def applied_to(model: nn.Module) -> tuple[PreTrainedModel, AppliedPatch] | None:
    """The patched Transformers model in a module, and its patch; None where there is none."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and ATTRIBUTE in vars(module):
            return module, vars(module)[ATTRIBUTE]
    return None
