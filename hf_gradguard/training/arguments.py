"""The options of the recipes: all of TrainingArguments, the guard's, and those of model and data."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_gradguard.config import GradGuardConfig
from hf_gradguard.registry import nearest

T = TypeVar("T")


def option(help: str, default: Any = None, *, is_switch: bool = False) -> Any:
    """A field of a dataclass with its help on the command line.

    Args:
        help: one sentence.
        default: the value where it is not given.
        is_switch: whether its name alone means true, for a field that may also be None.
    """
    switch = {"nargs": "?", "const": True} if is_switch else {}
    return field(default=default, metadata={"help": help, **switch})


@dataclass
class ModelArguments:
    """Which model, tokenizer and patch."""

    model_name_or_path: str | None = option(
        "Name on the hub, folder, or builtin:minilm. Fine-tuned, unless --from_scratch is given."
    )
    model_type: str | None = option("Kind of a new model, such as gpt2 or bert, in place of a name.")
    cell: str | None = option("Cell of --model_type gradguard_recurrent: lstm, gru, rnn_tanh or rnn_relu.")
    config_overrides: str | None = option("Fields of its configuration: n_layer=100,n_embd=64")
    from_scratch: bool = option("Take only the configuration of --model_name_or_path, and draw new weights.", False)
    revision: str = option("Branch, tag or commit of a model on the hub.", "main")
    tokenizer_name: str | None = option(
        "Name on the hub, folder, or one to train on the text: bpe, wordpiece, bytes or words, with options as in "
        "bpe:vocab_size=8000. By default the model's own, and bpe for a new one."
    )
    patch: str | None = option(
        "A preset such as rezero, or parts such as residual=layerscale:init=0.1;norm=pre (gradguard patches)."
    )

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.model_type is None):
            both = "both are given" if self.model_type else "neither is"
            raise ValueError(
                f"give either --model_name_or_path (a name, a folder) or --model_type (a new model), {both}"
            )
        if self.cell is not None and self.model_type != "gradguard_recurrent":
            raise ValueError(
                f"--cell {self.cell} goes with --model_type gradguard_recurrent, not with {self.model_type}"
            )
        if self.patch is not None:
            from hf_gradguard.patch.config import PatchConfig

            PatchConfig.parse(self.patch)


@dataclass
class DataArguments:
    """Which text, and how it is read."""

    dataset_name: str | None = option(
        "Name on the hub, or builtin:sotu, builtin:rotten_tomatoes, builtin:imdb, builtin:20newsgroups."
    )
    dataset_config_name: str | None = option("Configuration of a dataset on the hub.")
    train_file: list[str] | None = option("Text, csv, tsv, json, jsonl or parquet files, in place of a name.")
    validation_file: list[str] | None = option("Files to validate with; else a share of the training text.")
    test_file: list[str] | None = option("Files for the last evaluation.")
    validation_split_percentage: float = option("Share of the training rows to validate with, where it is needed.", 5.0)
    text_column_name: str | None = option("Column of the text; by default text, sentence or the only one of strings.")
    sample_by: Literal["line", "paragraph", "document"] = option("What of a text file is one row.", "line")
    streaming: bool = option(
        "Read the training text as it is needed, for one that is larger than memory; an epoch is then all of "
        "--max_steps.",
        False,
    )
    shuffle_buffer: int = option("Rows among which a stream is shuffled.", 1000)
    preprocessing_num_workers: int | None = option("Processes that tokenise; by default one, with all its threads.")
    max_train_samples: int | None = option("Train with the first so many blocks or rows only.")
    max_eval_samples: int | None = option("Evaluate the first so many blocks or rows only.")

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (not self.train_file):
            both = "both are given" if self.dataset_name else "neither is"
            raise ValueError(f"give either --dataset_name (a name, builtin:sotu) or --train_file, {both}")
        if self.dataset_name is not None and (self.validation_file or self.test_file):
            raise ValueError("--validation_file and --test_file go with --train_file, not with --dataset_name")
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ValueError("--dataset_config_name goes with --dataset_name, not with --train_file")
        if not 0 < self.validation_split_percentage < 100:
            given = self.validation_split_percentage
            raise ValueError(f"--validation_split_percentage {given} must lie between 0 and 100")
        if self.streaming and self.max_train_samples is not None:
            raise ValueError("--max_train_samples does not go with --streaming: give --max_steps")
        for name in ("shuffle_buffer", "preprocessing_num_workers", "max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")

    @property
    def source(self) -> str:
        """What the text is, in a word or two."""
        if self.dataset_name is None:
            assert self.train_file is not None
            return ", ".join(Path(name).name for name in self.train_file)
        return " ".join(filter(None, (self.dataset_name, self.dataset_config_name)))


@dataclass
class RecipeArguments(TrainingArguments):
    """TrainingArguments, with the defaults of a run that evaluates, keeps its best checkpoint and can be resumed."""

    eval_strategy: str = option("When to evaluate: no, steps or epoch.", "epoch")
    save_strategy: str = option("When to save a checkpoint: no, steps, epoch or best.", "epoch")
    save_total_limit: int | None = option("Checkpoints to keep; the best is kept besides.", 2)
    load_best_model_at_end: bool | None = option(  # type: ignore[assignment]
        "End with the checkpoint that was best. By default, where each evaluation has one.", is_switch=True
    )
    logging_steps: float = option("Log every so many updates; a share of all below 1.", 20)
    dataloader_pin_memory: bool = option(
        "Copy batches through pinned memory; by default with a GPU.", torch.cuda.is_available()
    )
    restore_callback_states_from_checkpoint: bool = option("Go on with the state of callbacks.", True)
    early_stopping_patience: int | None = option("End when so many evaluations have brought nothing better.")
    epoch_decay: float | None = option("Factor of the learning rate from epoch to epoch, in place of a schedule.")
    epoch_decay_after: int = option("Epochs before the learning rate falls by it.", 1)

    def __post_init__(self) -> None:
        if self.disable_tqdm is None and not sys.stderr.isatty():
            self.disable_tqdm = True  # in a file a bar is a line of noise
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else several processes are not seen as such, and bf16 is refused
        if self.output_dir is None:
            raise ValueError("--output_dir is missing: a folder for checkpoints, model, record and report")
        saves = str(getattr(self.save_strategy, "value", self.save_strategy))
        evaluation = str(getattr(self.eval_strategy, "value", self.eval_strategy))
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = evaluation != "no" and saves in (evaluation, "best")
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError(
                f"--early_stopping_patience {self.early_stopping_patience} needs evaluations with a checkpoint each: "
                f"--eval_strategy is {evaluation}, --save_strategy is {saves}; give both as epoch, or as steps with "
                "--eval_steps and --save_steps"
            )
        if self.epoch_decay is not None and not 0 < self.epoch_decay <= 1:
            raise ValueError(f"--epoch_decay {self.epoch_decay} must lie above 0, up to 1")
        super().__post_init__()  # type: ignore[no-untyped-call]


def _field_texts(owner: type) -> dict[str, str]:
    """The text below each field of a dataclass, which is where this package documents them."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and is_text:
            texts[statement.target.id] = " ".join(str(following.value.value).split())  # type: ignore[attr-defined]
    return texts


