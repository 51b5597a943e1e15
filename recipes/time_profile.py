"""How far back in time the gradient reaches: recurrent models and a small GPT-2, before and after training on text.

Each model reads State of the Union speeches byte by byte, in rows long enough for the largest lag, and is trained by a
real `Trainer`. The norm of the gradient of the loss at byte t with respect to the input at byte t − k is measured on
rows that no model is trained on. Every model is trained with each of some rates and shown at the one with the lowest
loss on these rows. Tables are printed as Markdown, the curves are drawn into a picture.

    python recipes/time_profile.py                                    # six models, ten minutes on one core
    python recipes/time_profile.py --models "GRU" "GPT-2" --steps 1000
    python recipes/time_profile.py --saved output/lstm output/gpt2    # models that are trained already, with tokenizers
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_gradguard import RecurrentConfig, RecurrentForCausalLM
from hf_gradguard.cli.demo import real_text
from hf_gradguard.observe.time_profile import TimeProfile, time_profile
from hf_gradguard.report import write_time_profiles

BATCH = 16
HELD_OUT = 32
"""Rows of the text that no model is trained on: profiles and losses are theirs."""
SHOWN = (1, 10, 50, 100)
"""Lags in the table."""
Profiles = dict[str, TimeProfile]
Rows = list[dict[str, Tensor]]


def recurrent(**options: Any) -> Callable[[int, int], PreTrainedModel]:
    """Makes a recurrent model of so many units and layers."""

    def make(width: int, layers: int) -> PreTrainedModel:
        return RecurrentForCausalLM(RecurrentConfig(vocab_size=256, hidden_size=width, num_layers=layers, **options))

    return make


def torchs_own(width: int, layers: int) -> PreTrainedModel:
    """A tanh RNN whose weights begin as torch draws them: uniform in ±1/√width."""
    uniform = {"input_init": "uniform", "recurrent_init": "uniform", "bias_init": "uniform"}
    return recurrent(cell="rnn_tanh", init_range=width**-0.5, **uniform)(width, layers)


def gpt2(width: int, layers: int) -> PreTrainedModel:
    """A GPT-2 of that width, with twice as many layers."""
    config = GPT2Config(
        vocab_size=256,
        n_embd=width,
        n_layer=2 * layers,
        n_head=max(1, width // 32),
        n_positions=1024,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


MODELS: dict[str, Callable[[int, int], PreTrainedModel]] = {
    "tanh RNN, uniform": torchs_own,
    "tanh RNN, orthogonal": recurrent(cell="rnn_tanh"),
    "LSTM, forget bias 0": recurrent(cell="lstm", forget_bias=0.0),
    "LSTM, forget bias 1": recurrent(cell="lstm"),
    "GRU": recurrent(cell="gru"),
    "GPT-2": gpt2,
}
"""By what they are called in the table. Recurrent weights are orthogonal where nothing else is said."""


def rows_of(tokens: Sequence[int] | np.ndarray, length: int) -> Rows:
    """A text cut into rows of equal length, each its own target."""
    whole = torch.as_tensor(np.asarray(tokens, dtype=np.int64))[: len(tokens) // length * length]
    return [{"input_ids": ids, "labels": ids} for ids in whole.view(-1, length)]


def look(model: PreTrainedModel, rows: Rows, max_lag: int) -> tuple[float, TimeProfile]:
    """Mean loss in nats a token, and the time profile, in float64: 1e-60 is no number to float32."""
    batch = {name: torch.stack([row[name] for row in rows]).to(model.device) for name in ("input_ids", "labels")}
    model.eval()
    with torch.no_grad():
        loss = model(**batch).loss.item()
    return loss, time_profile(copy.deepcopy(model).double(), batch, max_lag=max_lag)


def made(name: str, args: argparse.Namespace) -> PreTrainedModel:
    """A model as it begins."""
    set_seed(args.seed)
    return MODELS[name](args.width, args.layers)


def train(model: PreTrainedModel, rows: Rows, rate: float, args: argparse.Namespace) -> PreTrainedModel:
    """So many updates of AdamW, all models alike; gives the same model."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=min(args.warm_up, args.steps // 5),
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=args.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        with contextlib.redirect_stdout(io.StringIO()):  # the Trainer's own summary
            Trainer(model, arguments, train_dataset=rows).train()  # type: ignore[arg-type]
    return model


