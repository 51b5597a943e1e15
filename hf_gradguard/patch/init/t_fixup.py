"""T-Fixup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from hf_gradguard.patch.anatomy import Anatomy
from hf_gradguard.patch.init.initialisation import Initialisation, Site, check_writable, draw_normal, draw_xavier, inits


@inits.register("t_fixup")
@dataclass
class TFixup(Initialisation):
    """For models without LayerNorm: Xavier; values, outputs and the MLP × 0.67 N^-¼ in an encoder of N layers and
    × (9M)^-¼ in a decoder of M; token embeddings from N(0, 1/d), × (9M)^-¼, d being their width.

    Xiao Shi Huang, Felipe Pérez, Jimmy Ba, Maksims Volkovs 2020, "Improving Transformer optimization through better
    initialization", ICML, section 3.2. With LayerNorm the factors make little sense: a norm undoes any scale of what
    it gets.

    The paper has encoder and decoder, of equal depth. A model with one stack takes that stack's factor, and its depth
    for the embeddings. Embeddings that are tied to the output embeddings stay bit for bit, as the factor would scale
    the logits; so do embeddings of positions and token types, which the paper does not learn. The paper's model
    multiplies looked-up embeddings with √d; most of Transformers' do not (BART can), and then the stream begins smaller
    by that.
    """

    summary = "for models without LayerNorm: Xavier, scaled by 0.67 N^-¼ (encoder) and (9M)^-¼ (decoder, embeddings)"
    citation = "Huang et al. 2020, Improving Transformer optimization through better initialization, ICML"

    def fill(self, anatomy: Anatomy, batch: Mapping[str, Any] | None, generator: Generator | None) -> None:
        """See `Initialisation`; the embeddings are drawn last."""
        embeddings = list(_untied_embeddings(anatomy))
        for embedding in embeddings:
            check_writable(embedding.weight, "the token embeddings")
        super().fill(anatomy, batch, generator)
        depth = len(anatomy.stacks[-1].layers)  # the decoder's, where there is one
        for embedding in embeddings:
            std = embedding.embedding_dim**-0.5 * (9 * depth) ** -0.25
            embedding.weight.copy_(draw_normal(tuple(embedding.weight.shape), generator, std=std))
            if embedding.padding_idx is not None:
                embedding.weight[embedding.padding_idx] = 0.0

    def weight(self, site: Site, generator: Generator | None) -> Tensor:
        """See `Initialisation`."""
        depth = site.branch.depth
        scale = 0.67 * depth**-0.25 if site.branch.stack == "encoder" else (9 * depth) ** -0.25
        return draw_xavier(site.part.shape, generator, gain=1.0 if site.role in ("query", "key") else scale)


def _untied_embeddings(anatomy: Anatomy) -> Iterator[nn.Embedding]:
    """The token embeddings of each stack, each weight once, without those that the head uses."""
    head = anatomy.output_embeddings
    seen = {id(getattr(head, "weight", None))}
    for stack in anatomy.stacks:
        embedding = stack.embeddings[0]
        weight: torch.Tensor | None = getattr(embedding, "weight", None)
        if id(weight) not in seen and isinstance(embedding, nn.Embedding):
            seen.add(id(weight))
            yield embedding
