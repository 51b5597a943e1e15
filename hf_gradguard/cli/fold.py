"""`gradguard fold`: a patched checkpoint becomes one that needs no GradGuard."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

name = "fold"
help = "merge the patch of a checkpoint into its weights, so that Transformers alone can load it"
example = "gradguard fold runs/deep/checkpoint-1000 folded"

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "*processor_config.json",
)
"""What goes along as it is: the files that tokenizers and processors save."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="IN", help="folder with a patched checkpoint")
    parser.add_argument("target", type=Path, metavar="OUT", help="folder for the folded one, new or empty")


def run(args: argparse.Namespace) -> int:
    source, target = args.source, args.target
    config = _read_config(source)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder; give a new one")

    from hf_gradguard.patch.fold import fold_patches
    from hf_gradguard.patch.loading import load_patched

    model = load_patched(_model_class(config, source), source, dtype="auto")
    fold_patches(model)
    model.save_pretrained(target)
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            if path.is_file() and not (target / path.name).exists():
                shutil.copy2(path, target)
    patch = "; ".join(f"{part}={text}" for part, text in config["gradguard"]["patch"].items())
    print(f"Folded: {patch}\nWritten: {target}, a {type(model).__name__} that loads without GradGuard")
    return 0


def _read_config(source: Path) -> dict[str, Any]:
    """The config of a patched checkpoint; raises ValueError where there is none."""
    if not source.is_dir():
        raise ValueError(f"{source} is no folder; give one that save_pretrained or Trainer wrote a patched model into")
    path = source / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{source} has no config.json; give a folder that save_pretrained or Trainer wrote a model into"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(config, dict) or not config.get("gradguard"):
        raise ValueError(f"{path} has no field 'gradguard': the model is not patched, so there is nothing to fold")
    return config


def _model_class(config: dict[str, Any], source: Path) -> Any:
    import transformers

    names = config.get("architectures") or []
    if len(names) != 1:
        raise ValueError(f"{source}: config.json has to name one class in 'architectures', but has {names}")
    found = getattr(transformers, names[0], None)
    if found is None:
        raise ValueError(
            f"{source}: Transformers has no class {names[0]!r}; load the model in Python, call fold_patches(model), "
            "and save it"
        )
    return found