def _guard_fields() -> list[tuple[str, Any, Any]]:
    texts, hints = _field_texts(GradGuardConfig), get_type_hints(GradGuardConfig)
    fields: list[tuple[str, Any, Any]] = [
        ("guard_config", str | None, option("YAML or JSON file with options of GradGuard; those given here win."))
    ]
    for item in dataclasses.fields(GradGuardConfig):
        if item.name == "thresholds":  # a mapping: from --guard_config only
            continue
        kind = hints[item.name] if hints[item.name] in (bool, int, float) else str
        help = texts.get(item.name, "").replace("%", "%%")
        fields.append((item.name, kind | None, option(help, is_switch=kind is bool)))
    return fields


GuardArguments = dataclasses.make_dataclass("GuardArguments", _guard_fields(), namespace={"__doc__": "GradGuard's."})
"""GradGuardConfig's own fields as options, each None where it is not given."""


def guard_config(options: Any) -> GradGuardConfig:
    """The configuration that GuardArguments describe.

    Raises:
        ValueError: an impossible value; the message names the field.
        FileNotFoundError: there is no such file.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    path = given.pop("guard_config", None)
    if (every := given.get("record_every")) is not None and every.isdigit():
        given["record_every"] = int(every)
    return (GradGuardConfig() if path is None else GradGuardConfig.load(path)).replace(**given)


def parse(
    own: type[T],
    words: Sequence[str] | None = None,
    description: str | None = None,
    *,
    training: type[RecipeArguments] = RecipeArguments,
) -> tuple[ModelArguments, DataArguments, RecipeArguments, GradGuardConfig, T]:
    """All options of a recipe, from the command line or from one YAML or JSON file that is given instead.

    Args:
        own: dataclass of those that only this recipe has.
        words: the command line; by default that of this process.
        description: what `--help` begins with.
        training: TrainingArguments with the defaults of the recipe.

    Raises:
        ValueError: a value that is refused.
        SystemExit: an option that there is not, as argparse does.
    """
    kinds = [ModelArguments, DataArguments, own, training, GuardArguments]
    model, data, special, args, guard = parse_kinds(kinds, words, description)
    if data.streaming and args.max_steps < 1:
        raise ValueError("--streaming needs --max_steps: how long a stream is nobody knows before its end")
    return model, data, args, guard_config(guard), special


def parse_kinds(
    kinds: Sequence[Any], words: Sequence[str] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """One object of each of these dataclasses, for a recipe that trains no model. Else as `parse`."""
    words = sys.argv[1:] if words is None else list(words)
    parser = _Parser(
        list(kinds), description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if len(words) == 1 and Path(words[0]).suffix in (".yaml", ".yml", ".json"):
        words = _words_of(Path(words[0]), parser)
    parser.refuse_unknown(words)
    return parser.parse_args_into_dataclasses(words)


class _Parser(HfArgumentParser):
    """One whose errors are one line, not that and a page of all options."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def option_names(self) -> list[str]:
        """All options, spelt with underscores."""
        return [name for name in self._option_string_actions if "-" not in name.removeprefix("--")]

    def takes_a_boolean(self, name: str) -> bool:
        """Whether an option is a switch."""
        kind = self._option_string_actions[name].type
        return getattr(kind, "__name__", "") == "string_to_bool"

    def refuse_unknown(self, words: list[str]) -> None:
        """Raises ValueError for the first word that is no option and no value of one."""
        _, unknown = self.parse_known_args(words)
        if unknown:
            name = unknown[0].partition("=")[0]
            close = nearest(name.replace("-", "_").replace("__", "--", 1), self.option_names())
            raise ValueError(f"there is no option {name!r}{close} (--help lists all)")


def _words_of(path: Path, parser: _Parser) -> list[str]:
    """The command line that a file stands for, so that a value is read in the same way in both."""
    text = path.read_text(encoding="utf-8")
    try:
        options = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} can't be read as {path.suffix[1:]}: {error}") from None
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds no options; write one on each line, as in output_dir: out")
    names = parser.option_names()
    words: list[str] = []
    for key, value in options.items():
        name = f"--{key}"
        if name not in names:
            raise ValueError(f"{path}: there is no option {key!r}{nearest(name, names)} (--help lists all)")
        if isinstance(value, list):
            words += [name, *map(str, value)]
        elif value is not None:
            words.append(f"{name}={_spelt(value, is_switch=parser.takes_a_boolean(name))}")
    return words


def _spelt(value: Any, *, is_switch: bool) -> str:
    if isinstance(value, Mapping):
        return json.dumps(value)
    if isinstance(value, bool):  # YAML reads the `no` of eval_strategy as false
        return str(value).lower() if is_switch else ("yes" if value else "no")
    return str(value)
