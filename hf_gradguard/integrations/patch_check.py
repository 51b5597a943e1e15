"""A model whose config says that it is patched, and that is not, must not be trained.

`GPT2LMHeadModel(config)` and `AutoModel.from_config(config)` make what the model class knows: a plain model. So does
`from_pretrained` where hf_gradguard was not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_FIELD = "gradguard"
_STOCK = ("init", "activation")
"""Parts of a patch that need nothing that the model class would not make of the config."""


def refuse(model: nn.Module) -> None:
    """Raises ValueError, with the remedy, for a model that is patched by its config alone."""
    for module in model.modules():
        found = getattr(getattr(module, "config", None), _FIELD, None)
        if isinstance(found, Mapping):
            _refuse_unbuilt(model, module, found)
            return


def _refuse_unbuilt(model: nn.Module, module: nn.Module, found: Mapping[str, Any]) -> None:
    from hf_gradguard.patch.applied import applied_to
    from hf_gradguard.patch.container import is_patched

    parts: Mapping[str, str] = found.get("patch") or {}
    is_stock = all(part in _STOCK for part in parts) and ("activation" not in parts or bool(found.get("original")))
    # A part of a patched model, as its body with a head of one's own, has what was built, but not the note of it.
    if is_stock or applied_to(model) is not None or is_patched(model):
        return
    patch = ";".join(f"{part}={text}" for part, text in parts.items())
    raise ValueError(
        f"the config of this {type(module).__name__} says that it is patched ({patch}), but the model is not: a model "
        "made of a config has only what its class knows. Load the checkpoint, which builds the patch: "
        f"load_patched({type(module).__name__}, path), from hf_gradguard; or, for a model that is to begin anew: "
        f"patch_model(model, {patch!r})"
    )
