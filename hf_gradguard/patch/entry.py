"""What an entry in the table of architectures says: paths of modules and a few facts, no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["attention", "cross_attention", "mlp"]
NormPosition = Literal["pre", "post"]


@dataclass(frozen=True)
class At:
    """Where a tensor can be seen: an argument of a module's `forward`."""

    module: str
    """Path of the module within the layer."""
    argument: int | str = 0
    """Its place among the positional arguments, or its name where the model passes it by name."""


@dataclass(frozen=True)
class Rows:
    """Some of the output features of a linear module, where one weight holds several projections.

    The weight's output features are cut into `of` parts of equal size, and this is number `part`. With `per_head` each
    head's features are cut so, and heads lie one after the other, as in GPT-NeoX: head 0's query, key and value, then
    head 1's. The same for nn.Linear, whose weight is [out, in], and for Transformers' Conv1D, whose is [in, out].
    """

    module: str
    """Path of the module within the layer."""
    part: int
    """Which part, from 0."""
    of: int
    """How many parts."""
    per_head: bool = False
    """Cut each head's features, not all of them at once."""


Projection = str | Rows
"""A whole linear module by its path, or `Rows` of one."""


@dataclass(frozen=True, kw_only=True)
class BranchEntry:
    """A residual branch: what lies between the residual x and the addition x + y. Paths start at the layer."""

    kind: Kind
    """What the branch is."""
    residual: At
    """Where x, to which the branch's output will be added, can be seen before the branch ends."""
    norm: str
    """The norm before the branch, or after the addition; a model may put nn.Identity there."""
    input: At
    """Where the branch's input can be seen: behind the norm in pre-norm models, x itself in post-norm models."""
    output: str
    """The linear module at the end of the branch."""
    end: str
    """The module whose output y is added to x (the first of its outputs, if it returns several). Between it and the
    addition there may be nothing but functional dropout, see `StackEntry.dropout`."""
    optional: bool = False
    """Some models of this kind have no such branch: it counts as absent where `end` begins with a name that the layer
    does not have."""


@dataclass(frozen=True, kw_only=True)
class AttentionEntry(BranchEntry):
    """Self-attention or cross-attention."""

    query: Projection
    """What makes queries of the branch's input."""
    key: Projection
    """What makes keys of the branch's input, or of the encoder's output."""
    value: Projection
    """What makes values of the branch's input, or of the encoder's output."""


@dataclass(frozen=True, kw_only=True)
class MLPEntry(BranchEntry):
    """Feed-forward network."""

    kind: Kind = "mlp"
    inner: tuple[Projection, ...]
    """What widens the branch's input: one, or the activated one (gate) and the one it is multiplied with (up)."""
    activation: str
    """Attribute that holds the activation."""


@dataclass(frozen=True, kw_only=True)
class StackEntry:
    """One stack of layers. Paths start at the base model, the one without a head."""

    name: str
    """`encoder` or `decoder`; what `observe.layout` calls a stack need not be the same."""
    layers: str
    """The nn.ModuleList of layers."""
    norm: NormPosition
    """`pre`: x + f(norm(x)). `post`: norm(x + f(x))."""
    branches: tuple[BranchEntry, ...]
    """The branches of each layer, in the order in which they run."""
    parallel: bool = False
    """All branches of a layer start from the same x, and the layer returns x plus all their outputs."""
    dropout: str | None = None
    """Attribute of the layer with the rate of a dropout that is no module of its own and stands between the end of each
    branch and the addition."""
    embeddings: tuple[str, ...]
    """The modules that look up tokens, positions, token types; the token embeddings come first."""
    embedding_norm: str | None = None
    """The norm of the sum of the embeddings."""
    embedding_projection: str | None = None
    """What brings embeddings to the width of the layers; where the two are equal, models have None or nothing there."""
    final_norm: str | None = None
    """The norm after the last layer; a model may have None there."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where the residual branches are in the models of one `model_type`."""

    model_type: str
    """`config.model_type` of the models."""
    stacks: tuple[StackEntry, ...]
    """An encoder's before its decoder's. A model may lack one, as T5EncoderModel lacks the decoder."""
    when: Mapping[str, Any] = field(default_factory=dict)
    """Values that the config must have for this entry to hold, where a `model_type` has several entries."""

    def fits(self, config: Any) -> bool:
        """Whether the entry holds for a model with this config."""
        return config.model_type == self.model_type and all(
            getattr(config, name, None) == value for name, value in self.when.items()
        )
