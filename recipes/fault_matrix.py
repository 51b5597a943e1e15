"""What one NaN or infinity costs a training, with the guard and without.

In each case a small BERT is trained on real text and one fault is put in its way, in one micro-batch of one window:

- `edited`: one element of one parameter's gradient is overwritten after its backward pass (a fault that does not come
  again: hardware, a race).
- `forward`, `backward`: one module gives NaN or infinity for one marked row of the data, in its output or in the
  gradient of its input (a fault that comes with the data).

For the guard a case is passed only if all weights end finite, the bad window touches no weight and every other window
does, and the event names window, micro-batch and parameter (`edited`) or module (the others).

    python recipes/fault_matrix.py            # all cases, with the guard and without: 30 minutes on 2 cores
    python recipes/fault_matrix.py --every 40 # each 40th
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import BertConfig, BertForMaskedLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_gradguard import GradGuardCallback

WINDOWS = 3
BATCH = 2
LENGTH = 12
MARK = 255
"""A byte that does not occur in the text."""


@dataclass(frozen=True)
class Case:
    """One fault in one training."""

    fault: str
    """`edited`, `forward` or `backward`."""
    place: str
    """Name of the parameter (`edited`) or of the module."""
    value: float
    window: int
    """From 1."""
    micro_batch: int
    """From 0."""
    accumulation: int
    """Micro-batches in a window."""
    bf16: bool


@dataclass(frozen=True)
class Outcome:
    """What became of a training."""

    finite: bool
    """Whether every weight is finite at the end."""
    contained: bool
    """Whether the bad window touched no weight, and every other window did."""
    named: bool
    """Whether the event names what it should; False where nobody watched."""


def make_model() -> BertForMaskedLM:
    """A BERT of two layers with every kind of parameter that one of any depth has."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0.1,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    return model


def places(fault: str) -> list[str]:
    """Every kind of parameter; every module that is called; of these, for `backward`, all that have a gradient to give
    back to what came before them."""
    model = make_model()
    if fault == "edited":
        return [name for name, _ in model.named_parameters() if ".layer.1." not in name]
    called: list[str] = []
    for name, module in model.named_modules():
        if name and ".layer.0" not in name:
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    model(input_ids=ids)
    if fault == "backward":  # what is only given numbers of tokens has no gradient to give back
        return [name for name in called if "_embeddings" not in name and not name.endswith(("bert", "embeddings"))]
    return called


def all_cases() -> Iterator[Case]:
    """The whole matrix."""
    for fault in ("edited", "forward", "backward"):
        for accumulation in (1, 4):
            for place, value, window, micro_batch, bf16 in itertools.product(
                places(fault), (math.nan, math.inf), range(1, WINDOWS + 1), range(accumulation), (False, True)
            ):
                yield Case(fault, place, value, window, micro_batch, accumulation, bf16)


def text(case: Case) -> list[dict[str, Tensor]]:
    """Blocks of English text; the first row of the case's micro-batch carries the mark."""
    size = WINDOWS * case.accumulation * BATCH
    data = "\n".join(topics.values()).encode()
    rows = [torch.tensor(list(data[start * LENGTH : (start + 1) * LENGTH])) for start in range(size)]
    rows[((case.window - 1) * case.accumulation + case.micro_batch) * BATCH][0] = MARK
    return [{"input_ids": row, "labels": row} for row in rows]


class EditsGradient:
    """Overwrites one element of a parameter's gradient after one backward pass."""

    def __init__(self, parameter: nn.Parameter, case: Case) -> None:
        self._value = case.value
        self._countdown = (case.window - 1) * case.accumulation + case.micro_batch + 1
        parameter.register_post_accumulate_grad_hook(self._edit)

    def _edit(self, parameter: Tensor) -> None:
        self._countdown -= 1
        if self._countdown == 0 and parameter.grad is not None:
            parameter.grad.view(-1)[parameter.numel() // 2] = self._value


class FailsAtMark:
    """Makes a module fail for rows that carry the mark."""

    def __init__(self, model: nn.Module, module: nn.Module, case: Case) -> None:
        self._case = case
        self._marked: Tensor | None = None
        model.register_forward_pre_hook(self._look, with_kwargs=True)
        module.register_forward_hook(self._fail)

    def _look(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._marked = (kwargs["input_ids"] == MARK).any(dim=1)

    def _fail(self, module: nn.Module, args: Any, output: Any) -> Any:
        assert self._marked is not None
        first = next(value for value in _values(output) if isinstance(value, Tensor) and value.is_floating_point())
        # What has no row for each example, as the embedding of positions, fails as a whole.
        rows = self._marked if len(first) == len(self._marked) else self._marked.any()[None]
        if self._case.fault == "forward":
            bad = first * torch.where(rows.view(-1, *[1] * (first.ndim - 1)), self._case.value, 1.0)
        else:
            bad = _FailsBackward.apply(first, rows, self._case.value)
        return _replaced(output, first, bad)


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor, rows: Tensor, bad: float) -> Tensor:
        context.rows, context.bad = rows, bad
        return values.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows = context.rows.view(-1, *[1] * (gradient.ndim - 1))
        return torch.where(rows, context.bad, gradient), None, None


def _values(output: Any) -> Iterable[Any]:
    if isinstance(output, Tensor):
        return [output]
    return list(output.values()) if isinstance(output, dict) else list(output)


def _replaced(output: Any, old: Tensor, new: Tensor) -> Any:
    if output is old:
        return new
    if isinstance(output, dict):
        key = next(key for key, value in output.items() if value is old)
        output[key] = new
        return output
    return type(output)(new if value is old else value for value in output)


class _Weights(TrainerCallback):
    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.seen = [self._copy()]

    def _copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._model.parameters()]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(self._copy())


