"""Merging a patch into the weights, which gives a stock model."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_gradguard.backends.dtensor import is_sharded
from hf_gradguard.patch.anatomy import Anatomy, Branch, Stack, read_architecture
from hf_gradguard.patch.applied import AppliedPatch, applied_to
from hf_gradguard.patch.attention import AttentionPatch
from hf_gradguard.patch.container import CONTAINER, Container
from hf_gradguard.patch.embedding import EmbeddingPatch, hung
from hf_gradguard.patch.parts import Part
from hf_gradguard.patch.rescale import (
    is_layer_norm,
    readers,
    refuse_entries,
    refuse_head,
    scale_entries,
    scale_head,
    scale_input,
    scale_norm,
    scale_output,
)
from hf_gradguard.patch.residual import ResidualPatch
from hf_gradguard.patch.residual.completep import CompleteP, OutputScale
from hf_gradguard.patch.residual.installed import installed

M = TypeVar("M", bound=nn.Module)

NEGLIGIBLE = 1e-10
"""A change of a norm's ε up to which folding does not correct for it. Relative to what the norm gives it is an error of
at most half the change ÷ the variance of what goes in: where that is above 1e-3, less than float32 rounds."""

UNFOLDABLE_NORM = "where norms act is said by a model's code, not by its weights"
"""Why a placement of norms does not fold, unless the model has its norms there anyway."""


def fold_patches(model: M) -> M:
    """Merges a patch into the weights, in place. What is left is a stock model with the same outputs.

    It has no trace of GradGuard any more: what `save_pretrained` writes loads with Transformers alone. This is done
    after training, before the model goes to another framework or to people who do not use GradGuard.

    - A multiplier of a branch goes into the weight and bias of the branch's output projection.
    - DeepNorm's norm(x + y ÷ α) has an ε ÷ α² that a stock model can't have: ε is a constant of its code, or a field of
      the config that decides about other norms, too. Where ε is so small that float32 does not see the difference
      (BERT's 1e-12), it stays as it was, and 1 ÷ α goes into the output projections. Else (BART's 1e-5) the model gets
      the paper's form, norm(α·x + y) with the old ε: α goes into the norm that x comes from, and 1 ÷ α into the
      branch's projections that read x. That too is exact, but hidden states between layers are then α times as large.
    - A multiplier of the embeddings goes into all embeddings, or into the projection behind them. Output embeddings
      that are tied to them are untied, so that logits stay: the model has one matrix more then, and
      `config.tie_word_embeddings` is False. Whoever passes `inputs_embeds` has to take them from the folded model.
    - A multiplier of what goes into the output embeddings goes into their weight; they are untied likewise.
    - Multipliers of attention logits go into the query projections.
    - An activation stays where the config says it. An initialisation has nothing left to fold.
    - Gates, norms that act elsewhere and other parts that are no constant factors can't be folded.

    Outputs stay up to rounding: about 1e-6 of their size in float32, about 1e-2 in bfloat16, whose weights are rounded
    once more. Weights that `keep_original` has kept are dropped. An optimizer that has seen the model does not fit it
    any longer.

    Args:
        model: a patched Transformers model, not wrapped.

    Returns:
        The same model.

    Raises:
        ValueError: it is not patched, or it is wrapped, sharded, quantised or has adapters, or some parts of the patch
            can't be folded; the message names all of them, with their reasons. The model is unchanged then.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_gradguard.patch.model import patch_model
        >>> model = patch_model(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=2)), "pre_ln_scaled")
        >>> fold_patches(model).config.tie_word_embeddings
        False
    """
    inner, applied = _foldable(model)
    anatomy, plan = read_architecture(inner), _Plan()
    refused = []
    for part, text in applied.config.to_dict().items():
        if reason := plan.add(part, anatomy, applied):
            refused.append(f"{part}={text!r}: {reason}")
    if refused:
        raise ValueError(
            f"this {type(inner).__name__} can't become a stock model with the same outputs, and stays as it is. "
            f"{'; '.join(refused)}"
        )
    with torch.no_grad():
        plan.carry_out(anatomy)
    applied.activation = applied.original = None  # what is there now is what is to stay
    applied.take_away(inner)
    return model


@dataclass(eq=False)
class _Plan:
    """What is multiplied with what."""

    outputs: list[tuple[Part, Tensor | float]] = field(default_factory=list)
    """What linear maps give."""
    inputs: list[tuple[Part, float]] = field(default_factory=list)
    """What linear maps get."""
    norms: list[tuple[nn.Module, float]] = field(default_factory=list)
    """What norms give."""
    entries: dict[Stack, float] = field(default_factory=dict)
    """The streams into the first layers."""
    head: float = 1.0
    """The hidden states that go into the output embeddings."""
    attention: AttentionPatch | None = None
    """What folds itself."""

    def add(self, part: str, anatomy: Anatomy, applied: AppliedPatch) -> str | None:
        """Plans for one part of a patch; returns the reason where it can't be folded."""
        config = applied.config
        if part == "residual" and config.residual_patch is not None:
            return config.residual_patch.unfoldable or self._add_residual(anatomy, config.residual_patch)
        if part == "embedding" and config.embedding_patch is not None:
            return self._add_embedding(anatomy, config.embedding_patch)
        if part == "norm" and config.norm_patch is not None and config.norm_patch.changes(anatomy):
            return UNFOLDABLE_NORM + _could_be(anatomy)
        if part == "activation" and applied.activation is not None and applied.activation.field is None:
            return f"no field of {type(anatomy.model.config).__name__} says which activation the model has"
        if part == "attention" and config.attention_patch is not None:
            return self._add_attention(config.attention_patch)
        return None

    def carry_out(self, anatomy: Anatomy) -> None:
        """Changes the weights."""
        for output, gain in self.outputs:
            scale_output(output, gain)
        for part, factor in self.inputs:
            scale_input(part, factor)
        for norm, factor in self.norms:
            scale_norm(norm, factor)
        scale_entries(anatomy, self.entries)
        if self.head != 1:
            scale_head(anatomy, self.head)
        if self.attention is not None:
            self.attention.fold(anatomy)

    def _add_attention(self, patch: AttentionPatch) -> str | None:
        self.attention = patch
        return patch.unfoldable or ("it does not say how" if type(patch).fold is AttentionPatch.fold else None)

    def _add_embedding(self, anatomy: Anatomy, patch: EmbeddingPatch) -> str | None:
        factors = {}
        for stack, module in hung(anatomy):
            factor = patch.fold(module)
            if factor is None:
                return patch.unfoldable or "it is no factor"
            factors[stack] = factor
        return self._add_entries(anatomy, factors)

    def _add_entries(self, anatomy: Anatomy, factors: dict[Stack, float]) -> str | None:
        for stack, factor in factors.items():
            self.entries[stack] = self.entries.get(stack, 1.0) * factor
        return refuse_entries(anatomy, factors)

    def _add_residual(self, anatomy: Anatomy, patch: ResidualPatch) -> str | None:
        epsilons, alphas = _epsilons(anatomy), {}
        for branch, rule in installed(anatomy):
            gain = patch.gain(rule)
            if gain is None:
                return f"what the rule does on the {branch} is no factor"
            if not _ends_in_output(branch):
                return (
                    f"between the output projection of the {branch} and the addition is a "
                    f"{type(branch.end).__name__}, through which no factor goes"
                )
            if branch in epsilons:
                old, new = epsilons[branch]
                if isinstance(gain, Tensor) or not math.isclose(old * gain**2, new, rel_tol=1e-6):
                    return f"it changes the norm of the {branch}, which no factor does"
                if abs(old - new) > NEGLIGIBLE:
                    alphas[branch] = 1 / gain
                    continue
            self.outputs.append((branch.output, gain))
        reason = self._add_streams(anatomy, alphas) if alphas else None
        return reason or self._add_head(anatomy, patch)

    def _add_head(self, anatomy: Anatomy, patch: ResidualPatch) -> str | None:
        """Plans for what a rule has put beside its modules on the branches."""
        if not isinstance(patch, CompleteP):
            return None if type(patch).hang is ResidualPatch.hang else "it changes more than the branches"
        for module in getattr(anatomy.model, CONTAINER, nn.Module()).children():
            assert isinstance(module, OutputScale), "CompleteP has put nothing else there"
            self.head = module.factor
        return refuse_head(anatomy) if self.head != 1 else None

    def _add_streams(self, anatomy: Anatomy, alphas: dict[Branch, float]) -> str | None:
        """Plans to make the stream α times as large where it goes into some branches of a post-norm model."""
        if reason := _refuse_streams(anatomy, alphas):
            return f"it changes the ε of norms, too much to leave it as it was, and {reason}"
        for stack in anatomy.stacks:
            for before, branch in itertools.pairwise(stack.branches):
                self.norms.append((before.norm.value, alphas.get(branch, 1.0)))
        for branch, alpha in alphas.items():
            self.inputs += [(part, 1 / alpha) for part in readers(branch)]
        return self._add_entries(anatomy, {stack: alphas.get(stack.branches[0], 1.0) for stack in anatomy.stacks})


