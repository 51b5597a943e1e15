"""A model's residual branches, found with the table of architectures."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_gradguard.patch.architectures import find_architecture
from hf_gradguard.patch.entry import (
    Architecture,
    AttentionEntry,
    BranchEntry,
    Kind,
    MLPEntry,
    NormPosition,
    Projection,
    Rows,
    StackEntry,
)
from hf_gradguard.patch.parts import Part, Slot, below_adapters


@dataclass(frozen=True, eq=False)
class Point:
    """An argument of a module's `forward`, in which a tensor can be seen or replaced."""

    module: nn.Module
    argument: int | str
    """Place among the positional arguments, or name."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Branch:
    """One residual branch of one layer."""

    entry: BranchEntry
    """What the table says, with all paths."""
    stack: str
    """`encoder` or `decoder`."""
    layer: int
    """Index of the layer in its stack, from 0 at the input."""
    depth: int
    """Number of layers in the stack."""
    index: int
    """Place among all branches of the stack, from 0 at the input."""
    count: int
    """Number of branches in the stack: twice `depth`, three times with cross-attention."""
    norm_position: NormPosition | Literal["none"]
    """Whether the norm is before the branch or after the addition; `none` where a patch has switched it off."""
    parallel: bool
    """The layer's branches start from the same x and are added together."""
    residual: Point
    """Where x can be seen."""
    input: Point
    """Where the branch's input can be seen."""
    end: nn.Module
    """The module whose output is added to x."""
    output: Part
    """The linear map at the end of the branch. Its `out_features` are the width of the residual stream."""
    norm: Slot
    """The norm. Its value is an nn.Identity where the layer has none, as in ModernBERT's layer 0."""
    query: Part | None = None
    """None in an MLP; so are key and value."""
    key: Part | None = None
    value: Part | None = None
    inner: tuple[Part, ...] = ()
    """The linear maps that widen: fc1, or gate and up. Empty in attention."""
    activation: Slot | None = None
    """None in attention."""

    @property
    def kind(self) -> Kind:
        """`attention`, `cross_attention` or `mlp`."""
        return self.entry.kind

    def __str__(self) -> str:
        return f"{self.kind} of {self.stack} layer {self.layer}"


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a stack."""

    module: nn.Module
    branches: tuple[Branch, ...]
    """In the order in which they run."""
    dropout: str | None
    """Attribute with the rate of functional dropout between the end of a branch and the addition, if there is one."""

    @property
    def junctions(self) -> tuple[tuple[Branch, ...], ...]:
        """The branches by the addition in which they meet x: each for itself, or all at once in a parallel layer."""
        if self.branches[0].parallel:
            return (self.branches,)
        return tuple((branch,) for branch in self.branches)


@dataclass(frozen=True, eq=False)
class Stack:
    """One stack of layers and what belongs to it."""

    entry: StackEntry
    layers: tuple[Layer, ...]
    embeddings: tuple[nn.Module, ...]
    """Token embeddings first."""
    embedding_norm: Slot | None
    embedding_projection: nn.Module | None
    """What brings embeddings to the width of the layers, where they are narrower."""
    final_norm: Slot | None

    @property
    def name(self) -> str:
        """`encoder` or `decoder`."""
        return self.entry.name

    @property
    def branches(self) -> tuple[Branch, ...]:
        """All branches, in depth order."""
        return tuple(branch for layer in self.layers for branch in layer.branches)


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Where the parts of a model are."""

    architecture: Architecture
    """The entry of the table."""
    model: PreTrainedModel
    """The model inside PEFT's, DDP's or torch.compile's wrapping."""
    stacks: tuple[Stack, ...]
    """An encoder's before its decoder's."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers, in depth order."""
        return tuple(layer for stack in self.stacks for layer in stack.layers)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """All branches, in depth order."""
        return tuple(branch for stack in self.stacks for branch in stack.branches)

    @property
    def output_embeddings(self) -> nn.Module | None:
        """What turns hidden states into logits over the vocabulary; None without a language-modelling head."""
        return self.model.get_output_embeddings()  # type: ignore[no-any-return, no-untyped-call]


