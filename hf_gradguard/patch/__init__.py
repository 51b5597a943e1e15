"""Changing a model before training: residual rules, norms, initialisation, activation.

**An architecture** is one entry in the table of `architectures`: paths of modules and a few facts. A further one is
registered, or added to the table, and everything here works with it:

    register_architecture(Architecture(
        model_type="my_model",
        stacks=(StackEntry(name="decoder", layers="layers", norm="pre", branches=(…), embeddings=("embed_tokens",)),),
    ))

`read_architecture(model)` then says where the parts are, and raises an error that names entry and path where one does
not fit. An unknown model's error shows a whole entry to fill in.

**A residual rule** is an nn.Module that says what becomes of the residual x and a branch's output y:

    class Highway(nn.Module):                      # a gate: the stream goes on with forward(x, y) instead of x + y
        def __init__(self, width):
            super().__init__()
            self.carry = nn.Linear(width, width)
        def forward(self, x, y):
            c = torch.sigmoid(self.carry(x))
            return c * x + (1 - c) * y

    attach(model, lambda branch: Highway(branch.output.out_features))

or one with `scale(y)` instead: the stream goes on with x + scale(y). `attach` asks for a rule for each branch, and
`detach` leaves the model as it was; see `taps`.
"""

from hf_gradguard.patch.anatomy import Anatomy, Branch, Layer, Point, Stack, read_architecture
from hf_gradguard.patch.architectures import list_architectures, register_architecture
from hf_gradguard.patch.container import CONTAINER
from hf_gradguard.patch.entry import Architecture, At, AttentionEntry, MLPEntry, Rows, StackEntry
from hf_gradguard.patch.parts import Part, Slot
from hf_gradguard.patch.residual import Gate, Identity, Multiplier, Rule, Scaling
from hf_gradguard.patch.taps import attach, detach

__all__ = [
    "CONTAINER",
    "Anatomy",
    "Architecture",
    "At",
    "AttentionEntry",
    "Branch",
    "Gate",
    "Identity",
    "Layer",
    "MLPEntry",
    "Multiplier",
    "Part",
    "Point",
    "Rows",
    "Rule",
    "Scaling",
    "Slot",
    "Stack",
    "StackEntry",
    "attach",
    "detach",
    "list_architectures",
    "read_architecture",
    "register_architecture",
]
