"""Patched models out of checkpoints; see `integrations.loading` for how `from_pretrained` comes here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_gradguard.integrations.loading import METHOD, register
from hf_gradguard.patch import embedding
from hf_gradguard.patch.activation import replace_activation
from hf_gradguard.patch.anatomy import configs, read_architecture
from hf_gradguard.patch.applied import FIELD, FORMAT, QUANTIZATION, AppliedPatch, applied_to
from hf_gradguard.patch.config import PatchConfig
from hf_gradguard.patch.container import Container
from hf_gradguard.patch.model import build

_logger = logging.getLogger(__name__)


def load_patched(auto_class: Any, path: str | PathLike[str], **options: Any) -> Any:
    """Loads a patched checkpoint exactly: outputs are those that the model had when it was saved, bit for bit.

    `auto_class.from_pretrained` does the same where hf_gradguard has been imported. This makes sure that it did.

    Args:
        auto_class: what loads the model: `AutoModelForCausalLM`, `BertForMaskedLM` …
        path: of the checkpoint, or its name on the hub.
        options: whatever `from_pretrained` takes.

    Returns:
        What `from_pretrained` gives: the model, in evaluation mode.

    Raises:
        ValueError: the checkpoint holds no patch, or one that this version can't build, or it is to be quantised.

    Example:
        >>> from tempfile import mkdtemp
        >>> from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
        >>> from hf_gradguard import load_patched, patch_model
        >>> path = mkdtemp()
        >>> model = patch_model(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2)), "rezero")
        >>> model.save_pretrained(path)
        >>> type(load_patched(AutoModelForCausalLM, path)).__name__
        'GPT2LMHeadModel'
    """
    if options.get(QUANTIZATION) is not None:
        raise ValueError(
            f"{path}: a patched checkpoint can't be quantised while it is loaded. Load it without {QUANTIZATION}, "
            "merge the patch into the weights with fold_patches(model), save that, and quantise it"
        )
    register()
    loaded = auto_class.from_pretrained(path, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
    if applied_to(model) is None:
        raise ValueError(_why_not_patched(model.config, path, auto_class))
    return loaded


class Reconstruction:
    """A model while it is loaded from a checkpoint: its patch is built on what has no weights yet, and completed when
    they have come.

    Args:
        model: made of its config, on the meta device.

    Raises:
        ValueError: the config does not say what is to be built, or that can't be done with this version.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.place = f"{model.config.name_or_path or 'this checkpoint'}: config.json's field {FIELD!r}"
        self.patch, self.original = self._read()
        _settle_precision(model)
        self.applied = self._bring_back_and_build(before := set[str]())
        self.new = [name for name in _tensors(model) if name not in before]

    def finish(self) -> None:
        """Gives tensors of the patch that the checkpoint has no values for those that `patch_model` would, and leaves
        the model's config as `patch_model` does."""
        tensors = _tensors(self.model)
        missing = [name for name in self.new if not _was_loaded(tensors[name])]
        if missing or self._has_unmade_activation():
            self._build_anew({name: tensors[name] for name in self.new if name not in missing})
            self._tell(missing)
        for module in self.model.modules():
            if isinstance(module, Container):
                module.keep_frozen()
        for config in configs(self.model):
            vars(config).pop(QUANTIZATION, None)
        setattr(self.model.config, QUANTIZATION, {"quant_method": METHOD})

    def _read(self) -> tuple[PatchConfig, Mapping[str, Any]]:
        found = getattr(self.model.config, FIELD, None)
        if not isinstance(found, Mapping):
            raise ValueError(
                f"{self.place} is {found!r}, but must say how the model is patched, as {QUANTIZATION} says that it is. "
                f"Save it again with the model's own save_pretrained, or take {QUANTIZATION} out to load it unpatched"
            )
        if found.get("format") != FORMAT:
            raise ValueError(
                f"{self.place} has the format {found.get('format')!r}, and this version of hf_gradguard reads format "
                f"{FORMAT}. Install the version that the checkpoint was saved with, or a newer one"
            )
        try:
            return PatchConfig.from_dict(found["patch"]), found["original"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{self.place} can't be read: {type(error).__name__}: {error}. If the patch has a part of your own, "
                "import what registers it before you load; else install the version of hf_gradguard that the "
                "checkpoint was saved with, or a newer one"
            ) from error

    def _bring_back_and_build(self, before: set[str]) -> AppliedPatch:
        """Makes the model as its class would make it without the patch, and then patches it.

        Args:
            before: gets the names of the tensors that it has in between.
        """
        self._bring_back_activation()
        before.update(_tensors(self.model))
        anatomy = read_architecture(self.model)
        applied = build(self.model, self.patch)
        if self.patch.embedding_patch is not None:
            embedding.hang(anatomy, self.patch.embedding_patch)
        return applied

    def _bring_back_activation(self) -> None:
        """What the config has now is the patch's; `original` has what was there before."""
        if not self.original:
            return
        name = self.original.get("dense_act_fn") or next(iter(self.original.values()))  # T5's other field is no name
        replace_activation(read_architecture(self.model), name)
        for config in configs(self.model):
            vars(config).update({key: value for key, value in self.original.items() if hasattr(config, key)})

    def _has_unmade_activation(self) -> bool:
        """Whether an old activation that has weights, to be put back by `unpatch_model`, was made without values."""
        replaced = self.applied.activation
        old = () if replaced is None else (old for _, old in replaced.old_modules if isinstance(old, nn.Module))
        return any(tensor.is_meta for module in old for tensor in _tensors(module).values())

    def _build_anew(self, loaded: Mapping[str, Tensor]) -> None:
        """Patches the model once more, now that it has weights, and keeps what has come of the patch's own."""
        self.applied.take_away(self.model)
        self.applied = self._bring_back_and_build(set())
        tensors = _tensors(self.model)
        with torch.no_grad():
            for name, tensor in loaded.items():
                tensors[name].copy_(tensor)

    def _tell(self, missing: list[str]) -> None:
        saved = self.model.state_dict().keys() & missing
        if not saved:
            return
        _logger.warning(
            "gradguard: %s: no values in the checkpoint for %d tensors of the patch %s (%s …); they begin as "
            "patch_model begins them%s",
            self.model.config.name_or_path or "this checkpoint",
            len(saved),
            self.patch,
            min(saved),
            "" if self.patch.init is None else f", but init={self.patch.init} is not drawn when a model is loaded",
        )