def read_architecture(model: nn.Module) -> Anatomy:
    """Finds the residual branches of a model, whatever its head, also under PEFT.

    Args:
        model: a `PreTrainedModel`, or a module around one.

    Returns:
        Where everything is. It holds modules, so it is for use now: modules that are replaced later are not followed.

    Raises:
        TypeError: there is no `PreTrainedModel` in it.
        ValueError: its `model_type` is not in the table, or an entry's path does not exist in this model; the message
            names the entry, the path and what is there.
    """
    inner = pretrained(model)
    architecture = find_architecture(inner.config)
    reader = _Reader(architecture.model_type, inner.base_model, inner.config)
    present = [entry for entry in architecture.stacks if len(architecture.stacks) == 1 or reader.has(entry.layers)]
    if not present:
        wanted = ", ".join(repr(entry.layers) for entry in architecture.stacks)
        raise ValueError(
            f"the entry {architecture.model_type!r} looks for layers at {wanted}, but "
            f"{type(inner.base_model).__name__} has {_children(inner.base_model)}"
        )
    return Anatomy(architecture, inner, tuple(reader.stack(entry) for entry in present))


def pretrained(model: nn.Module) -> PreTrainedModel:
    """The outermost `PreTrainedModel` in a module; raises TypeError where there is none."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"{type(model).__name__} {model!r:.80}"
        raise TypeError(f"patches need a model, not {what}; make one first, by from_pretrained or from_config")
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"{type(model).__name__} holds no Transformers model (PreTrainedModel); patches need one")


def configs(model: PreTrainedModel) -> list[Any]:
    """The configs of a model and of the models in it, each once: T5's stacks have copies."""
    found = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    return list({id(config): config for config in found}.values())


