"""How the gradient of a loss at time t falls with the lag to the tokens before it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hf_gradguard.observe.eager import uncompiled
from hf_gradguard.observe.reach import Floats, Integers, TimeProfile
from hf_gradguard.observe.structure import layer_modules, unwrapped_root
from hf_gradguard.observe.unchanged import unchanged

__all__ = ["TimeProfile", "time_profile"]

POSITIONS = 8
"""How many losses of each row are looked at, where nothing else is asked for."""
_LABELS = ("labels", "shift_labels")
_IGNORED = -100
_UNSHIFTED = ("ForMaskedLM", "ForTokenClassification")
"""Kinds of model, as Transformers calls their losses, whose labels stand under their own token."""
_SCALES = (2.0**64, 2.0**16, 1.0)
"""What a loss is multiplied with before its backward pass, and its gradient divided by in float64 after it: exact, as
these are powers of two, and what would become zero on its way through float32 or float16 is kept. The next one is
taken where something overflows."""

Wrt = Literal["embedding"] | int


def time_profile(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    positions: int | Sequence[int] = POSITIONS,
    max_lag: int | None = None,
    wrt: Wrt = "embedding",
) -> TimeProfile:
    """Measures ‖∂ loss_t / ∂ x_{t−k}‖₂ for the lags k = 0, 1, 2 …: how far back in time a gradient reaches.

    - Of a causal language model, loss_t = −log p(token t+1 | tokens ≤ t), and x_t what the input embedding gives for
      token t: lag 0 is the token whose successor is predicted. `labels` stand under the tokens, as Transformers has
      them, and are shifted here; `shift_labels` are not. Where one is −100 there is no loss. (Nor are the labels of a
      causal model of `ForTokenClassification` shifted.)
    - Of a sequence classifier there is one loss a row, at its end: lag 0 is the last token that is not padding.
    - Lags count tokens that are not padding, whichever side that is on: where `attention_mask` is not zero; for a
      classifier without a mask, where `input_ids` are not `config.pad_token_id`, as Transformers pools; else all.
    - A model that reads in both directions is refused: a token that comes later is at no lag. (Of a classifier this can
      be told where there is a list of layers in it, or a recurrent module of torch.)

    The loss is the bare one, without label smoothing, auxiliary losses or division by a number of tokens. Dropout is
    off. Gradients, weights, buffers, random state, training flags, hooks and `requires_grad` are afterwards as they
    were, also after an exception; weights may be frozen, the embedding too. Where several processes share the weights
    of the model (FSDP, tensor parallelism), all of them have to call it alike.

    Cost: one forward pass of the batch and one backward pass for each position (not for each row: rows do not interact,
    so that the gradient of the sum of their losses holds the gradient of each); for a classifier, two backward passes.
    None of them goes to the weights. Memory: the activations of that one forward pass, as in training.

    Args:
        model: wrapped or not, compiled or not; in whatever precision: what is made of its gradient is float64.
        batch: what the model is called with, labels among it, on any device. Rows `[rows, tokens]` of `input_ids`, or
            `inputs_embeds` `[rows, tokens, features]`. A cache in it is left as it is; lags do not reach into it.
        positions: how many t in each row, at most: they lie at even distances between `max_lag` and the end of the row,
            so that all lags come from the same losses (a shorter row gives its last one only). Or which ones, counted
            from 0 at the row's first token. A classifier has but one.
        max_lag: the largest lag; by default three quarters of the longest way back from any loss.
        wrt: `embedding`, or the number of a layer, from 0, for the hidden state that enters it: of a Transformer the
            residual stream before that layer, of a recurrent model the output of the layer below.

    Returns:
        The profile, up to the largest lag for which there is a sample, and the norms that it was made of.

    Raises:
        ValueError: labels or inputs are missing, no row has two tokens or a loss, the model reads in both directions or
            has two inputs (encoder and decoder), or has no input embedding, or no such layer; the message says which,
            and what to do.

    Example:
        >>> profile = time_profile(model, {"input_ids": ids, "labels": ids}, max_lag=100)  # doctest: +SKIP
        >>> profile.relative[100], profile.half_life, print(profile.describe())  # doctest: +SKIP
    """
    _refuse_arguments(positions, max_lag, wrt)
    root = unwrapped_root(model)
    if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(root).__name__} is an encoder with a decoder: a loss has two sequences before it, and no lag tells "
            "tokens of both apart; a time profile needs a model that reads one sequence from left to right"
        )
    inputs, labels = _split(root, batch)
    is_shifted = batch.get("shift_labels") is None and getattr(root, "loss_type", None) not in _UNSHIFTED
    # Every exception leaves through these: what they changed is put back.
    with unchanged(root), uncompiled(), _without_dropout(root), torch.enable_grad():
        run = _forward(root, inputs, wrt)
        if run.logits.ndim == 2:
            losses = _row_losses(root, run, labels)
        else:
            losses = _token_losses(run, labels, is_shifted=is_shifted)
        if run.logits.ndim == 2 or not is_shifted:
            _refuse_both_directions(root, run)
        columns, longest = losses.choose(positions, max_lag)
        return TimeProfile.of(_norms(root, run, losses, columns, longest))


# What is asked for


def _refuse_arguments(positions: int | Sequence[int], max_lag: int | None, wrt: Wrt) -> None:
    if isinstance(positions, int) and positions < 1:
        raise ValueError(f"positions={positions!r} must be at least 1, or the positions themselves")
    if not isinstance(positions, int) and (not len(positions) or min(positions) < 0):
        raise ValueError(f"positions={positions!r} must be places in the row, from 0, or how many are wanted")
    if max_lag is not None and max_lag < 1:
        raise ValueError(f"max_lag={max_lag!r} must be at least 1, or None")
    if wrt != "embedding" and not (isinstance(wrt, int) and wrt >= 0):
        raise ValueError(f"wrt={wrt!r} must be 'embedding' or the number of a layer, from 0")


def _split(root: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Inputs and labels, on the model's device."""
    labels = batch.get("labels") if batch.get("shift_labels") is None else batch["shift_labels"]
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"the batch has no labels (it has {', '.join(map(str, batch)) or 'nothing'}), so there is no loss; for a "
            "language model give it labels=input_ids, with -100 where nothing is to be predicted"
        )
    device = next((parameter.device for parameter in root.parameters()), labels.device)
    given = {name: value for name, value in batch.items() if name not in _LABELS and value is not None}
    inputs = {name: _own(value, device) for name, value in given.items()}
    tokens = inputs.get("inputs_embeds", inputs.get("input_ids"))
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        raise ValueError(f"the batch holds neither input_ids [rows, tokens] nor inputs_embeds; it has {list(batch)}")
    if tokens.shape[1] < 2:
        raise ValueError(f"the rows of the batch have {tokens.shape[1]} token: a lag needs two")
    return inputs, labels.to(device)