def _why_not_patched(config: Any, path: str | PathLike[str], auto_class: Any) -> str:
    name = getattr(auto_class, "__name__", auto_class)
    if getattr(config, FIELD, None) is None:
        return (
            f"{path} holds no patch: its config.json has no field {FIELD!r}. Load it with {name}.from_pretrained, and "
            "give it to patch_model if it is to have one"
        )
    return (
        f"{path} is a patched checkpoint, but was loaded without its patch and would compute another function: its "
        f"config's {QUANTIZATION} is {getattr(config, QUANTIZATION, None)!r} where "
        f"{{'quant_method': {METHOD!r}}} should be. Put that into its config.json"
    )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, those that are not saved included."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _was_loaded(tensor: Tensor) -> bool:
    """Whether a checkpoint gave a tensor its values; there is no public way to learn that here. Transformers marks
    those, so that its own initialisation leaves them alone."""
    return getattr(tensor, "_is_hf_initialized", False)


def _settle_precision(model: PreTrainedModel) -> None:
    """Gives weights that will be loaded in float32 whatever the model's dtype, as T5's `wo`, that dtype already; what
    the patch adds is made alike. Which ones is said only by attributes that model classes give to Transformers."""
    kept: list[str] = list(model._keep_in_fp32_modules_strict or ())
    if model.dtype == torch.float16:
        kept += model._keep_in_fp32_modules or ()
    if model.dtype == torch.float32:
        return
    for name, parameter in model.named_parameters():
        if any(part in name for part in kept):
            parameter.data = parameter.data.float()