def _foldable(model: nn.Module) -> tuple[PreTrainedModel, AppliedPatch]:
    """The patched model and its patch, if its weights can be changed; raises ValueError where not, with the reason."""
    found = applied_to(model)
    if found is None:
        raise ValueError(f"this {type(model).__name__} is not patched, so there is nothing to fold")
    inner, applied = found
    what = f"this {type(inner).__name__}"
    if any(hasattr(module, "get_base_layer") for module in model.modules()):
        raise ValueError(f"{what} has adapters; merge them into it first (merge_and_unload)")
    if model is not inner:
        raise ValueError(f"{what} is inside a {type(model).__name__}; fold the model itself")
    for name, parameter in inner.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{what} has no weights ({name} is on the meta device); load it first")
        if is_sharded(parameter):
            raise ValueError(f"{what} is sharded ({name} lies on several processes); save it, load it on one, fold it")
        if parameter.dtype not in _DTYPES:
            raise ValueError(f"{what} is quantised ({name} is {parameter.dtype}); fold it before it is quantised")
    return inner, applied


def _could_be(anatomy: Anatomy) -> str:
    if not hasattr(anatomy.model.config, "do_layer_norm_before"):
        return ""
    return "; the field do_layer_norm_before of this config could say it, but folding does not use that"


def _epsilons(anatomy: Anatomy) -> dict[Branch, tuple[float, float]]:
    """The ε of each norm that a rule has changed: in the unpatched model, and now."""
    found = {}
    for layer in anatomy.layers:
        container: Container | None = getattr(layer.module, CONTAINER, None)
        for branch in layer.branches:
            for name, old in ({} if container is None else container.old_settings(branch.norm.value)).items():
                found[branch] = (old, getattr(branch.norm.value, name))
    return found


