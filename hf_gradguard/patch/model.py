"""Patching a model in place, and taking the patch away."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Generator, Tensor, nn
from transformers import PreTrainedModel

from hf_gradguard.backends.dtensor import is_sharded
from hf_gradguard.integrations.optimizer_check import OptimizerCheck
from hf_gradguard.patch import conflicts, embedding
from hf_gradguard.patch.activation import replace_activation
from hf_gradguard.patch.anatomy import Anatomy, Branch, configs, own_configs, pretrained, read_architecture
from hf_gradguard.patch.applied import ATTRIBUTE, FIELD, QUANTIZATION, AppliedPatch, applied_to
from hf_gradguard.patch.config import PatchConfig
from hf_gradguard.patch.norm import convert
from hf_gradguard.patch.residual import rules
from hf_gradguard.patch.taps import MakeRule, attach_to, refuse_patched

_logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


def patch_model(
    model: M,
    patch: str | PatchConfig,
    *,
    batch: Mapping[str, Any] | None = None,
    keep_original: bool = False,
    generator: Generator | None = None,
) -> M:
    """Changes a model in place: residual connections, norms, initialisation, activation, attention, embeddings.

    The model stays the same object of the same class, and trains, saves and generates as before. `unpatch_model` takes
    the patch away, `fold_patches` merges it into the weights where that can be done. To be called before the model goes
    to an optimizer, PEFT, DDP, FSDP or `torch.compile`.

    Args:
        model: a Transformers model of an architecture in the table (`list_architectures`).
        patch: a preset's name (`deepnorm`), parts as text (`residual=layerscale:init=0.1;norm=pre`), or a
            `PatchConfig`.
        batch: what the model's forward takes, by name, for a patch that measures the model (`lsuv`).
        keep_original: keep a copy of all weights on the CPU, so that `unpatch_model` can restore them.
        generator: what the random numbers of an initialisation come from; torch's own of the CPU if None.

    Returns:
        The same model.

    Raises:
        ValueError: the patch is unknown, fights with itself or does not fit the model, or the model is patched already,
            quantised, sharded or wrapped. The model is unchanged then.
        TypeError: there is no Transformers model in it.

    Example:
        >>> from transformers import BertConfig, BertLMHeadModel
        >>> model = BertLMHeadModel(BertConfig(num_hidden_layers=100, hidden_size=64, num_attention_heads=4))
        >>> patch_model(model, "pre_ln_scaled") is model
        True
    """
    config = PatchConfig.parse(patch)
    inner = _patchable(model)
    anatomy = read_architecture(inner)
    initialisation = config.initialisation
    is_measured = initialisation is not None and initialisation.needs_batch
    if is_measured and batch is None:
        raise ValueError(
            f"init={config.init!r} measures the model on a batch and got none: patch_model(model, {str(patch)!r}, "
            "batch=next(iter(dataloader)))"
        )
    if batch is not None and not is_measured:
        raise ValueError(f"the patch {str(config)!r} measures nothing, so it needs no batch")
    _judge(config, anatomy, is_pretrained=_is_pretrained(inner))
    original = _copy(inner) if keep_original or is_measured else None
    own_configs(inner)
    applied = build(inner, config)
    try:
        if initialisation is not None:
            initialisation.apply(anatomy, batch=batch, generator=generator)
        if config.embedding_patch is not None:
            embedding.hang(anatomy, config.embedding_patch)
    except BaseException:
        applied.original = original
        applied.take_away(inner)
        raise
    applied.original = original if keep_original else None
    return model


def unpatch_model(model: M) -> M:
    """Takes the patch out of a model, in place.

    The model's structure is then exactly what it was, and so are its outputs where it was patched with
    `keep_original=True`: every weight is then as it was before patching, whatever it has learned. Without it weights
    stay as they are: those that an initialisation has drawn, or training has changed.

    Returns:
        The same model.

    Raises:
        ValueError: it is not patched, or its weights are to be restored and are sharded.
    """
    found = applied_to(model)
    if found is None:
        raise ValueError(f"this {type(model).__name__} is not patched")
    inner, applied = found
    if applied.original is not None and any(map(is_sharded, inner.parameters())):
        raise ValueError(
            f"this {type(inner).__name__} is sharded, so that its old weights can't be written; save it, "
            "and load it in one process"
        )
    applied.take_away(inner)
    return model


def build(model: PreTrainedModel, config: PatchConfig) -> AppliedPatch:
    """Makes the structure of a patch, all but what it draws or measures: the embeddings' patch and the initialisation.

    Args:
        model: one that is not patched.
        config: the patch.

    Returns:
        What was done; it is the model's attribute `ATTRIBUTE`, too, and the model's config says so.

    Raises:
        ValueError: a part does not fit the model, which is unchanged then.
    """
    anatomy = read_architecture(model)
    applied = AppliedPatch(config)
    vars(model)[ATTRIBUTE] = applied
    try:
        if config.activation is not None:
            applied.activation = replace_activation(anatomy, config.activation)
            applied.settings = {key: value for _, key, value in reversed(applied.activation.old_settings)}
        placement = None if config.norm_patch is None else config.norm_patch.placement
        conversion = convert(anatomy, placement)
        rule = config.residual_patch
        make_rule: MakeRule = _no_rule if rule is None else rule.make(conversion.anatomy)
        attach_to(conversion.anatomy, make_rule, conversion.taps)
        conversion.hang()
        if rule is not None:
            rule.hang(conversion.anatomy)
            if rule.optimizer_scaling(conversion.anatomy) is not None:
                applied.check = OptimizerCheck(model, rules.text(rule))
        if config.attention_patch is not None:
            config.attention_patch.hang(anatomy)
    except BaseException:
        applied.take_away(model)
        raise
    for each in configs(model):
        setattr(each, FIELD, applied.describe())
    setattr(model.config, QUANTIZATION, {"quant_method": FIELD})
    return applied


def _patchable(model: nn.Module) -> PreTrainedModel:
    """The Transformers model in a module, if it can be patched; raises ValueError where not, with the reason."""
    inner = pretrained(model)
    refuse_patched(inner)
    what = f"this {type(inner).__name__}"
    if model is not inner:
        raise ValueError(f"{what} is inside another module ({type(model).__name__}); patch it before it is wrapped")
    if any(_is_compiled(module) for module in inner.modules()):
        raise ValueError(f"{what} is compiled, and would run on without the patch; patch it before it is compiled")
    if getattr(inner, "is_quantized", False) or getattr(inner, "hf_quantizer", None) is not None:
        raise ValueError(f"{what} is quantised, and its weights are not to be changed; patch it before it is quantised")
    for name, parameter in inner.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{what} has weights without values ({name} is on the meta device); load them, and patch it then"
            )
        if is_sharded(parameter) or hasattr(parameter, "ds_id"):  # the second by DeepSpeed's ZeRO-3
            raise ValueError(f"{what} is sharded ({name} lies on several processes); patch it before it is sharded")
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise ValueError(f"{what} is quantised ({name} is {parameter.dtype}); patch it before it is quantised")
    return inner


def _is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called, which only this attribute says."""
    return getattr(module, "_compiled_call_impl", None) is not None