def _own(value: Any, device: torch.device) -> Any:
    """A tensor where it is needed; a copy of what a forward pass may write to, such as a cache."""
    return value.detach().to(device) if isinstance(value, Tensor) else copy.deepcopy(value)


# The forward pass


@dataclass(frozen=True)
class _Pass:
    """One forward pass whose graph begins at the input embedding."""

    logits: Tensor
    """`[rows, tokens, classes]`, or `[rows, classes]`."""
    embedded: Tensor
    """`[rows, tokens, features]`, a leaf."""
    source: Tensor
    """`[rows, tokens, features]`, what gradients are taken with respect to."""
    last_hidden: Tensor | None
    """`[rows, tokens, features]`, what the last layer gives; None where no layers are known."""
    real: NDArray[np.bool_]
    """`[rows, tokens]`, False where there is padding."""


@contextmanager
def _without_dropout(root: nn.Module) -> Iterator[None]:
    root.eval()
    # cuDNN goes backward through a recurrent network in training mode only; torch's own kernels do in any.
    is_recurrent = any(isinstance(module, nn.RNNBase) for module in root.modules())
    own: AbstractContextManager[Any] = torch.backends.cudnn.flags(enabled=False) if is_recurrent else nullcontext()
    with own:
        yield


def _forward(root: nn.Module, inputs: dict[str, Any], wrt: Wrt) -> _Pass:
    given: Tensor = inputs["inputs_embeds"] if "inputs_embeds" in inputs else inputs["input_ids"]
    shape = tuple(given.shape[:2])
    options = {"use_cache": False} if "use_cache" in inspect.signature(type(root).forward).parameters else {}
    layers = layer_modules(root)
    entered = None if wrt == "embedding" else _layer(root, layers, wrt)
    with _leaf(root, inputs) as leaf, _seen(entered, layers[-1] if layers else None, shape) as hidden:
        output = root(**inputs, **options)
    if leaf.tensor is None or tuple(leaf.tensor.shape[:2]) != shape or leaf.tensor.ndim != 3:
        found = "nothing" if leaf.tensor is None else list(leaf.tensor.shape)
        raise ValueError(
            f"the input embedding of {type(root).__name__} gave {found} for tokens {list(shape)}, where one vector for "
            "each token is needed; give the batch inputs_embeds in place of input_ids"
        )
    logits = _output(output, "logits")
    if (
        not isinstance(logits, Tensor)
        or logits.ndim not in (2, 3)
        or tuple(logits.shape[: logits.ndim - 1]) != shape[: logits.ndim - 1]
    ):
        found = list(logits.shape) if isinstance(logits, Tensor) else "none"
        raise ValueError(
            f"{type(root).__name__} gives no logits [rows, tokens, classes] or [rows, classes] for tokens "
            f"{list(shape)} ({found}): only of language models and classifiers can the loss at each time be told"
        )
    source = leaf.tensor if wrt == "embedding" else hidden.entering
    if source is None or not source.requires_grad:
        raise ValueError(
            f"what enters layer {wrt} of {type(root).__name__} is no hidden state [rows, tokens, features] that comes "
            "of the input embedding; use wrt='embedding'"
        )
    real = _real_tokens(root, inputs, shape, is_classifier=logits.ndim == 2)
    return _Pass(logits, leaf.tensor, source, hidden.leaving, real)