def row_of_table(name: str, moment: str, loss: float, profile: TimeProfile) -> str:
    """One line of Markdown."""
    last = len(profile.lags) - 1
    shares = [f"{profile.relative[lag]:.2g}" if lag <= last else "" for lag in SHOWN]
    falls = [f"> {last}" if lag is None else f"{lag}" for lag in (profile.half_life, profile.lag_of(0.01))]
    return f"| {' | '.join([name, moment, f'{loss:.2f}', *falls, *shares, f'{profile.e_folds:.3f}'])} |"


def head_of_table(names: Sequence[str]) -> str:
    """The first two lines of a table."""
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


COLUMNS = ["model", "", "loss", "half at", "1 % at", *(f"lag {lag}" for lag in SHOWN), "e-folds a token"]


def trained(args: argparse.Namespace) -> dict[str, Profiles]:
    """Trains every model with every rate, prints the tables, and gives the profiles by moment and name, after training
    those of the rate with the lowest held-out loss."""
    text, source = real_text()
    rows = rows_of(np.frombuffer(text, dtype=np.uint8), args.length)
    held_out, own = rows[-HELD_OUT:], rows[:-HELD_OUT]
    print(f"{source}, {args.length} bytes a row, {args.steps} updates of {BATCH} rows, seed {args.seed}\n")
    print(head_of_table(COLUMNS), flush=True)
    start, end = "at the start", f"after {args.steps} updates"
    found: dict[str, Profiles] = {start: {}, end: {}}
    by_rate: dict[str, list[tuple[float, TimeProfile]]] = {}
    for name in args.models:
        loss, found[start][name] = look(made(name, args), held_out, args.max_lag)
        print(row_of_table(name, start, loss, found[start][name]), flush=True)
        by_rate[name] = [look(train(made(name, args), own, rate, args), held_out, args.max_lag) for rate in args.rates]
        best = min(range(len(args.rates)), key=lambda index: by_rate[name][index][0])
        loss, found[end][name] = by_rate[name][best]
        print(row_of_table(name, f"{end}, rate {args.rates[best]:g}", loss, found[end][name]), flush=True)
    print(f"\nHeld-out loss, and share of the gradient {args.max_lag} tokens back, by rate:\n")
    print(head_of_table(["model", *(f"{rate:g}" for rate in args.rates)]))
    for name, results in by_rate.items():
        print(f"| {name} | {' | '.join(f'{loss:.2f}, {profile.relative[-1]:.1g}' for loss, profile in results)} |")
    return found


def saved(args: argparse.Namespace) -> dict[str, Profiles]:
    """The same of models that are trained already, each with its own tokenizer: a lag is one of its tokens."""
    text, source = real_text()
    print(f"{source}, {args.length} tokens a row\n\n{head_of_table(COLUMNS)}", flush=True)
    found: Profiles = {}
    for path in args.saved:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        end = text[-20 * HELD_OUT * args.length :].decode("utf-8", errors="ignore")
        rows = rows_of(tokenizer(end)["input_ids"], args.length)[-HELD_OUT:]
        loss, found[path.name] = look(model, rows, args.max_lag)
        print(row_of_table(path.name, "as saved", loss, found[path.name]), flush=True)
    return {"": found}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs it; `argv` are the words after the script's name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--saved", nargs="+", type=Path, metavar="DIR", help="take these models, and train none")
    parser.add_argument("--steps", type=int, default=400, help="updates (default: 400)")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[2e-3, 5e-3, 1e-2], help="learning rates (default: 2e-3 5e-3 1e-2)"
    )
    parser.add_argument("--warm-up", type=int, default=20, help="updates in which the rate rises (default: 20)")
    parser.add_argument("--width", type=int, default=128, help="of all models (default: 128)")
    parser.add_argument("--layers", type=int, default=1, help="recurrent layers; GPT-2 has twice as many (default: 1)")
    parser.add_argument("--length", type=int, default=160, help="tokens of a row (default: 160)")
    parser.add_argument("--max-lag", type=int, default=100, help="the largest lag (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("time-profile.png"), help="where the curves are drawn")
    args = parser.parse_args(argv)
    found = saved(args) if args.saved else trained(args)
    for moment, profiles in found.items():
        print(f"\n{moment or 'As saved'}:")
        for name, profile in profiles.items():
            print(f"- {name}: {profile.describe()}")
    write_time_profiles(found, args.picture)
    print(f"\nThe curves: {args.picture}")


if __name__ == "__main__":
    main()
