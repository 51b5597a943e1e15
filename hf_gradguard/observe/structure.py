"""Which layer each parameter belongs to, in the order in which the forward pass runs through them.

A layout is read from what a model is, not from what it is called: lists of composite modules are the layers, the order
in which a `forward` uses its submodules is the order of everything around them, and a submodule that receives an
attention mask is attention.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from hf_gradguard.observe.forward_order import (
    TRANSPARENT,
    Member,
    class_of,
    ordered_children,
    ordered_members,
    source_tree,
    unwrapped,
)
from hf_gradguard.observe.layout import (
    ATTENTION,
    EMBEDDINGS,
    FINAL_NORM,
    HEAD,
    LAYER,
    MLP,
    Group,
    Layout,
    ParameterInfo,
)

Path = tuple[str, ...]


def read_layout(model: nn.Module) -> tuple[Layout, list[nn.Parameter]]:
    """Find the layer of every trainable parameter from the model's structure.

    - The layers are the elements of the outermost `ModuleList` or `Sequential` whose every element is composite. Where
      some of these lists mix tokens (attention) and others do not, only the former count. A list of stages gives way to
      the lists of whole layers inside it, and parallel lists (all attentions, all feed-forwards) form layers together.
    - What runs before the layers, and every `nn.Embedding`, is embeddings; vectors-only modules that follow the last
      layer are its final norm; what comes later is the head. Of several stacks, the nearest in the module tree counts.
    - Without such a list, every module that owns parameters is a layer, every level of a recurrent module is one, and
      the last `nn.Linear` is the head.

    Frozen parameters are left out; the depth of the layers above them stays what it is.

    Args:
        model: any module; may be wrapped by DDP, `torch.compile` or PEFT, and sharded by FSDP2.

    Returns:
        The layout, and its parameters' tensors in the order of `layout.parameters`. Both are empty of parameters where
        nothing is trainable.
    """
    root = unwrapped_root(model)
    names = _named_parameters(root)
    return _layout(names, _slots(root)), list(names)


def layer_modules(root: nn.Module) -> list[nn.Module | None]:
    """The modules that the layers of a model begin with, in the order of `Layout.layers`.

    Where there is no list of layers they are the recurrent modules, None for a level that is not entered from outside:
    all but the first in a module of several.

    Args:
        root: the model, unwrapped.
    """
    if stacks := _stacks(root):
        return [modules[0] for stack in stacks for modules in stack.layers]
    cores = [unit.core for unit in _walk(root, (), {}) if isinstance(unit, _Unit)]
    recurrent = [core for core in cores if isinstance(core, nn.RNNBase)]
    return [level for core in recurrent for level in (core, *[None] * (core.num_layers - 1))]


# Names and wrappers

_ADAPTED = ("base_layer", "original_module")  # where PEFT keeps the module that an adapter stands in for


def unwrapped_root(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, DeepSpeed's engine and `torch.compile`, in whatever order they came."""
    while True:
        inner = unwrapped(model)
        parallel = isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel)
        if parallel or any(cls.__name__ == "DeepSpeedEngine" for cls in type(inner).__mro__):
            inner = inner.get_submodule("module")
        if inner is model:
            return model
        model = inner


def _core(module: nn.Module) -> nn.Module:
    """The module that an adapter stands in for, or the module itself."""
    for name, child in module.named_children():
        if name in _ADAPTED:
            return _core(unwrapped(child))
    return module


