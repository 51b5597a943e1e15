"""Parameter groups for an optimizer: what is decayed, and what is scaled for a patched model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from transformers import Trainer

from hf_gradguard.integrations.optimizer_check import MARK
from hf_gradguard.patch.anatomy import Anatomy, Layer, Stack, read_architecture
from hf_gradguard.patch.applied import applied_to
from hf_gradguard.patch.container import CONTAINER
from hf_gradguard.patch.embedding import Entry
from hf_gradguard.patch.norm.conversion import FinalNorm
from hf_gradguard.patch.residual import rules
from hf_gradguard.patch.residual.factors import Factors, Place, ScaleOptimizer

_EPS = 1e-8
"""Adam's ε in torch and in Transformers, if they are not told otherwise."""


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float = 0.0,
    eps: float | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters of a model, patched or not, in groups for any of torch's optimizers.

    Decayed is what Trainer decays: no biases, no norms, and nothing that a patch has added. Where the patch scales the
    optimizer's options by depth or width (`completep`), they are scaled here; schedules, which multiply the rate of
    each group, keep the ratios.

    An optimizer of them goes to `Trainer(…, optimizers=(optimizer, None))`. With FSDP or `model_init`, where Trainer
    takes none, override its `create_optimizer(self, model=None)`: set `self.optimizer` to one made of them, for
    `self.model if model is None else model`, and return it.

    Args:
        model: the model, also within DDP's, PEFT's or torch.compile's wrapping.
        lr: the learning rate; where it is scaled, that of the small model for which it was tuned. None leaves it to the
            optimizer.
        weight_decay: of what is decayed.
        eps: Adam's ε; None leaves it to the optimizer, or is 1e-8 where it is scaled.

    Returns:
        Dictionaries with `params`, `weight_decay` and a `name` to read, and `lr` and `eps` where they are given or
        scaled. Every trainable parameter is in exactly one of them, also one that several modules share. Where rates
        differ, a group with the rate that was given is the first: it is the one whose rate Trainer logs.

    Raises:
        ValueError: the patch scales learning rates, and `lr` is None.

    Example:
        >>> from torch.optim import AdamW
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> optimizer = AdamW(param_groups(model, lr=1e-3, weight_decay=0.1))
        >>> [(group["name"], len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [('decayed', 1, 0.1), ('not decayed', 3, 0.0)]
        >>> trainer = Trainer(model, args, optimizers=(optimizer, None))  # doctest: +SKIP
    """
    scaled = _Scaled.of(model)
    if scaled is not None and lr is None:
        raise ValueError(
            f"residual={scaled.rule!r} scales the learning rate, so it has to be given here: "
            "AdamW(param_groups(model, lr=1e-3, weight_decay=0.1))"
        )
    groups: dict[str, dict[str, Any]] = {}
    decayed = decayed_names(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        options: dict[str, Any] = {"weight_decay": weight_decay if name in decayed else 0.0, "lr": lr, "eps": eps}
        label = "decayed" if name in decayed else "not decayed"
        if scaled is not None:
            where, factors = scaled.at(parameter)
            label = f"{where}, {label}"
            options = {
                "weight_decay": options["weight_decay"] * factors.weight_decay,
                "lr": cast(float, lr) * factors.lr,
                "eps": (_EPS if eps is None else eps) * factors.eps,
                MARK: scaled.rule,
            }
        given = {key: value for key, value in options.items() if value is not None}
        groups.setdefault(label, {"params": [], **given, "name": label})["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: (group.get("lr") != lr, group["name"]))


def decayed_names(model: nn.Module) -> set[str]:
    """The names of the parameters that Trainer would decay, without those that a patch has added."""
    # The method asks nothing of the Trainer that it belongs to; so it is the rule of the version that is installed.
    names: list[str] = Trainer.get_decay_parameter_names(cast(Trainer, None), model)
    return {name for name in names if CONTAINER not in name.split(".")}


class _Scaled:
    """How the patch of a model scales the optimizer's options.

    Args:
        rule: its residual rule as text.
        scaling: what that asks of the optimizer.
        anatomy: the model's.
    """

    def __init__(self, rule: str, scaling: ScaleOptimizer, anatomy: Anatomy) -> None:
        self.rule = rule
        self._scaling = scaling
        self._found = {id(parameter): spot for parameter, spot in _spots(anatomy)}

    @classmethod
    def of(cls, model: nn.Module) -> _Scaled | None:
        """Of a model; None where nothing is scaled."""
        found = applied_to(model)
        if found is None:
            return None
        inner, applied = found
        rule, anatomy = applied.config.residual_patch, read_architecture(inner)
        scaling = None if rule is None else rule.optimizer_scaling(anatomy)
        return None if rule is None or scaling is None else cls(rules.text(rule), scaling, anatomy)

    def at(self, parameter: nn.Parameter) -> tuple[str, Factors]:
        """Where a parameter is, to read, and its factors."""
        where, place = self._found.get(id(parameter), _outside(parameter.ndim > 1))
        return where, self._scaling(place)


_Spot = tuple[str, Place]


def _outside(is_matrix: bool) -> _Spot:
    return ("other matrices" if is_matrix else "embeddings and output"), Place(None, is_matrix)


def _spots(anatomy: Anatomy) -> Iterator[tuple[nn.Parameter, _Spot]]:
    """Where parameters are; of several answers for one the last holds. Those without are outside of the layers."""
    for stack in anatomy.stacks:
        for layer in stack.layers:
            yield from _in_layer(stack, layer)
        ends = [*stack.embeddings, stack.embedding_projection]
        yield from ((p, _outside(False)) for module in ends if module is not None for p in module.parameters())
    if anatomy.output_embeddings is not None:
        yield from ((p, _outside(False)) for p in anatomy.output_embeddings.parameters())


def _in_layer(stack: Stack, layer: Layer) -> Iterator[tuple[nn.Parameter, _Spot]]:
    for module in layer.module.modules():
        for parameter in module.parameters(recurse=False):
            is_matrix = parameter.ndim > 1 and not isinstance(module, nn.Embedding)  # T5's relative positions
            where = f"{stack.name} layers, {'matrices' if is_matrix else 'biases and norms'}"
            yield parameter, (where, Place(len(stack.layers), is_matrix))
    for module in layer.module.modules():
        if isinstance(module, (Entry, FinalNorm)):  # kept in a layer, but before the first or after the last
            yield from ((parameter, _outside(False)) for parameter in module.parameters())