def own_configs(model: PreTrainedModel) -> None:
    """Gives a model copies of its configs, the same to all of its modules: other models may have been made of them."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                setattr(module, name, copy.deepcopy(value, memo))


class _Reader:
    """Resolves the paths of one entry in one model."""

    def __init__(self, model_type: str, base: nn.Module, config: Any) -> None:
        self.model_type = model_type
        self.base = base
        self.config = config

    def has(self, path: str) -> bool:
        """Whether the base model has what a path begins with."""
        return hasattr(self.base, path.partition(".")[0])

    def stack(self, entry: StackEntry) -> Stack:
        modules = self._module(self.base, entry.layers, "layers")
        if not isinstance(modules, nn.ModuleList):
            raise ValueError(
                f"the entry {self.model_type!r} says that {entry.layers!r} is the nn.ModuleList of layers, "
                f"but that is a {type(modules).__name__}; give the path of the list"
            )
        present = [[branch for branch in entry.branches if _is_present(module, branch)] for module in modules]
        count, layers, index = sum(map(len, present)), [], 0
        for number, (module, branches) in enumerate(zip(modules, present, strict=True)):
            place = {"stack": entry.name, "layer": number, "depth": len(modules), "count": count}
            place |= {"norm_position": entry.norm, "parallel": entry.parallel}
            found = [
                self._branch(module, branch, {**place, "index": index + offset}, f"{entry.layers}.{number}")
                for offset, branch in enumerate(branches)
            ]
            index += len(found)
            if entry.dropout is not None:
                self._get(module, entry.dropout, "dropout", f"{entry.layers}.{number}")
            layers.append(Layer(module, tuple(found), entry.dropout))
        return Stack(
            entry,
            tuple(layers),
            tuple(self._module(self.base, path, "embeddings") for path in entry.embeddings),
            self._slot_or_none(entry.embedding_norm, "embedding_norm"),
            self._embedding_projection(entry),
            self._slot_or_none(entry.final_norm, "final_norm"),
        )

    def _branch(self, layer: nn.Module, entry: BranchEntry, place: dict[str, Any], name: str) -> Branch:
        def module(path: str, role: str) -> nn.Module:
            return self._module(layer, path, f"{role} of {entry.kind}", name)

        def slot(path: str, role: str) -> Slot:
            return self._slot(layer, path, f"{role} of {entry.kind}", name)

        def part(projection: Projection, role: str) -> Part:
            return self._part(layer, projection, f"{role} of {entry.kind}", name)

        special: dict[str, Any] = {}
        if isinstance(entry, AttentionEntry):
            special = {role: part(getattr(entry, role), role) for role in ("query", "key", "value")}
        elif isinstance(entry, MLPEntry):
            special["inner"] = tuple(part(projection, "inner") for projection in entry.inner)
            special["activation"] = slot(entry.activation, "activation")
        return Branch(
            entry=entry,
            residual=Point(module(entry.residual.module, "residual"), entry.residual.argument),
            input=Point(module(entry.input.module, "input"), entry.input.argument),
            end=module(entry.end, "end"),
            output=part(entry.output, "output"),
            norm=slot(entry.norm, "norm"),
            **special,
            **place,
        )

    def _part(self, layer: nn.Module, projection: Projection, role: str, name: str) -> Part:
        rows = projection if isinstance(projection, Rows) else Rows(projection, 0, of=1)
        module = below_adapters(self._module(layer, rows.module, role, name))
        if not hasattr(module, "weight"):
            raise ValueError(
                f"the entry {self.model_type!r} gives {rows.module!r} as {role}, but in {name} that is a "
                f"{type(module).__name__} and has no weight; name the nn.Linear or Conv1D itself"
            )
        groups = self.config.num_attention_heads if rows.per_head else 1
        features = cast(Tensor, module.weight).shape[1 if isinstance(module, Conv1D) else 0]
        if features % (groups * rows.of):
            raise ValueError(
                f"the entry {self.model_type!r} cuts {role} ({rows.module!r}) into {groups} × {rows.of} parts, but in "
                f"{name} it has {features} output features, which is no multiple of that"
            )
        length = features // groups // rows.of
        return Part(module, groups, rows.part * length, length)

    def _embedding_projection(self, entry: StackEntry) -> nn.Module | None:
        if entry.embedding_projection is None or not self.has(entry.embedding_projection):
            return None
        found = self._get(self.base, entry.embedding_projection, "embedding_projection")
        return found if isinstance(found, nn.Module) else None

    def _slot_or_none(self, path: str | None, role: str) -> Slot | None:
        if path is None:
            return None
        slot = self._slot(self.base, path, role)
        return None if slot.value is None else slot

    def _slot(self, root: nn.Module, path: str, role: str, name: str = "") -> Slot:
        self._get(root, path, role, name)
        owner, _, attribute = path.rpartition(".")
        return Slot(root.get_submodule(owner), attribute)

    def _module(self, root: nn.Module, path: str, role: str, name: str = "") -> nn.Module:
        found = self._get(root, path, role, name)
        if not isinstance(found, nn.Module):
            raise ValueError(
                f"the entry {self.model_type!r} gives {path!r} as {role}, but in {_called(root, name)} that is "
                f"{found!r} and no module"
            )
        return found

    def _get(self, root: nn.Module, path: str, role: str, name: str = "") -> Any:
        """What a path leads to; `role` and `name` are for the message."""
        found: Any = root
        steps = path.split(".")
        for number, step in enumerate(steps):
            if not hasattr(found, step):
                parent = ".".join(steps[:number])
                inside = f"{parent!r} there has" if parent else "it has"
                raise ValueError(
                    f"the entry {self.model_type!r} gives {path!r} as {role}, but {_called(root, name)} has no such "
                    f"module: {inside} {_children(found)}. The entry is wrong for this model or this version of "
                    "Transformers; register an entry with the right path"
                )
            found = getattr(found, step)
        return found


def _is_present(layer: nn.Module, branch: BranchEntry) -> bool:
    return not branch.optional or hasattr(layer, branch.end.partition(".")[0])


def _called(root: nn.Module, name: str) -> str:
    return f"{name} ({type(root).__name__})" if name else type(root).__name__


def _children(found: Any) -> str:
    names: Iterator[str] = (name for name, _ in found.named_children()) if isinstance(found, nn.Module) else iter(())
    return ", ".join(names) or "no modules"