def _ends_in_output(branch: Branch) -> bool:
    """Whether nothing but dropout is known to be between a branch's output projection and the addition."""
    return isinstance(branch.end, (nn.Dropout, nn.Identity)) or branch.output.module in set(branch.end.modules())


def _refuse_streams(anatomy: Anatomy, alphas: dict[Branch, float]) -> str | None:
    """Why the stream into some branches can't be made larger; None if it can."""
    for layer in anatomy.layers:
        for branch in layer.branches:
            if branch.norm_position != "post":
                return f"it is the patch alone that puts one behind the {branch}"
            if not is_layer_norm(branch.norm.value):
                return f"that of the {branch} is no LayerNorm with a weight, which could make up for that"
        known = {module for branch in layer.branches for module in _modules(branch)}
        for name, module in layer.module.named_modules():
            if (
                not name.startswith(CONTAINER)
                and module not in known
                and next(module.parameters(False), None) is not None
            ):
                return f"{name} in the layers of the {layer.branches[0].stack} may read the stream, too"
    return None


def _modules(branch: Branch) -> list[nn.Module]:
    """All that is known of a branch."""
    parts = (branch.query, branch.key, branch.value, *branch.inner, branch.output)
    activation = [] if branch.activation is None else [branch.activation.value]
    return [branch.norm.value, *activation, *(part.module for part in parts if part is not None)]


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
