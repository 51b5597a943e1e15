"""Initialisation of the residual branches, by name.

An initialisation is one small dataclass: its options, and the values of one linear map. Registered, it goes by its name
everywhere:

    >>> from dataclasses import dataclass
    >>> from torch import nn
    >>> from hf_gradguard.patch.init import Initialisation, draw_normal, inits
    >>> @inits.register("tenth")
    ... @dataclass
    ... class Tenth(Initialisation):
    ...     summary = "normal, outputs a tenth of the others"
    ...     citation = "nobody"
    ...     std: float = 0.02
    ...     def weight(self, site, generator):
    ...         return draw_normal(site.part.shape, generator, std=self.std / 10 if site.is_output else self.std)
    >>> inits.parse("tenth:std=0.1")
    Tenth(std=0.1)

    inits.parse("xavier:gain=0.5").apply(read_architecture(model), generator=torch.Generator().manual_seed(0))

Fans are those of the map alone: of the query, where one weight holds query, key and value, and of [out, in] also where
a weight is [in, out], as in GPT-2. What schemes say about attention assumes that its logits are divided by √(head
width). T5 does not divide; its own initialisation has that factor in the query weights, and none of these has.
"""

from hf_gradguard.patch.init.deepnorm import DeepNormInit, beta
from hf_gradguard.patch.init.ds_init import DSInit
from hf_gradguard.patch.init.fixup import Fixup
from hf_gradguard.patch.init.gpt2 import GPT2
from hf_gradguard.patch.init.initialisation import (
    Distribution,
    Initialisation,
    Role,
    Site,
    draw_normal,
    draw_orthogonal,
    draw_uniform,
    draw_xavier,
    inits,
    sites,
)
from hf_gradguard.patch.init.kaiming import Kaiming, gain_of
from hf_gradguard.patch.init.lsuv import LSUV
from hf_gradguard.patch.init.normal import Normal
from hf_gradguard.patch.init.orthogonal import Orthogonal
from hf_gradguard.patch.init.small import Small
from hf_gradguard.patch.init.t_fixup import TFixup
from hf_gradguard.patch.init.xavier import Xavier

__all__ = [
    "GPT2",
    "LSUV",
    "DSInit",
    "DeepNormInit",
    "Distribution",
    "Fixup",
    "Initialisation",
    "Kaiming",
    "Normal",
    "Orthogonal",
    "Role",
    "Site",
    "Small",
    "TFixup",
    "Xavier",
    "beta",
    "draw_normal",
    "draw_orthogonal",
    "draw_uniform",
    "draw_xavier",
    "gain_of",
    "inits",
    "sites",
]
