"""Truncated backpropagation through time: rows that go on where those of the batch before ended, and a recurrent model
that carries its state over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_gradguard.models.modeling import RecurrentForCausalLM
from hf_gradguard.models.state import RecurrentState
from hf_gradguard.training.arguments import DataArguments, RecipeArguments
from hf_gradguard.training.blocks import IGNORED, Blocks, StreamedBlocks
from hf_gradguard.training.trainer import RecipeTrainer

TRAIN, EVALUATE = "train", "evaluate"


class CarriedBlocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A text as parallel streams: row b of each batch goes on where row b of the batch before ended.

    To be read in order. Of several processes the k-th reads every k-th batch, as Accelerate deals them out, and its
    rows are streams of their own.

    Args:
        blocks: whose tokens are read; how they are cut is of no account.
        steps: tokens that a row has in one batch.
        rows: rows of a batch, in one process.
        processes: that read at the same time.
        keep_rest: whether all tokens are read, the last batch being filled up with what is no target. Else what does
            not fill a batch of whole rows is left out.

        limit: rows to leave at most; all for None.

    Raises:
        ValueError: the text is too short for one batch.
    """

    def __init__(
        self,
        blocks: Blocks,
        steps: int,
        rows: int,
        processes: int = 1,
        *,
        keep_rest: bool = False,
        limit: int | None = None,
    ) -> None:
        targets, streams = blocks.tokens - 1, rows * processes
        self._blocks = blocks
        self._steps = steps
        self._rows = rows
        self._streams = streams
        self._batches = -(-targets // (streams * steps)) if keep_rest else targets // (streams * steps)
        if self._batches < 1:
            raise ValueError(
                f"{blocks.tokens:,} tokens are too few for one batch of {streams} rows × {steps} tokens: "
                "give a smaller --block_size or batch"
            )
        self._length = -(-targets // streams) if keep_rest else self._batches * steps
        self.words = blocks.words
        """Words of the text, and ends; None where only some of the rows are left."""
        if limit is not None and limit < self._batches * streams:
            self._batches, self.words = max(1, limit // streams), None

    def __len__(self) -> int:
        return self._batches * self._streams

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        batch, row = divmod(index, self._rows)
        step, process = divmod(batch, self._streams // self._rows)
        stream = process * self._rows + row
        start = stream * self._length + step * self._steps
        end = min(start + self._steps, (stream + 1) * self._length, self._blocks.tokens - 1)
        count = max(0, end - start)
        ids, targets = torch.zeros(self._steps, dtype=torch.int64), torch.full((self._steps,), IGNORED)
        if count:
            text = torch.from_numpy(self._blocks.slice(start, count + 1).astype("int64"))
            ids[:count], targets[:count] = text[:-1], text[1:]
        return {"input_ids": ids, "labels": targets, "shift_labels": targets}


def carried(
    data: Mapping[str, Blocks | StreamedBlocks], steps: int, args: RecipeArguments, options: DataArguments
) -> dict[str, CarriedBlocks]:
    """The splits as parallel streams, which are read in order.

    Args:
        data: with the tokens of each split.
        steps: tokens that a row has in one batch.
        args: rows of a batch and processes; has the training rows read in order, with all their columns (Trainer would
            leave out `shift_labels`, which is no argument of a model's by name).
        options: how many rows are left at most.

    Raises:
        ValueError: a split is too short for one batch, or read as it is needed.
    """
    args.train_sampling_strategy = "sequential"
    args.remove_unused_columns = False
    found = {}
    for split, blocks in data.items():
        if not isinstance(blocks, Blocks):
            raise ValueError("--carry_state reads several places of the text at a time: leave out --streaming")
        is_train = split == "train"
        found[split] = CarriedBlocks(
            blocks,
            steps,
            args.per_device_train_batch_size if is_train else args.per_device_eval_batch_size,
            args.world_size,
            keep_rest=not is_train,
            limit=options.max_train_samples if is_train else options.max_eval_samples,
        )
    return found


class Carrier:
    """Holds the state between the batches of a training, and of an evaluation in its midst.

    Args:
        rank: of this process, whose rows are its own.
    """

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._states: dict[str, RecurrentState] = {}

    def of(self, phase: str) -> RecurrentState | None:
        """The state to go on from; None at the beginning of a text."""
        return self._states.get(phase)

    def keep(self, phase: str, state: RecurrentState) -> None:
        """Keeps the state after a batch, cut off from its graph. What is not finite in it begins again at zero: one bad
        batch must not spoil all that come after."""
        states = [[torch.nan_to_num(tensor.detach(), 0.0, 0.0, 0.0) for tensor in layer] for layer in state.states]
        self._states[phase] = RecurrentState(states, state.length)

    def begin(self, phase: str) -> None:
        """Begins a text: its first batch is given no state."""
        self._states.pop(phase, None)

    def save(self, folder: Path) -> None:
        """Writes the state of the training into a checkpoint, if there is one."""
        state = self._states.get(TRAIN)
        if state is not None:
            tensors = {f"{i}.{j}": tensor for i, layer in enumerate(state.states) for j, tensor in enumerate(layer)}
            save_file(tensors, self._path(folder), metadata={"length": str(state.length)})

    def load(self, folder: Path, device: torch.device) -> None:
        """Goes on from the state of a checkpoint, if it holds one and is from within an epoch."""
        epoch = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8")).get("epoch") or 0
        self.begin(TRAIN)
        if not self._path(folder).is_file() or abs(epoch - round(epoch)) < 1e-9:
            return
        tensors = load_file(self._path(folder), device=str(device))
        layers = 1 + max(int(name.split(".")[0]) for name in tensors)
        states = [[tensors[name] for name in sorted(tensors) if name.startswith(f"{i}.")] for i in range(layers)]
        self._states[TRAIN] = RecurrentState(states, 0)

    def _path(self, folder: Path) -> Path:
        return folder / f"carried-{self._rank}.safetensors"


class CarryingTrainer(RecipeTrainer):
    """A RecipeTrainer whose model goes on from the state after the batch before. Each epoch and each evaluation begins
    without one; a checkpoint holds it.

    Args:
        **kwargs: those of RecipeTrainer, with rows of `CarriedBlocks`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.carrier = Carrier(self.args.process_index)
        self.add_callback(_EpochEnds(self.carrier))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, from the state that the checkpoint holds."""
        if isinstance(resume_from_checkpoint, str):
            self.carrier.load(Path(resume_from_checkpoint), self.args.device)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's, from no state."""
        self.carrier.begin(EVALUATE)
        return super().evaluate(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As Trainer's, from the state after the batch before."""
        phase = TRAIN if model.training else EVALUATE
        inputs = {**inputs, "past_key_values": self.carrier.of(phase), "use_cache": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.carrier.keep(phase, outputs["past_key_values"])
        return (loss, outputs) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's; a checkpoint, of which the model is written first, gets the state as well."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None:
            self.carrier.save(Path(output_dir))


class _EpochEnds(TrainerCallback):
    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._carrier.begin(TRAIN)


def check_carries(model: PreTrainedModel) -> None:
    """Raises ValueError for a model that has no state to carry."""
    if not isinstance(model, RecurrentForCausalLM):
        raise ValueError(
            f"--carry_state is for recurrent models, and {type(model).__name__} is none: give --model_type "
            "gradguard_recurrent --cell lstm, or leave it out"
        )
