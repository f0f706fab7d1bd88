"""The command line of sample.py: which flags there are, and what they say together."""

import inspect
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ldm.cli.large_options import add_tiles, check_tiles
from ldm.cli.options import Parser, add_precision, called, finite, path, ratio, seed, share, some_share, whole_number
from ldm.cli.repaint_options import add_repaint, check_repaint
from ldm.config import check
from ldm.config.merging import apply
from ldm.config.targets import build
from ldm.config.tree import Node, from_plain, nearest
from ldm.errors import ConfigError
from ldm.sampling import samplers, timesteps
from ldm.sampling.conditions import Condition

log = logging.getLogger(__name__)


def parse(argv: Sequence[str]) -> Any:
    """The command line; ConfigError for a wrong one."""
    parser = Parser(
        prog=called("sample.py", "sample"),
        description="Make pictures with a trained diffusion model.",
        allow_abbrev=False,
    )
    _add_pictures(parser.add_argument_group("which pictures").add_argument)
    add_sampler(parser.add_argument_group("the sampler").add_argument)
    add_guidance(parser.add_argument_group("guidance").add_argument)
    add_tiles(parser.add_argument_group("pictures larger than the training pictures").add_argument)
    add_repaint(parser.add_argument_group("inpainting by a model that reads no mask").add_argument)
    _add_places(parser.add_argument_group("models and places").add_argument)
    options = parser.parse_strictly(argv)
    _check_together(options)
    return options


Add = Callable[..., Any]


def _add_pictures(add: Add) -> None:
    add("--classes", nargs="+", metavar="CLASS", help="numbers or names (default: all)")
    add(
        "--prompt", nargs="+", metavar="TEXT", help="captions, of a model that reads them; with --classes: each of both"
    )
    add("--prompts-file", type=path, metavar="FILE", help="captions, one a line")
    add("--conditions", type=path, metavar="FILE", help='any conditions: a JSON list such as [{"class_label": 3}]')
    add("-n", "--number", type=whole_number, default=8, help="pictures a condition (default: 8)")
    add("--seed", type=seed, default=0, help="of the first picture, counted up from there (default: 0)")
    add("--seeds", nargs="+", type=seed, metavar="SEED", help="these seeds instead of -n and --seed")
    sides = "height and width, or one side, pixels (default: the size of the training pictures)"
    add("--size", type=whole_number, nargs="+", metavar="SIDE", help=sides)
    pictures = (
        "what a model of masked or low-resolution pictures reads, a row each; others begin with it, not with noise"
    )
    add("--image", type=path, nargs="+", metavar="FILE", help=pictures)
    share_lost = (
        "begin with --image, of which so much is lost, above 0 to 1 (default: 0.6; with --mask 1; a model that "
    )
    add("--strength", type=some_share, help=f"{share_lost}reads pictures: with noise)")
    hidden = "noise on a small --image, which hides its faults at the price of details: 0 to the most of training"
    add("--noise-level", type=share, metavar="LEVEL", help=f"{hidden} (default: the model's own, mostly 0)")
    add("--mask", type=path, nargs="+", metavar="FILE", help="with --image: paint anew what is white in this picture")
    add(
        "--map",
        type=path,
        nargs="+",
        metavar="FILE",
        help="a class for each pixel: PNG with a palette, or gray; a row each",
    )
    boxes = '[{"class": "cat", "box": [left, top, right, bottom]}, ...], in 0 ... 1 of the picture; or a list of such'
    add("--layout", type=path, metavar="FILE", help=f"JSON: {boxes} lists, a row each")


def add_sampler(add: Add) -> None:
    """The flags of the sampler, which evaluate.py has as well."""
    add("--steps", type=whole_number, default=50, help="a network call each, heun two (default: 50)")
    words = ("NAME", "setting=value")
    known = f"one of {', '.join(named(samplers))}, or PACKAGE.FUNCTION, and its settings, such as eta=0.5 for ddim"
    add("--sampler", nargs="+", default=["ddim"], metavar=words, help=f"{known} (default: ddim)")
    known = f"where the steps lie: {', '.join(named(timesteps))}, or PACKAGE.FUNCTION, and its settings"
    add("--schedule", nargs="+", default=["default"], metavar=words, help=f"{known} (default: the objective's own)")


