"""What was run: the facts that a record keeps beside the numbers."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from hf_gradguard import __version__
from hf_gradguard.config import GradGuardConfig

_LIBRARIES = ("torch", "transformers", "accelerate")


def run_facts(model: nn.Module, args: Any, config: GradGuardConfig) -> dict[str, Any]:
    """Model, arguments, versions and machine of one training, as JSON values.

    Args:
        model: what is trained.
        args: the TrainingArguments, or None outside a Trainer; access tokens in them are masked by Transformers.
        config: of the guard.
    """
    parameters = list(model.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    model_config: Any = getattr(model, "config", None)
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "class": type(model).__name__,
            "config": model_config.to_diff_dict() if hasattr(model_config, "to_diff_dict") else {},
            "parameters": sum(parameter.numel() for parameter in parameters),
            "trainable_parameters": sum(parameter.numel() for parameter in trainable),
            "dtypes": sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trainable}),
        },
        "arguments": args.to_dict() if args is not None else {},
        "guard": config.to_dict(),
        "versions": {"hf-gradguard": __version__, "python": platform.python_version()}
        | {name: version(name) for name in _LIBRARIES},
        "device": _device_name(trainable),
    }


def _device_name(parameters: list[nn.Parameter]) -> str:
    device = parameters[0].device if parameters else torch.device("cpu")
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
