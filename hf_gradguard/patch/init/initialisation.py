"""What an initialisation is, and what all of them do alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor, nn

from hf_gradguard.backends.dtensor import is_sharded
from hf_gradguard.patch.anatomy import Anatomy, Branch
from hf_gradguard.patch.parts import Part
from hf_gradguard.registry import Registry, nearest

Role = Literal["query", "key", "value", "inner", "output"]
"""What a linear map does in its branch. `inner` is what widens in an MLP: fc1, or gate and up."""

Distribution = Literal["uniform", "normal"]


@dataclass(frozen=True, eq=False)
class Site:
    """One linear map that is initialised, and where it is."""

    anatomy: Anatomy
    branch: Branch
    role: Role
    part: Part

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.branch.output.out_features

    @property
    def is_output(self) -> bool:
        """It ends the branch."""
        return self.role == "output"


class Initialisation(ABC):
    """Gives new values to the linear maps of all residual branches: weights by a rule, biases zero.

    Everything else stays bit for bit, unless a rule says otherwise: norms, embeddings, heads, buffers. Values are drawn
    in float32 on the generator's device, on the CPU without one, and only then brought to the dtype and device of the
    model; so one seed gives the same weights on every device. Maps are drawn one after the other in depth order, within
    a branch query, key, value, inner, output, each on its own [out, in] even where several lie in one weight.
    """

    summary: ClassVar[str]
    """What it does, in one line."""
    citation: ClassVar[str]
    """Authors, year, arXiv number."""
    needs_batch: ClassVar[bool] = False
    """It measures the model on a batch."""

    def apply(
        self, anatomy: Anatomy, *, batch: Mapping[str, Any] | None = None, generator: Generator | None = None
    ) -> None:
        """Initialises a model in place.

        Args:
            anatomy: where its parts are.
            batch: what the model's forward takes, by name. Only for an initialisation with `needs_batch`.
            generator: what random numbers come from; torch's own of the CPU if None.

        Raises:
            ValueError: it needs a batch and got none, or a weight can't be written: it is quantised, sharded, or on the
                meta device. The model is unchanged then.
        """
        if self.needs_batch and batch is None:
            raise ValueError(
                f"the initialisation {type(self).__name__} measures the model on a batch and got none; give what the "
                "model's forward takes, by name: batch=next(iter(dataloader))"
            )
        for site in sites(anatomy):
            check_writable(site.part.weight, f"the {site.role} projection of {site.branch}")
        with torch.no_grad():
            self.fill(anatomy, batch, generator)

    def fill(self, anatomy: Anatomy, batch: Mapping[str, Any] | None, generator: Generator | None) -> None:
        """Writes everything; a rule that does more than weights of branches adds to this."""
        for site in sites(anatomy):
            site.part.write(self.weight(site, generator))
            site.part.write_bias(0.0)

    @abstractmethod
    def weight(self, site: Site, generator: Generator | None) -> Tensor:
        """New values of one map, float32 [out_features, in_features]."""


inits: Registry[Initialisation] = Registry("init", absent="none", noun="initialisation")


def sites(anatomy: Anatomy) -> Iterator[Site]:
    """All linear maps of all branches, in the order in which they are drawn."""
    for branch in anatomy.branches:
        attention: tuple[tuple[Role, Part | None], ...] = (
            ("query", branch.query),
            ("key", branch.key),
            ("value", branch.value),
        )
        for role, part in attention:
            if part is not None:
                yield Site(anatomy, branch, role, part)
        for part in branch.inner:
            yield Site(anatomy, branch, "inner", part)
        yield Site(anatomy, branch, "output", branch.output)


def draw_xavier(
    shape: tuple[int, int],
    generator: Generator | None,
    *,
    gain: float = 1.0,
    distribution: Distribution = "uniform",
) -> Tensor:
    """Variance gain² · 2 / (fan_in + fan_out), float32 of shape [out, in]."""
    draw = nn.init.xavier_uniform_ if distribution == "uniform" else nn.init.xavier_normal_
    return draw(_empty(shape, generator), gain=gain, generator=generator)


def draw_normal(shape: tuple[int, ...], generator: Generator | None, *, std: float) -> Tensor:
    """N(0, std²), float32."""
    return nn.init.normal_(_empty(shape, generator), std=std, generator=generator)


def draw_uniform(shape: tuple[int, ...], generator: Generator | None, *, bound: float) -> Tensor:
    """Uniform from -bound to bound, float32."""
    return nn.init.uniform_(_empty(shape, generator), -bound, bound, generator=generator)


def draw_orthogonal(shape: tuple[int, int], generator: Generator | None, *, gain: float = 1.0) -> Tensor:
    """A random matrix, float32 [out, in], whose rows are orthogonal and of length `gain`, or its columns: whichever are
    fewer."""
    return nn.init.orthogonal_(_empty(shape, generator), gain=gain, generator=generator)


def check_distribution(distribution: str) -> None:
    """Raises ValueError for anything but uniform and normal."""
    known = get_args(Distribution)
    if distribution not in known:
        raise ValueError(f"distribution={distribution!r}{nearest(distribution, known)} must be one of uniform, normal")


def check_writable(weight: Tensor, what: str) -> None:
    """Raises ValueError for a weight that can't be given values here; `what` it is stands in the message."""
    if weight.is_meta:
        reason, remedy = "is on the meta device and has no values", "load or materialise the model first"
    elif is_sharded(weight) or weight.dim() != 2:
        reason, remedy = "is sharded, so that no process has all of it", "initialise the model before it is sharded"
    elif weight.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        reason, remedy = f"is quantised ({weight.dtype})", "initialise a model that is not"
    else:
        return
    raise ValueError(f"the weight of {what} {reason}; {remedy}")


def _empty(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu" if generator is None else generator.device)