def add_guidance(add: Add) -> None:
    """The flags of guidance, which evaluate.py has as well."""
    add("--guidance", type=finite, default=1.0, help="classifier-free guidance scale; 1 (default): none")
    add("--rescale", type=share, default=0.0, help="0 (default) ... 1: keep large scales from burning pictures out")
    between = "guide between these ratios sigma / alpha alone (default: everywhere)"
    add("--interval", type=ratio, nargs=2, default=[0.0, math.inf], metavar=("LOW", "HIGH"), help=between)
    add("--guidance-channels", type=whole_number, metavar="C", help="guide the first C of the latents (default: all)")
    add("--negative", metavar="TEXT", help="guide away from this caption (default: from no caption)")
    add("--guide", metavar="RUN", help="guide away from this smaller or less trained model (autoguidance)")


def _add_places(add: Add) -> None:
    place = "run folder, checkpoint, or a quoted glob (its newest run)"
    add("-r", "--run", required=True, metavar="RUN", help=place)
    add("--raw", action="store_true", help="the weights of the last step instead of their running average")
    add("--lora", type=path, metavar="FOLDER", help="put this adapter, as peft saves it, on the network")
    add("--lora-scale", type=finite, metavar="S", help="of the adapter's update: 0 is the base (default: 1)")
    add(
        "--autoencoder",
        type=path,
        metavar="RUN",
        help="stage-1 run, checkpoint or diffusers' folder, if it moved",
    )
    add("--batch-size", type=whole_number, default=64, help="pictures made at once; changes speed alone (default: 64)")
    add("--device", help="such as cuda or cpu (default: cuda where there is one)")
    add_precision(add)
    add("--out", type=path, metavar="FOLDER", help="(default: <run>/samples/<settings>)")
    add("--npz", action="store_true", help="also write samples.npz")
    trusted = "let the checkpoint, --sampler and --schedule use objects of it"
    add("--trust", action="append", default=[], metavar="PACKAGE", help=trusted)


def _check_together(options: Any) -> None:
    """ConfigError for flags that contradict one another."""
    alike = ("classes", "prompt", "prompts_file", "map", "layout", "noise_level")
    others = [flag for flag in alike if getattr(options, flag) is not None]
    if others and options.conditions is not None:
        flag = others[0].replace("_", "-")
        raise ConfigError(f"--{flag} and --conditions: both say what to make; leave one of them out.")
    if options.prompt is not None and options.prompts_file is not None:
        raise ConfigError("--prompt and --prompts-file: both say what to make; leave one of them out.")
    if options.seeds is None and options.seed + options.number > 2**63:
        raise ConfigError(
            f"--seed {options.seed}: {options.number} pictures would need seeds beyond 2^63 - 1; take less"
        )
    if options.size is not None and len(options.size) > 2:
        raise ConfigError(f"--size: expected one side, or height and width, found {len(options.size)} numbers.")
    if options.image is None and options.mask is not None:
        raise ConfigError(f"--mask {' '.join(map(str, options.mask))}: belongs to --image FILE, which is missing.")
    for flag in ("strength", "noise_level"):
        if options.image is None and (value := getattr(options, flag)) is not None:
            raise ConfigError(f"--{flag.replace('_', '-')} {value}: belongs to --image FILE, which is missing.")
    check_guidance(options)
    check_tiles(options)
    check_repaint(options)


