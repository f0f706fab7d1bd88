"""The conditions that the command line of sample.py asks for: of a file, or of flags."""

import logging
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from ldm.cli.sample_dense import dense_rows, only_by_file
from ldm.cli.sample_options import read_conditions, read_prompts
from ldm.errors import ConfigError
from ldm.sampling.conditions import Condition
from ldm.sampling.dense_files import picture_key, recorded
from ldm.sampling.pipeline import Pipeline
from ldm.sizes import SIZES

log = logging.getLogger(__name__)


def chosen_classes(words: Sequence[str] | None, number: int | None, names: Sequence[str] | None) -> list[int | None]:
    """What --classes means for a model of `number` classes; [None] for one without.

    A word is the number of a class, or its name, whatever its case. Where names are numbers, too, of other classes,
    a warning says which is meant.

    Raises:
        ConfigError: naming the nearest class, or those that a word could mean.
    """
    if number is None:
        if words:
            raise ConfigError(f"--classes {' '.join(words)}: this model was trained without classes; leave it out.")
        return [None]
    if words is None:
        return [*range(number)]
    return [*dict.fromkeys(_class(word, number, names or ()) for word in words)]


def _class(word: str, number: int, names: Sequence[str]) -> int:
    """The label that a word of --classes means."""
    if word.isdecimal() and int(word) < number:
        label = int(word)
        if word in names and names[label] != word:
            text = "--classes %s: the number of class %r; the class that is called so has the number %d"
            log.warning(text, word, names[label], names.index(word))
        return label
    if word in names:
        return names.index(word)
    known = [name.casefold() for name in names]
    meant = [label for label, name in enumerate(known) if name == word.casefold()]
    if len(meant) > 1:
        raise ConfigError(f"--classes {word}: could be {' or '.join(names[label] for label in meant)}")
    if meant:
        return meant[0]
    near = get_close_matches(word.casefold(), known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(names) or 'no names'}."
    raise ConfigError(f"--classes {word}: expected a number from 0 to {number - 1} or a name; {hint}")


def requested(pipeline: Pipeline, options: Any) -> list[Condition | None]:
    """The conditions that the command line asks for; [None] for a model without.

    Raises:
        ConfigError: the model reads others.
    """
    reads = pipeline.conditioner.keys
    if options.conditions is not None:
        if options.image is not None and picture_key(reads) is not None:
            raise ConfigError("--image and --conditions: both say what to make; leave one of them out.")
        return [recorded(condition) for condition in read_conditions(options.conditions)]
    flag, prompts = "--prompt", None if options.prompt is None else [*dict.fromkeys(options.prompt)]
    if options.prompts_file is not None:
        flag, prompts = "--prompts-file", read_prompts(options.prompts_file)
    if prompts is not None and "caption" not in reads:
        raise ConfigError(f"{flag}: this model reads no captions; leave it out")
    if others := [key for key in only_by_file(reads) if key not in ("class_label", "caption", *SIZES)]:
        raise ConfigError(f"this model reads {', '.join(others)}: list what to make in a file, --conditions FILE")
    if prompts is None and "caption" in reads:
        raise ConfigError('this model reads captions: say what to make, --prompt "..." or --prompts-file FILE')
    dense = dense_rows(pipeline, options)
    names = pipeline.manifest.plan.class_names
    classes = [{"class_label": label} for label in chosen_classes(options.classes, pipeline.num_classes, names)]
    found = [
        {**({} if one["class_label"] is None else one), **({} if prompt is None else {"caption": prompt}), **row}
        for row in dense
        for prompt in prompts or [None]
        for one in classes
    ]
    return [condition or None for condition in found]