class _Quiet(GradGuardCallback):
    """The callback as it is, but for the summary that it prints at the end."""

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.end("finished")


def run(case: Case, guarded: bool) -> Outcome:
    """Trains with the fault in its way."""
    model = make_model()
    if case.fault == "edited":
        EditsGradient(model.get_parameter(case.place), case)
    else:
        FailsAtMark(model, model.get_submodule(case.place), case)
    weights, guard = _Weights(model), _Quiet(record=False, check_loss_scaling=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=WINDOWS, per_device_train_batch_size=BATCH, report_to="none",
            gradient_accumulation_steps=case.accumulation, train_sampling_strategy="sequential", bf16=case.bf16,
            learning_rate=1e-2, lr_scheduler_type="constant", logging_strategy="no", save_strategy="no",
            disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        callbacks = [weights, *([guard] if guarded else [])]
        trainer = Trainer(model, arguments, train_dataset=text(case), callbacks=callbacks)
        trainer.pop_callback(PrinterCallback)
        trainer.train()
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in weights.seen[-1])
    touched = [
        any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
        for before, after in itertools.pairwise(weights.seen)
    ]
    contained = touched == [window != case.window for window in range(1, WINDOWS + 1)]
    return Outcome(finite, contained, guarded and _is_named(case, guard))


def _is_named(case: Case, callback: GradGuardCallback) -> bool:
    assert callback.guard is not None
    events = [event for event in callback.guard.events if event.kind == "nonfinite"]
    if [(event.step, event.micro_batch, event.action) for event in events] != [(case.window, case.micro_batch, "skip")]:
        return False
    if case.fault == "edited":
        return events[0].parameter == case.place and "transient" in events[0].message
    return f" {case.place} " in events[0].message and f"in the {case.fault} pass" in events[0].message


def prepare() -> None:
    """Makes a process ready for many short trainings."""
    logging.getLogger("hf_gradguard").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    # Each Trainer collects garbage when it starts; without this it walks through all that the libraries ever imported.
    gc.collect()
    gc.freeze()


def run_both(case: Case) -> tuple[Outcome, Outcome]:
    """With the guard and without."""
    return run(case, guarded=True), run(case, guarded=False)


def table(cases: Sequence[Case], jobs: int) -> str:
    """Runs the cases, with the guard and without, and counts."""
    counts: Counter[tuple[Any, ...]] = Counter()
    with ProcessPoolExecutor(jobs, initializer=prepare) as pool:
        found = list(tqdm(pool.map(run_both, cases, chunksize=4), total=len(cases)))
    for case, outcomes in zip(cases, found, strict=True):
        row = (case.fault, "bf16" if case.bf16 else "fp32", case.accumulation)
        counts.update([(*row, "cases")])
        for who, outcome in zip(("guarded", "alone"), outcomes, strict=True):
            counts.update([(*row, who, what) for what, holds in vars(outcome).items() if holds])
    lines = ["fault     precision  micro-batches  cases   guarded: finite  contained  named    Trainer alone: finite"]
    for row in sorted({key[:3] for key in counts}):
        guarded = [counts[*row, "guarded", what] for what in ("finite", "contained", "named")]
        lines.append(
            f"{row[0]:8}  {row[1]:9}  {row[2]:13}  {counts[*row, 'cases']:5}  {guarded[0]:16}  {guarded[1]:9}  "
            f"{guarded[2]:5}    {counts[*row, 'alone', 'finite']:21}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="run each so many-th case")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    args = parser.parse_args()
    print(table(list(all_cases())[:: args.every], args.jobs))


if __name__ == "__main__":
    main()