def _named_parameters(root: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Each trainable parameter with all of its names, in the order of `named_parameters()`."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            clean = ".".join(part for part in name.split(".") if part not in TRANSPARENT)
            names.setdefault(parameter, []).append(clean)
    return names


# What a module is


def _is_leaf(module: nn.Module) -> bool:
    """Without children of its own: those that adapters and parametrizations add do not count."""
    return is_parametrized(module) or _core(module) is not module or next(module.children(), None) is None


def _owns_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_vector(member: nn.Module | nn.Parameter) -> bool:
    """A norm, a scale or a bias: it owns parameters, and none of more than one dimension."""
    if isinstance(member, nn.Parameter):
        return member.dim() <= 1
    dimensions = [parameter.dim() for parameter in _core(member).parameters()]
    return bool(dimensions) and max(dimensions) <= 1


Mixes = Callable[[nn.Module], bool]


def _is_told_of_tokens(module: nn.Module) -> bool:
    """Whether it is attention, or another mixer of tokens, by what it receives."""
    core = _core(module)
    return isinstance(core, nn.MultiheadAttention) or _receives_mask(class_of(core))


@lru_cache(maxsize=4096)
def _receives_mask(cls: type[Any]) -> bool:
    """Whether `forward` is told which tokens may see which: by a mask or by the ends of packed sequences.

    A mask of padding or of routes does not make attention: experts receive one.
    """
    try:
        names = inspect.signature(cls.forward).parameters
    except (TypeError, ValueError):
        return False
    return any(re.search("mask|cu_seqlens", name) and not re.match("padding|router|expert", name) for name in names)


def _computes_attention(module: nn.Module) -> bool:
    """Whether it is attention by what it computes: in vision models attention often needs no mask.

    A layer, too, has `attention` in its source.
    """
    return _names_attention(class_of(_core(module))) and not _is_whole_layer(module, _computes_attention)


@lru_cache(maxsize=4096)
def _names_attention(cls: type[Any]) -> bool:
    if issubclass(cls, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return False
    tree = source_tree(cls.forward)
    nodes = list(ast.walk(tree)) if tree is not None else []
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    names += [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    return any("softmax" in name or "attention" in name for name in names)


def _mixes_nothing(module: nn.Module) -> bool:
    return False


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    return (inner for inner in module.modules() if inner is not module)


# The branches of a layer

_NORM = "norm"
_IDENTITY = "identity"


def _layer_members(modules: Sequence[nn.Module], mixes: Mixes) -> list[Member]:
    """What a layer consists of, in execution order, however many wrappers are around it."""
    if len(modules) > 1:
        return [("", module) for module in modules]
    members = ordered_members(modules[0])
    owners = [member for _, member in members if isinstance(member, nn.Parameter) or _owns_parameters(member)]
    if len(owners) == 1 and isinstance(owners[0], nn.Module) and not _is_leaf(owners[0]):
        wrapped = owners[0]
        if not mixes(wrapped) or _is_whole_layer(wrapped, mixes):
            return _layer_members([wrapped], mixes)
    return members


def _branches(members: Iterable[Member], mixes: Mixes) -> Iterator[tuple[nn.Module | nn.Parameter, str]]:
    """Each member with what it is: attention, MLP, a norm (any vector), or an identity (in place of a norm)."""
    for _, member in members:
        if _is_vector(member):
            yield member, _NORM
        elif isinstance(member, nn.Parameter):
            yield member, MLP
        elif isinstance(member, nn.Identity):
            yield member, _IDENTITY
        elif not _owns_parameters(member):
            continue
        elif mixes(member):
            yield member, ATTENTION
        elif not _is_leaf(member) and any(map(mixes, _inside(member))):
            yield from _branches(ordered_members(member), mixes)
        else:
            yield member, MLP


def _parts(kinds: Sequence[str]) -> list[str]:
    """Attention or MLP for each member of a layer; a norm goes with the branch it serves.

    That is the branch after it in a layer that begins with a norm, else the branch before it. Of several norms in a
    row, the first serves the branch before and the others the branch after.
    """
    starts_with_norm = kinds[:1] in ([_NORM], [_IDENTITY])
    parts = []
    for index, kind in enumerate(kinds):
        if kind in (ATTENTION, MLP):
            parts.append(kind)
            continue
        before = [other for other in kinds[:index] if other in (ATTENTION, MLP)][-1:]
        after = [other for other in kinds[index:] if other in (ATTENTION, MLP)][:1]
        second_in_row = index > 0 and kinds[index - 1] == _NORM
        first_in_row = not second_in_row and kinds[index + 1 : index + 2] == [_NORM]
        serves_next = second_in_row or (starts_with_norm and not first_in_row)
        parts.append(([*after, *before] if serves_next else [*before, *after])[0] if before or after else MLP)
    return parts


def _is_whole_layer(module: nn.Module, mixes: Mixes) -> bool:
    """Whether it holds attention and, beside it, an MLP: two matrices, for one may be attention's own output."""
    if _is_leaf(module):
        return False
    branches = list(_branches(ordered_members(module), mixes))
    beside = [member for member, kind in branches if kind == MLP]
    matrices = sum(tensor.dim() > 1 for member in beside for tensor in _tensors(member))
    return matrices > 1 and any(kind == ATTENTION for _, kind in branches)


def _tensors(member: nn.Module | nn.Parameter) -> Iterator[nn.Parameter]:
    return iter([member]) if isinstance(member, nn.Parameter) else member.parameters()


# Stacks of layers


@dataclass(frozen=True)
class _Stack:
    path: Path
    layers: list[list[nn.Module]]
    """The modules of each layer: one, or one of each parallel list."""
    mixes: Mixes

    @property
    def has_attention(self) -> bool:
        return self.mixes is not _mixes_nothing


def _stacks(root: nn.Module) -> list[_Stack]:
    """In execution order; only those with attention where there are any."""
    found = list(_find_stacks([("", root)], (), set()))
    return [stack for stack in found if stack.has_attention] or found


def _find_stacks(members: Sequence[Member], parent: Path, seen: set[nn.Module]) -> Iterator[_Stack]:
    for name, member in members:
        if isinstance(member, nn.Parameter) or member in seen or _is_leaf(member):
            continue
        seen.add(member)
        path = (*parent, name) if name else parent
        if _is_list_of_composites(member):
            yield _read_stack(member, path, [sibling for _, sibling in members])
        else:
            yield from _find_stacks(ordered_members(member), path, seen)


def _is_list_of_composites(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 0
        and _owns_parameters(module)
        and not any(_is_leaf(element) for element in ordered_children(module))
    )


def _elements(modules: nn.Module) -> list[nn.Module]:
    """The elements of a list; one that stands in it twice comes twice, so that positions stay true."""
    assert isinstance(modules, nn.ModuleList | nn.Sequential)
    return [unwrapped(element) for element in modules]


def _read_stack(elements: nn.Module, path: Path, siblings: Sequence[nn.Module | nn.Parameter]) -> _Stack:
    mixes = _way_of_mixing(list(_inside(elements)))
    nested = [layer for element in ordered_children(elements) for layer in _nested_layers(element, mixes)]
    if nested:
        return _Stack(path, [[layer] for layer in nested], mixes)
    lists = _parallel_lists(elements, siblings, mixes)
    return _Stack(path, [list(layer) for layer in zip(*map(_elements, lists), strict=True)], mixes)


def _way_of_mixing(modules: Sequence[nn.Module]) -> Mixes:
    """How attention is told among the modules of a stack; what merely computes a softmax must stand in a layer."""
    if any(map(_is_told_of_tokens, modules)):
        return _is_told_of_tokens
    if any(_is_whole_layer(module, _computes_attention) for module in modules):
        return _computes_attention
    return _mixes_nothing


def _nested_layers(stage: nn.Module, mixes: Mixes) -> list[nn.Module]:
    """The whole layers in lists inside a stage; none where it is a layer itself."""
    if _is_leaf(stage):
        return []
    children = ordered_children(stage)
    if _is_list_of_composites(stage) and all(_is_whole_layer(child, mixes) for child in children):
        return children
    return [layer for child in children for layer in _nested_layers(child, mixes)]


def _parallel_lists(elements: nn.Module, siblings: Sequence[nn.Module | nn.Parameter], mixes: Mixes) -> list[nn.Module]:
    """The list itself and, where it holds nothing but attention, the lists beside it that complete its layers."""
    layers = _elements(elements)
    if not all(mixes(layer) and not _is_whole_layer(layer, mixes) for layer in layers):
        return [elements]
    return [
        sibling
        for sibling in siblings
        if sibling is elements
        or (
            isinstance(sibling, nn.ModuleList)
            and len(sibling) == len(layers)
            and not any(mixes(part) or isinstance(part, nn.Embedding) for part in _elements(sibling))
        )
    ]


def _stack_names(paths: Sequence[Path]) -> list[str]:
    """The shortest beginning of each path that tells it from the others, what they share left out."""
    if len(paths) < 2:
        return [""] * len(paths)
    shared = min(_shared_length(paths[0], path) for path in paths[1:])
    tails = [path[shared:] for path in paths]
    return [_shortest_unique(tail, tails) for tail in tails]


def _shortest_unique(path: Path, paths: Sequence[Path]) -> str:
    rivals = max(_shared_length(path, other) for other in paths if other is not path)
    return ".".join(path[: rivals + 1])


def _shared_length(first: Path, second: Path) -> int:
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


# From modules to groups

Slot = tuple[Group, str | None]
Placed = Iterator[tuple[nn.Module | nn.Parameter, Slot]]

_EMBEDDINGS = Group(EMBEDDINGS, EMBEDDINGS)
_HEAD = Group(HEAD, HEAD)


def _layer_group(stack: str, depth: int) -> Group:
    return Group(f"{stack} layer {depth}".strip(), LAYER, stack, depth)


def _final_norm_group(stack: str) -> Group:
    return Group(f"{stack} final norm".strip(), FINAL_NORM, stack)


def _slots(root: nn.Module) -> dict[nn.Parameter, Slot]:
    """Group and part of every parameter, frozen ones too."""
    stacks = _stacks(root)
    placed = _place_around(root, stacks) if stacks else _place_alone(root)
    slots: dict[nn.Parameter, Slot] = {}
    for member, slot in placed:
        for parameter in _tensors(member):
            slots.setdefault(parameter, slot)  # a shared one counts where it is used first
    return slots


@dataclass(frozen=True)
class _Unit:
    """Something outside the layers that owns parameters: a leaf module or a bare parameter."""

    path: Path
    member: nn.Module | nn.Parameter

    @property
    def core(self) -> nn.Module | nn.Parameter:
        return _core(self.member) if isinstance(self.member, nn.Module) else self.member

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.core, nn.Embedding | nn.EmbeddingBag)

    @property
    def is_norm(self) -> bool:
        return isinstance(self.core, nn.Module) and _is_vector(self.core)


@dataclass(frozen=True)
class _Layer:
    stack: int
    group: Group


def _walk(member: nn.Module | nn.Parameter, path: Path, layers: Mapping[nn.Module, _Layer]) -> Iterator[_Unit | _Layer]:
    """The whole model in execution order."""
    if isinstance(member, nn.Parameter):
        yield _Unit(path, member)
    elif member in layers:
        yield layers[member]
    elif not _is_leaf(member):
        for name, inner in ordered_members(member):
            yield from _walk(inner, (*path, name), layers)
    elif _owns_parameters(member):
        yield _Unit(path, member)


def _place_around(root: nn.Module, stacks: Sequence[_Stack]) -> Placed:
    """The layers of the stacks, and everything else by where it runs."""
    names = _stack_names([stack.path for stack in stacks])
    layers: dict[nn.Module, _Layer] = {}
    for index, (stack, name) in enumerate(zip(stacks, names, strict=True)):
        for depth, modules in enumerate(stack.layers):
            layer = _Layer(index, _layer_group(name, depth))
            layers |= {module: layer for module in modules if module not in layers}
            yield from ((member, (layer.group, part)) for member, part in _layer_parts(stack, modules))
    steps = list(_walk(root, (), layers))
    units = (step for step in steps if isinstance(step, _Unit))
    yield from ((unit.member, (_EMBEDDINGS, None)) for unit in units if unit.is_embedding)
    yield from _place_between(steps, stacks, names)


def _layer_parts(stack: _Stack, modules: Sequence[nn.Module]) -> Iterator[tuple[nn.Module | nn.Parameter, str | None]]:
    if not stack.has_attention:
        return iter([(module, None) for module in modules])
    branches = list(_branches(_layer_members(modules, stack.mixes), stack.mixes))
    return zip((member for member, _ in branches), _parts([kind for _, kind in branches]), strict=True)


def _place_between(steps: Sequence[_Unit | _Layer], stacks: Sequence[_Stack], names: Sequence[str]) -> Placed:
    """What runs outside the layers, held against the nearest stack, or several that are equally near."""
    runs: dict[int, list[int]] = {}
    for position, step in enumerate(steps):
        if isinstance(step, _Layer):
            runs.setdefault(step.stack, []).append(position)
    current: _Layer | None = None
    only_norms_since = False
    for position, step in enumerate(steps):
        if isinstance(step, _Layer):
            current, only_norms_since = step, True
            continue
        near = _nearest(step.path, {index: stacks[index].path for index in runs})
        only_norms_since &= step.is_norm
        if current and only_norms_since and current.stack in near and position > runs[current.stack][-1]:
            yield step.member, (_final_norm_group(names[current.stack]), None)
        elif position < max(runs[index][0] for index in near):
            yield step.member, (_EMBEDDINGS, None)
        elif current and position < max(runs[index][-1] for index in near):
            yield step.member, (current.group, MLP if stacks[current.stack].has_attention else None)
        else:
            yield step.member, (_HEAD, None)


def _nearest(path: Path, stacks: Mapping[int, Path]) -> set[int]:
    shared = {index: _shared_length(path, stack) for index, stack in stacks.items()}
    return {index for index, length in shared.items() if length == max(shared.values())}


def _place_alone(root: nn.Module) -> Placed:
    """A model without stacks: its modules are the layers."""
    units = [step for step in _walk(root, (), {}) if isinstance(step, _Unit)]
    yield from ((unit.member, (_EMBEDDINGS, None)) for unit in units if unit.is_embedding)
    others = [unit for unit in units if not unit.is_embedding]
    matrices = [unit for unit in others if not _is_vector(unit.core)]
    head = matrices[-1] if len(matrices) > 1 and isinstance(matrices[-1].core, nn.Linear) else None
    depth = -1
    group = _layer_group("", 0)
    for unit in others:
        if unit is head:
            group = _HEAD
        elif isinstance(unit.core, nn.RNNBase):
            yield from _recurrent_levels(unit.core, depth + 1)
            depth += unit.core.num_layers
            group = _layer_group("", depth)
        elif unit in matrices or depth < 0:
            depth += 1
            group = _layer_group("", depth)
        yield unit.member, (group, None)


def _recurrent_levels(module: nn.RNNBase, start: int) -> Placed:
    for name, parameter in module.named_parameters(recurse=False):
        level = re.search(r"_l(\d+)(_reverse)?$", name)
        if level is not None:
            yield parameter, (_layer_group("", start + int(level[1])), None)


def _layout(names: Mapping[nn.Parameter, Sequence[str]], slots: Mapping[nn.Parameter, Slot]) -> Layout:
    order = _depth_order({slots[parameter][0] for parameter in names}, [group for group, _ in slots.values()])
    index = {group: position for position, group in enumerate(order)}
    return Layout(
        groups=tuple(order),
        parameters=tuple(
            ParameterInfo(
                name=canonical,
                group=index[slots[parameter][0]],
                part=slots[parameter][1],
                shape=tuple(parameter.shape),
                dtype=str(parameter.dtype).removeprefix("torch."),
                aliases=tuple(aliases),
            )
            for parameter, (canonical, *aliases) in names.items()
        ),
    )


def _depth_order(used: Collection[Group], found: Iterable[Group]) -> list[Group]:
    """Embeddings, each stack's layers and final norm, head; stacks in the order in which they were found."""
    stacks = {stack: rank for rank, stack in enumerate(dict.fromkeys(group.stack for group in found if group.stack))}
    kinds = (EMBEDDINGS, LAYER, FINAL_NORM, HEAD)

    def key(group: Group) -> tuple[bool, bool, int, int, int]:
        rank = stacks.get(group.stack, 0)
        return group.kind != EMBEDDINGS, group.kind == HEAD, rank, kinds.index(group.kind), group.depth or 0

    return sorted(used, key=key)
