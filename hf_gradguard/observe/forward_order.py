"""In which order a module uses its parts, read from the source of its `forward`.

Definition order is wrong for BART (a norm before the layers is defined after them) and OPT (the final norm is defined
before them), and running the model would need inputs.
"""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import nn

TRANSPARENT = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Names under which wrappers keep what they wrap."""

Member = tuple[str, nn.Module | nn.Parameter]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the modules that only wrap it, whose place in a name says nothing."""
    for name, child in module.named_children():
        if name in TRANSPARENT:
            return unwrapped(child)
    return module


def ordered_members(module: nn.Module) -> list[Member]:
    """A module's own parameters and children, in the order in which its `forward` uses them.

    One that `forward` does not name takes the place of the one defined before it.
    """
    ranks = _uses(class_of(module))
    members: list[Member] = list(module.named_parameters(recurse=False))
    members += [(name, unwrapped(child)) for name, child in module.named_children()]
    places = itertools.accumulate(members, lambda place, member: ranks.get(member[0], place), initial=-1)
    order = sorted(zip(itertools.islice(places, 1, None), members, strict=True), key=lambda entry: entry[0])
    return [member for _, member in order]


def ordered_children(module: nn.Module) -> list[nn.Module]:
    """The modules among `ordered_members`."""
    return [member for _, member in ordered_members(module) if isinstance(member, nn.Module)]


def class_of(module: nn.Module) -> Any:
    """The class of a module, as a key of a cache."""
    # Any, because mypy holds a class's own __hash__ against lru_cache's Hashable
    return type(module)


@lru_cache(maxsize=4096)
def _uses(cls: type[Any]) -> dict[str, int]:
    """Rank of each attribute of `self` in the order of use by the class's `forward`; empty where there is no source."""
    if issubclass(cls, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return {}
    visitor = _ForwardVisitor(cls)
    visitor.follow("forward", cls.__mro__)
    return visitor.mentioned | visitor.used


class _ForwardVisitor(ast.NodeVisitor):
    """Notes where `self.<name>` is first used, following calls of the class's own methods.

    Looking at its length or an attribute (`self.norm.eps`) is a mention only: it counts where there is no use.
    """

    def __init__(self, cls: type[nn.Module]) -> None:
        self.used: dict[str, int] = {}
        self.mentioned: dict[str, int] = {}
        self._cls = cls
        self._after: Sequence[type] = cls.__mro__
        self._self = "self"
        self._followed: set[Any] = set()

    def follow(self, method: str, classes: Sequence[type]) -> None:
        """Visit the first definition of `method` among `classes`, once, unless it is one of `nn.Module`'s own."""
        for position, cls in enumerate(classes):
            if cls is nn.Module:
                return
            if method in vars(cls):
                self._visit_function(vars(cls)[method], classes[position + 1 :])
                return

    def _visit_function(self, function: Any, after: Sequence[type]) -> None:
        if not inspect.isfunction(function) or function in self._followed:
            return
        self._followed.add(function)
        tree = source_tree(function)
        if tree is None or not tree.args.args:
            return
        outer = self._after, self._self
        self._after, self._self = after, tree.args.args[0].arg
        for statement in tree.body:
            self.visit(statement)
        self._after, self._self = outer

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Name) and function.id == "len":
            self._mention(self._root_attribute(node.args[0]))
            return
        for argument in (*node.args, *node.keywords):
            self.visit(argument)
        if isinstance(function, ast.Attribute) and _is_super(function.value):
            self.follow(function.attr, self._after)
        elif (name := self._root_attribute(function)) is not None:
            self._use(name)
        else:
            self.visit(function)

    def visit_For(self, node: ast.For) -> None:
        # What a loop over the layers uses besides them goes into them, so it comes before.
        for statement in (*node.body, node.iter, *node.orelse):
            self.visit(statement)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self._is_self(node.value):
            self._use(node.attr)
        elif (name := self._root_attribute(node)) is not None:
            self._mention(name)
        else:
            self.generic_visit(node)

    def _mention(self, name: str | None) -> None:
        if name is not None:
            self.mentioned.setdefault(name, self._next())

    def _use(self, name: str) -> None:
        self.follow(name, self._cls.__mro__)
        self.used.setdefault(name, self._next())

    def _next(self) -> int:
        return len(self.used) + len(self.mentioned)

    def _is_self(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self._self

    def _root_attribute(self, node: ast.AST) -> str | None:
        """`x` of `self.x`, `self.x.y`, `self.x[i].y`."""
        while isinstance(node, ast.Attribute | ast.Subscript):
            if isinstance(node, ast.Attribute) and self._is_self(node.value):
                return node.attr
            node = node.value
        return None


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


@lru_cache(maxsize=8192)
def source_tree(function: Any) -> ast.FunctionDef | None:
    """The syntax tree of a function, undecorated; None where its source is not at hand."""
    try:
        source = inspect.getsource(inspect.unwrap(function))
        # A method's source is indented; dedenting it would break strings that span lines.
        tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    except (OSError, TypeError, SyntaxError):
        return None
    return next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), None)
