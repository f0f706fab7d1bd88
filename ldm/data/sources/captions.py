"""Where the captions of an image folder come from: a JSONL file, or `name.txt` beside `name.jpg`."""

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

from ldm.errors import DataError


def from_jsonl(path: Path, pictures: Sequence[str]) -> tuple[dict[str, str], str]:
    """{image: caption} from the file, and a warning about lines that cannot be used ("": none).

    Raises:
        DataError: the file cannot be read, or an image has no caption.
    """
    captions, repeated = _read_lines(path)
    lacking = [name for name in pictures if name not in captions]
    if lacking:
        raise DataError(
            f"{lacking[0]}: has no caption in {path}, like {len(lacking)} of {len(pictures)} images in all. "
            "Give every image one, or leave `captions` out"
        )
    known = set(pictures)
    missing = [name for name in captions if name not in known]
    notes = []
    if missing:
        notes.append(f"left out: captions of {len(missing)} images that do not exist ({missing[0]})")
    if repeated:
        notes.append(f"left out: {len(repeated)} captions of images that have another one further down ({repeated[0]})")
    return captions, "; ".join(notes)


def beside(
    root: Path, pictures: Sequence[str], texts: Sequence[str], wanted: bool | None
) -> tuple[dict[str, str], str]:
    """{image: its text file}, for all images or for none, and a warning if only some have one ("": none).

    Args:
        root: the folder, for messages.
        pictures, texts: files in it.
        wanted: True: every image must have one; None: they are used if every image has one.

    Raises:
        DataError: captions are required and an image has none.
    """
    text_of = {os.path.splitext(text)[0]: text for text in texts}
    found = {name: text_of[stem] for name in pictures if (stem := os.path.splitext(name)[0]) in text_of}
    if len(found) == len(pictures) or (not found and not wanted):
        return found, ""
    lacking = next(name for name in pictures if name not in found)
    counts = f"{len(pictures) - len(found)} of {len(pictures)} images have no caption beside them"
    if wanted:
        name = f"{os.path.splitext(lacking)[0]}.txt"
        raise DataError(f"{root / lacking}: has no caption ({name}); {counts}. Write them, or leave `captions` out")
    return {}, (
        f"{counts}, such as {lacking}, so the texts of the other {len(found)}, such as {next(iter(found.values()))}, "
        "are ignored and there are no captions. Write those that are missing (`captions: true` makes sure that none "
        "is), or set `captions: false` if these texts are not captions"
    )


def read_text(path: Path) -> str:
    """A text file, stripped of surrounding whitespace; DataError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a caption in UTF-8 ({error})") from error


def _read_lines(path: Path) -> tuple[dict[str, str], list[str]]:
    """{file name: caption}, and the names that occur again."""
    captions: dict[str, str] = {}
    repeated: list[str] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        name, caption = _entry(path, number, line)
        if name in captions:
            repeated.append(name)
        captions[name] = caption
    return captions, repeated


def _entry(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        entry: Mapping[str, str] = json.loads(line)
        return Path(entry["file_name"]).as_posix(), str(entry["caption"] if "caption" in entry else entry["text"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{path}:{number}: expected {{"file_name": "a.png", "caption": "..."}}, found {line[:80]!r}'
        ) from error


def hash_of(captions: Sequence[str]) -> int:
    """A hash of an item's captions, 64 bits, never 0."""
    digest = blake2b(json.dumps(list(captions)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