def check_guidance(options: Any) -> None:
    """ConfigError for flags of guidance that contradict one another."""
    idle = {"rescale": 0.0, "interval": [0.0, math.inf], "guidance_channels": None, "guide": None, "negative": None}
    for key, value in idle.items():
        if options.guidance == 1 and getattr(options, key) != value:
            flag = key.replace("_", "-")
            raise ConfigError(f"--{flag}: does nothing at --guidance 1, which is no guidance; name a scale.")
    low, high = options.interval
    if low >= high:
        raise ConfigError(f"--interval {low:g} {high:g}: expected LOW < HIGH, as ratios sigma / alpha.")


def named(module: ModuleType) -> list[str]:
    """The public functions of `ldm.sampling.samplers` or `timesteps`, each a sampler or a schedule."""
    functions = inspect.getmembers(module, inspect.isfunction)
    return [name for name, made in functions if made.__module__ == module.__name__ and not name.startswith("_")]


def _called_with(contract: type) -> list[str]:
    """The parameters that a protocol's function is called with, which are no settings."""
    return [name for name in inspect.signature(contract.__call__).parameters if name != "self"]


_GIVEN = {samplers: _called_with(samplers.Sampler), timesteps: _called_with(timesteps.TimestepSchedule)}


def chosen(flag: str, module: ModuleType, words: Sequence[str], trust: Sequence[str]) -> Any:
    """The function that `FLAG NAME [setting=value ...]` asks for, with its settings.

    Args:
        flag: for messages.
        module: `samplers` or `timesteps`, where a name without dots is looked up; a dotted one is a function of a
            package in `trust`.

    Raises:
        ConfigError: there is no such function, or no such setting, or its value is out of range.
    """
    name, *settings = words
    if "." not in name and name not in named(module):
        raise ConfigError(f"--{flag} {name}: there is none of this name; {nearest(name, named(module))}")
    for setting in settings:
        key, equals, _ = setting.partition("=")
        if not equals:
            raise ConfigError(f"--{flag} {name}: expected its settings as setting=value, found '{setting}'")
        if key in _GIVEN[module]:
            flags = ", that is --steps" if key == "steps" else ""
            raise ConfigError(f"--{flag} {name}: {setting}: is no setting, but what it is called with{flags}")
    origin = f"--{flag} {' '.join(words)}"
    node = from_plain({"target": name if "." in name else f"{module.__name__}.{name}", "partial": True}, origin)
    node = apply(node, [f"params.{setting}" for setting in settings])
    check.raise_all(check.parameters(Node({flag: node}, origin), check.full_look_up(trust)))
    found = build(node.plain(), trust, key=flag)
    if not set(_GIVEN[module][:3]) <= {*inspect.signature(found.func).parameters}:
        raise ConfigError(f"--{flag} {name}: expected a function of ({', '.join(_GIVEN[module])}, ...)")
    return found


def described(name: str, function: Any) -> str:
    """A sampler or schedule as samples.json has it: its name and its settings, however they were written."""
    settings = sorted(function.keywords.items())
    return " ".join(
        [name, *(f"{key}={value:.12g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings)]
    )


def read_prompts(file: Path) -> list[str]:
    """The captions of --prompts-file FILE, one a line, each once; empty lines are left out.

    Raises:
        ConfigError: it cannot be read, or holds none.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"--prompts-file {file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts-file {file}: expected a text in UTF-8: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    found = [*dict.fromkeys(prompts)]
    if not found:
        raise ConfigError(f"--prompts-file {file}: expected a caption on each line, found none")
    if repeated := len(prompts) - len(found):
        log.warning("--prompts-file %s: %d lines repeat others, and are made once", file, repeated)
    return found


def read_conditions(file: Path) -> list[Condition]:
    """What --conditions FILE holds: a JSON list of mappings.

    Raises:
        ConfigError: it is something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"--conditions {file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"--conditions {file}: not a JSON file: {error}") from error
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) and one for one in found):
        raise ConfigError(
            f'--conditions {file}: expected a list of mappings, such as [{{"class_label": 3}}, {{"class_label": 5}}]'
        )
    return [*{json.dumps(one, sort_keys=True): one for one in found}.values()]
