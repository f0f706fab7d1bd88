"""Text encoders of random weights, as transformers saves them, with a tokenizer of a few words."""

from pathlib import Path
from typing import Any

import torch

WORDS = ["<|startoftext|>", "<|endoftext|>", "a", "red", "green", "blue", "cat", "dog", "boat", "of", "on", "photo"]
WIDTH, LAYERS, LONGEST = 32, 3, 16


def forget() -> None:
    """What this process knows of folders; tests put other encoders into folders of one name."""
    from ldm.diffusion.conditioners import pooling, text, text_models

    kept = (text_models.opened, text_models.description, text_models.projection, pooling._of_folder)
    for cached in (*kept, text._of_empty, text._null, text._made):
        cached.cache_clear()
    text._kept_nulls.clear()


def save_tokenizer(folder: Path) -> None:
    """One token a word; every text begins with one of its own and ends with another, which also pads it, as in CLIP."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    start, end = WORDS[:2]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(f"{start} $A {end}", special_tokens=[(start, 0), (end, 1)])
    special = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": "a"}
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=LONGEST, **special).save_pretrained(folder)


def clip_config() -> Any:
    from transformers import CLIPTextConfig

    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2}
    more = {"num_hidden_layers": LAYERS, "max_position_embeddings": LONGEST, "projection_dim": 8}
    return CLIPTextConfig(vocab_size=len(WORDS), bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes, **more)


def save_text_encoder(folder: Path, seed: int = 0, network: Any = None) -> Path:
    """A tiny CLIP, or `network`, and its tokenizer in one folder."""
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    network = CLIPTextModel(clip_config()) if network is None else network
    for parameter in network.parameters():  # transformers' own are so small that texts hardly differ
        torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[2:], "##s", "!", "e", "##mile"]
"""Of a BERT, a line each in its `vocab.txt`."""


def save_vocabulary(file: Path) -> Path:
    """The vocab.txt of a BERT of a few words."""
    file.write_text("\n".join(BERT_WORDS) + "\n")
    return file


def save_bert_vocabulary(file: Path) -> Path:
    """A vocab.txt with as many words as that of bert-base-uncased."""
    file.write_text("\n".join([*BERT_WORDS, *(f"[unused{n}]" for n in range(30522 - len(BERT_WORDS)))]) + "\n")
    return file


def save_wide_clip(folder: Path, width: int) -> Path:
    """A CLIP of that width, and of one thin layer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": width, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    more = {"max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "projection_dim": 8}
    return save_text_encoder(folder, network=CLIPTextModel(CLIPTextConfig(vocab_size=len(WORDS), **sizes, **more)))


CLIPS = {"models/clip-vit-large-patch14": 768, "models/stable-diffusion-2/text_encoder": 1024}
BERT = "models/bert-base-uncased/vocab.txt"


def save_models(root: Path) -> None:
    """Stand-ins for the text encoders and words that configurations name: {folder: width of its tokens}."""
    for name, width in CLIPS.items():
        save_wide_clip(root / name, width)
    (root / BERT).parent.mkdir(parents=True)
    save_bert_vocabulary(root / BERT)
