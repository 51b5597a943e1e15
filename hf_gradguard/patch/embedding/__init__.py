"""What happens between the embeddings and the first layer, by name.

One small dataclass each, that makes a module for the stream as it enters a stack; see `patch`:

    >>> from dataclasses import dataclass
    >>> from torch import nn
    >>> from hf_gradguard.patch.embedding import EmbeddingPatch, embeddings
    >>> @embeddings.register("shut")
    ... @dataclass(frozen=True)
    ... class Shut(EmbeddingPatch):
    ...     '''Dropout of everything, as an example.'''
    ...     summary, citation = "nothing", "nobody"
    ...     def make(self, stack):
    ...         return nn.Dropout(1.0)
    >>> embeddings.parse("shut")
    Shut()
"""

from hf_gradguard.patch.embedding.norm import NormedEmbedding
from hf_gradguard.patch.embedding.patch import EmbeddingPatch, Entry, embeddings, hang, hung
from hf_gradguard.patch.embedding.unit_rms import Gain, UnitRMS

__all__ = ["EmbeddingPatch", "Entry", "Gain", "NormedEmbedding", "UnitRMS", "embeddings", "hang", "hung"]
