"""Vision transformers of the package transformers, from a folder with `config.json` and `model.safetensors`."""

from pathlib import Path
from typing import Any

import torch

from ldm.errors import CheckpointError

_SIZES = {384: "s", 768: "b", 1024: "l", 1280: "h", 1536: "g"}


def load(kind: Any, file: Path, what: str) -> Any:
    """The model of class `kind` in the folder of `file`, in float32; nothing is downloaded.

    Raises:
        CheckpointError: it cannot be read, or lacks weights, which transformers would replace by random ones.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # it would list everything in the file that is of no use here, such as CLIP's text
    logging.disable_progress_bar()
    try:
        model, info = kind.from_pretrained(
            file.parent, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors have classes of their own
        raise CheckpointError(f"{file}: cannot be read as {what}: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    if lacking := sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])]):
        raise CheckpointError(f"{file}: not the weights of {what}: {len(lacking)} are missing, the first {lacking[0]}")
    return model


def vit(config: Any) -> str:
    """ "vit-l-14": a transformer's width, as papers abbreviate it, and the side of its patches."""
    return f"vit-{_SIZES.get(config.hidden_size, config.hidden_size)}-{config.patch_size}"
