"""What must not be trained, as the patch would be missing in part or in whole.

- A model whose config says that it is patched, and that is not. `GPT2LMHeadModel(config)` and
  `AutoModel.from_config(config)` make what the model class knows: a plain model. So does `from_pretrained` where
  hf_gradguard was not imported.
- A patched model with an optimizer that was made before, and does not know of what the patch has added.
- A model with the checkpoint of another patch. Transformers resumes by the names of weights alone, which tell nothing
  of a patch that has none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

_FIELD = "gradguard"
_STOCK = ("init", "activation")
"""Parts of a patch that need nothing that the model class would not make of the config."""


def refuse(model: nn.Module, optimizer: Any = None) -> None:
    """Raises ValueError, with the remedy, for a model that is patched by its config alone, or whose patch the optimizer
    does not know."""
    module, found = _description(model)
    if found is not None:
        _refuse_unbuilt(model, module, found)
        if optimizer is not None:
            _refuse_older(model, optimizer)


def refuse_checkpoint(model: nn.Module, checkpoint: str | Path) -> None:
    """Raises ValueError, with the remedy, for a checkpoint of a model that was patched otherwise, or not at all.

    Args:
        model: what the checkpoint is to be loaded into.
        checkpoint: a folder that Trainer has written. One without a config, as of adapters, is not looked at.
    """
    path = Path(checkpoint) / "config.json"
    if not path.is_file():
        return
    saved = _parts(json.loads(path.read_text(encoding="utf-8")).get(_FIELD))
    own = _parts(_description(model)[1])
    if saved == own or _without_init(saved) == _without_init(own):
        return
    remedy = f"patch_model(model, {_text(saved)!r})" if saved else "leave patch_model out"
    raise ValueError(
        f"{checkpoint} is of a model {_called(saved)}, but this {type(model).__name__} is {_called(own)}, so that the "
        f"same weights make another function. To resume that training: {remedy} before the Trainer is made; to begin "
        "another one, load the weights with from_pretrained"
    )


def unsaved(model: nn.Module) -> str | None:
    """A warning where a part of a model is patched, and the config of the model around it, which is the one that is
    saved, does not say so: an encoder-decoder put together of two models. None where all is well."""
    module, found = _description(model)
    outer = next((each for each in model.modules() if hasattr(each, "save_pretrained")), module)
    if found is None or isinstance(getattr(getattr(outer, "config", None), _FIELD, None), Mapping):
        return None
    whole, part = type(outer).__name__, type(module).__name__
    return (
        f"only a part of this {whole} is patched, a {part} with {_text(_parts(found))!r}, and the config that is saved "
        f"with the {whole} does not say so: from_pretrained will make it without the patch, which is another function. "
        f"Save the {part} for itself and put the {whole} together again from that, or fold the part (fold_patches) "
        "before you save"
    )


def _description(model: nn.Module) -> tuple[nn.Module, Mapping[str, Any] | None]:
    """What a config in a model says of its patch, and the module whose config it is; the model and None where none
    does."""
    for module in model.modules():
        found = getattr(getattr(module, "config", None), _FIELD, None)
        if isinstance(found, Mapping):
            return module, found
    return model, None


def _parts(found: Any) -> Mapping[str, str]:
    return (found.get("patch") or {}) if isinstance(found, Mapping) else {}


def _text(parts: Mapping[str, str]) -> str:
    return ";".join(f"{part}={text}" for part, text in parts.items())


def _called(parts: Mapping[str, str]) -> str:
    return f"patched with {_text(parts)!r}" if parts else "not patched"


def _without_init(parts: Mapping[str, str]) -> dict[str, object]:
    """What a patch makes of a model, whatever the words. An initialisation is no part of that."""
    from hf_gradguard.patch.config import PARTS

    return {part: PARTS[part].parse(text) if part in PARTS else text for part, text in parts.items() if part != "init"}


def _refuse_unbuilt(model: nn.Module, module: nn.Module, found: Mapping[str, Any]) -> None:
    from hf_gradguard.patch.applied import applied_to
    from hf_gradguard.patch.container import is_patched

    parts = _parts(found)
    is_stock = all(part in _STOCK for part in parts) and ("activation" not in parts or bool(found.get("original")))
    # A part of a patched model, as its body with a head of one's own, has what was built, but not the note of it.
    if is_stock or applied_to(model) is not None or is_patched(model):
        return
    patch = _text(parts)
    raise ValueError(
        f"the config of this {type(module).__name__} says that it is patched ({patch}), but the model is not: a model "
        "made of a config has only what its class knows. Load the checkpoint, which builds the patch: "
        f"load_patched({type(module).__name__}, path), from hf_gradguard; or, for a model that is to begin anew: "
        f"patch_model(model, {patch!r})"
    )


def _refuse_older(model: nn.Module, optimizer: Any) -> None:
    """For an optimizer that has every trainable parameter but some that the patch has added."""
    from hf_gradguard.patch.container import CONTAINER

    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if missing and all(CONTAINER in name.split(".") for name in missing):
        raise ValueError(
            f"the optimizer does not train {len(missing)} parameters that the patch of this {type(model).__name__} has "
            f"added ({missing[0]} …), and has all others: it was made before patch_model was called. Make it "
            "afterwards; or, if they are to stay as they are, freeze them with requires_grad_(False)"
        )