def _is_pretrained(model: nn.Module) -> bool:
    """Whether weights come from a checkpoint; Transformers marks those, and there is no public way to ask. The name in
    the config does not tell, as a new model made of a checkpoint's config has it, too."""
    return any(getattr(parameter, "_is_hf_initialized", False) for parameter in model.parameters())


def _judge(config: PatchConfig, anatomy: Anatomy, *, is_pretrained: bool) -> None:
    """Refuses what can't be done and warns of what fights, before anything is changed."""
    for part in (config.norm_patch, config.attention_patch):
        if part is not None and (reason := part.refuse(anatomy)):
            raise ValueError(reason)
    placement = None if config.norm_patch is None else config.norm_patch.placement
    after = convert(anatomy, placement).anatomy
    if config.residual_patch is not None and (reason := config.residual_patch.refuse(after)):
        raise ValueError(reason)
    if config.embedding_patch is not None:
        for stack in anatomy.stacks:
            config.embedding_patch.make(stack)  # only to see whether it can be made
    for reason, is_refused in conflicts.found(conflicts.Setting(config, anatomy, after, is_pretrained)):
        if is_refused:
            raise ValueError(reason)
        _logger.warning("gradguard: %s", reason)
    if is_pretrained and (changed := not_preserving(config, anatomy)):
        _logger.warning(
            "gradguard: this model is pretrained, and %s another function of it: what it has learned is lost in part "
            "or in whole. What keeps it: %s",
            " and ".join(changed) + (" makes" if len(changed) == 1 else " make"),
            "residual=layerscale:init=1, rezero:init=1 or skipinit:init=1",
        )


def not_preserving(config: PatchConfig, anatomy: Anatomy) -> list[str]:
    """The parts of a patch that change the function that a model computes, each as `part=text`."""
    keeping = set()
    if config.residual_patch is not None and config.residual_patch.preserving:
        keeping.add("residual")
    if config.norm_patch is not None and not config.norm_patch.changes(anatomy):
        keeping.add("norm")
    if config.attention_patch is not None and config.attention_patch.preserving:
        keeping.add("attention")
    if all(stack.embedding_norm is not None for stack in anatomy.stacks):
        keeping.add("embedding")
    return [f"{part}={text}" for part, text in config.to_dict().items() if part not in keeping]


def _no_rule(branch: Branch) -> None:
    """Leaves a branch as it is."""


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