@dataclass
class _Hidden:
    """What enters one layer and leaves another, each `[rows, tokens, features]`; None until it is seen."""

    entering: Tensor | None = None
    leaving: Tensor | None = None


@contextmanager
def _seen(entered: nn.Module | None, last: nn.Module | None, shape: tuple[int, ...]) -> Iterator[_Hidden]:
    # Not by `output_hidden_states`: to give them, Transformers puts hooks on the model and leaves them there.
    found, handles = _Hidden(), []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.entering = _first_hidden([*args, *kwargs.values()], shape)

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        found.leaving = _first_hidden(output if isinstance(output, tuple) else [output], shape)

    if entered is not None:
        handles.append(entered.register_forward_pre_hook(enter, with_kwargs=True))
    if last is not None:
        handles.append(last.register_forward_hook(leave))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _first_hidden(values: Sequence[Any], shape: tuple[int, ...]) -> Tensor | None:
    hidden = (value for value in values if isinstance(value, Tensor) and value.ndim == 3)
    return next((value for value in hidden if tuple(value.shape[:2]) == shape), None)


class _Leaf:
    """A forward hook that lets the graph begin at a module's output."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor:
        if self.tensor is not None:
            raise ValueError(
                f"the input embedding ({type(module).__name__}) is called more than once in a forward pass: which of "
                "the inputs a lag counts is not defined"
            )
        self.tensor = output.detach().requires_grad_()
        return self.tensor.clone()  # as some models write to what they embedded


@contextmanager
def _leaf(root: nn.Module, inputs: dict[str, Any]) -> Iterator[_Leaf]:
    leaf = _Leaf()
    if "inputs_embeds" in inputs:
        inputs["inputs_embeds"] = leaf(root, (), inputs["inputs_embeds"])
        yield leaf
        return
    handle = _input_embedding(root).register_forward_hook(leaf)
    try:
        yield leaf
    finally:
        handle.remove()


def _input_embedding(root: nn.Module) -> nn.Module:
    find: Any = getattr(root, "get_input_embeddings", None)
    try:
        found = None if find is None else find()
    except NotImplementedError:
        found = None
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"{type(root).__name__} has no input embedding that get_input_embeddings() gives; add that method, or give "
            "the batch inputs_embeds in place of input_ids"
        )
    return found


def _output(output: Any, name: str) -> Any:
    """One thing that a model returned; of a bare tensor or a tuple, the logits come first."""
    if isinstance(output, Mapping):
        return output.get(name)
    if name == "logits" and isinstance(output, Tensor | tuple):
        return output if isinstance(output, Tensor) else output[0]
    return getattr(output, name, None)


def _layer(root: nn.Module, layers: Sequence[nn.Module | None], number: int) -> nn.Module:
    found = layers[number] if number < len(layers) else None
    if found is None:
        known = f"it has {len(layers)}" if number >= len(layers) else "its recurrent module has it inside"
        raise ValueError(f"layer {number} of {type(root).__name__} can't be entered: {known}; use wrt='embedding'")
    return found


def _real_tokens(
    root: nn.Module, inputs: Mapping[str, Any], shape: tuple[int, ...], *, is_classifier: bool
) -> NDArray[np.bool_]:
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    padding = getattr(getattr(root, "config", None), "pad_token_id", None)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        real = mask[:, -shape[1] :] != 0  # what is before it belongs to a cache
    elif is_classifier and padding is not None and isinstance(ids, Tensor):
        real = ids != padding
    else:
        return np.ones(shape, np.bool_)
    found: NDArray[np.bool_] = real.cpu().numpy()
    return found


# The losses


@dataclass(frozen=True)
class _Losses:
    """The losses of a batch, one a token or one a row."""

    usable: NDArray[np.bool_]
    """`[rows, tokens]`: where there is one."""
    rank: Integers
    """`[rows, tokens]`: place of each token in its row, padding not counted."""
    logits: Tensor
    """`[rows, tokens, classes]`, or `[rows, classes]`."""
    targets: Tensor
    """`[rows, tokens]`, the label of each token's loss; or the labels of the rows."""
    kind: str
    """`tokens`, or what a classifier's `problem_type` is."""

    def choose(self, positions: int | Sequence[int], max_lag: int | None) -> tuple[Integers, int]:
        """The column of each loss to look at, `[passes, rows]` with −1 where a row has fewer, and the largest lag."""
        if not self.usable.any():
            raise ValueError(
                "no row of the batch has a loss with a token before it: all labels are -100, or all rows are shorter "
                "than two tokens without padding"
            )
        furthest = int(self.rank[self.usable].max())
        longest = min(furthest, max_lag or max(1, 3 * furthest // 4))
        chosen = [self._of_row(row, positions, longest) for row in range(len(self.usable))]
        columns = np.full((max(map(len, chosen)), len(chosen)), -1)
        for row, places in enumerate(chosen):
            columns[: len(places), row] = places
        if not len(columns):
            raise ValueError(f"no row of the batch has a loss at positions={positions!r}; the last is at {furthest}")
        return columns, longest

    def _of_row(self, row: int, positions: int | Sequence[int], longest: int) -> Integers:
        places = np.flatnonzero(self.usable[row])
        ranks = self.rank[row, places]
        if self.kind != "tokens" or not len(places):
            return places
        if not isinstance(positions, int):
            return places[np.isin(ranks, positions)]
        late = places[ranks >= min(longest, ranks[-1])]
        even = np.linspace(len(late) - 1, 0, min(positions, len(late))).round().astype(np.int64)
        chosen: Integers = late[even[::-1]]
        return chosen

    def total(self, columns: Integers) -> Tensor:
        """The sum of the losses of those rows that have one at `columns` `[rows]`."""
        rows = torch.as_tensor(np.flatnonzero(columns >= 0), device=self.logits.device)
        places = torch.as_tensor(columns[columns >= 0], device=self.logits.device)
        chosen = self.logits[rows, places] if self.kind == "tokens" else self.logits[rows]
        targets = self.targets[rows, places] if self.kind == "tokens" else self.targets[rows]
        chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        if self.kind == "regression":
            return (chosen - targets.view_as(chosen)).square().mean(dim=1).sum()
        if self.kind == "multi_label_classification":
            every = F.binary_cross_entropy_with_logits(chosen, targets.to(chosen.dtype), reduction="none")
            return every.mean(dim=1).sum()
        return F.cross_entropy(chosen, targets, reduction="sum")


def _token_losses(run: _Pass, labels: Tensor, *, is_shifted: bool) -> _Losses:
    if labels.shape != run.logits.shape[:2]:
        raise ValueError(
            f"labels {list(labels.shape)} do not fit logits {list(run.logits.shape)}: one a token is needed"
        )
    targets = F.pad(labels[:, 1:], (0, 1), value=_IGNORED) if is_shifted else labels
    usable = run.real & (targets != _IGNORED).cpu().numpy()
    if is_shifted:
        usable[:, :-1] &= run.real[:, 1:]
    rank = np.cumsum(run.real, axis=1) - 1
    # A loss at the first token has nothing before it.
    return _Losses(usable & (rank > 0), rank, run.logits, targets, "tokens")


def _row_losses(root: nn.Module, run: _Pass, labels: Tensor) -> _Losses:
    rows, classes = run.logits.shape
    kind = getattr(getattr(root, "config", None), "problem_type", None)
    if kind is None:  # as Transformers tells them apart
        single = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        kind = "regression" if classes == 1 else single
    if len(labels) != rows:
        raise ValueError(f"labels {list(labels.shape)} do not fit logits {[rows, classes]}: one a row is needed")
    rank = np.cumsum(run.real, axis=1) - 1
    usable = run.real & (rank == rank[:, -1:]) & (rank > 0)
    if kind == "single_label_classification":
        usable &= (labels != _IGNORED).cpu().numpy()[:, None]
    return _Losses(usable, rank, run.logits, labels, kind)


# The backward passes


class _Backward:
    """Backward passes through one graph, one after the other."""

    def __init__(self) -> None:
        self._scales = list(_SCALES)

    def norms(self, loss: Tensor, source: Tensor) -> Floats:
        """L2 norm of the gradient of a scalar `[rows, tokens]`; infinity where it overflows or is not a number."""
        while True:
            seed = torch.full_like(loss, self._scales[0])
            (gradient,) = torch.autograd.grad(loss, source, seed, retain_graph=True)
            norms = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float64) / self._scales[0]
            if len(self._scales) == 1 or bool(norms.isfinite().all()):
                found: Floats = norms.nan_to_num(nan=torch.inf, posinf=torch.inf).cpu().numpy()
                return found
            del self._scales[0]


def _norms(root: nn.Module, run: _Pass, losses: _Losses, columns: Integers, longest: int) -> Floats:
    """The norms of all losses `[losses, lags]`, NaN before the first token."""
    backward, samples = _Backward(), []
    for places in columns:
        norms = backward.norms(losses.total(places), run.source)
        if run.source is not run.embedded and np.any(norms[~run.real]):
            raise ValueError(
                f"a layer of {type(root).__name__} does not have its hidden states under their tokens where rows are "
                "padded, or reads padding as text; give rows without padding, or use wrt='embedding'"
            )
        for row in np.flatnonzero(places >= 0):
            order = np.flatnonzero(run.real[row])
            here = int(losses.rank[row, places[row]])
            if (later := _later(norms[row, order], here)) is not None:
                raise _both_directions(root, here, later)
            sample = np.full(longest + 1, np.nan)
            reached = norms[row, order[max(0, here - longest) : here + 1]][::-1]
            sample[: len(reached)] = reached
            samples.append(sample)
    found = np.stack(samples)
    return found[:, ~np.isnan(found).all(axis=0)]


def _refuse_both_directions(root: nn.Module, run: _Pass) -> None:
    """Raises where what a token has become depends on tokens after it; told where layers are known."""
    if run.last_hidden is None:
        return
    row = int(run.real.sum(axis=1).argmax())
    order = np.flatnonzero(run.real[row])
    middle = (len(order) - 1) // 2
    # Different factors: after a normalisation, a plain sum of features or of their squares is constant.
    factors = torch.cos(torch.arange(run.last_hidden.shape[-1], device=run.last_hidden.device))
    later = []
    for column in {int(order[middle]), middle}:  # some layers are given padded rows with the padding at their end
        loss = (run.last_hidden[row, column].float() * factors).sum()
        later.append(_later(_Backward().norms(loss, run.embedded)[row, order], middle))
    if None not in later:
        raise _both_directions(root, middle, later[0])


def _later(norms: Floats, here: int) -> int | None:
    """The first place after this one that has a gradient; one that overflowed tells nothing."""
    later = here + 1 + np.flatnonzero(norms[here + 1 :])
    return int(later[0]) if len(later) and np.isfinite(norms[later[0]]) else None


def _both_directions(root: nn.Module, here: int, later: int | None) -> ValueError:
    return ValueError(
        f"{type(root).__name__} reads in both directions: what it makes of token {here} depends on token {later}, so "
        "that no lag tells how long ago a token was; a time profile needs a model that reads from left to right"
    )
