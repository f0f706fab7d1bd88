"""main.py's command line, and what the scripts parse alike. Imports nothing heavy: a wrong flag fails at once."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ldm.errors import ConfigError
from ldm.training.options import Options

# `a.b=1`, `a.0.b=[1,2]`; never a flag (starts with a dash) nor a path before the equals sign.
_OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=.*", re.DOTALL)

_NAMES = {"-n": "--name", "-f": "--postfix", "-l": "--logdir", "-p": "--project", "-r": "--resume"}
_NAMES |= {long: long for long in _NAMES.values()}
"""Flags of one word that may be a name with an equals sign, as they are written with it."""

FLOAT32 = "32-true"
"""The precision where nothing is said, of programs that sample."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[0].upper()}{message[1:]}.\nSee `{self.prog} --help`.")

    def parse_strictly(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse; the error for an unknown flag names the nearest one."""
        options, unknown = self.parse_known_args(argv)
        if not unknown:
            return options
        word = unknown[0].split("=")[0]
        if not word.startswith("-"):
            self.error(f"unexpected word {word!r}: files follow --base, and an override is written key=value")
        flags = [flag for action in self._actions for flag in action.option_strings]
        near = get_close_matches(word, flags, n=1, cutoff=0.5)
        self.error(f"unknown flag {word}" + (f": did you mean {near[0]}?" if near else ""))


Number = TypeVar("Number", int, float)


def _numbers(kind: Callable[[str], Number], expected: str, fits: Callable[[Number], bool]) -> Callable[[str], Number]:
    """An argparse `type` that takes what `fits`; its error says what was expected and found."""

    def read(text: str) -> Number:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not fits(number):
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
        return number

    return read


whole_number = _numbers(int, "a whole number of 1 or more", lambda number: number >= 1)
seed = _numbers(int, "a whole number from 0 to 2^63 - 1", lambda number: 0 <= number < 2**63)
port = _numbers(int, "a port, 0 to 65535", lambda number: 0 <= number < 2**16)
finite = _numbers(float, "a finite number", math.isfinite)
positive = _numbers(float, "a finite number above 0", lambda number: 0 < number < math.inf)
share = _numbers(float, "a number from 0 to 1", lambda number: 0 <= number <= 1)
some_share = _numbers(float, "a number above 0, at most 1", lambda number: 0 < number <= 1)
ratio = _numbers(float, "a number of 0 or more, or inf", lambda number: number >= 0)
# Of an average over training, as in ldm/optim/ema.py: that of the uniform average is the limit.
width = _numbers(float, f"more than 0 and less than {12**-0.5:.3f}", lambda number: 0 < number < 12**-0.5)


def add_precision(add: Callable[..., Any]) -> None:
    """--precision, of programs that sample."""
    words = "of network and decoder; auto: bf16-mixed where the device computes it natively"
    words += f" (default: {FLOAT32}, so that seeds keep their pictures)"
    add("--precision", choices=("auto", FLOAT32, "bf16-mixed"), default=FLOAT32, help=words)


def path(text: str) -> Path:
    """An argument that names a file or a folder: `~` is home, also if the shell has not expanded it (--out=~/x)."""
    return Path(at_home(text))


def at_home(text: str) -> str:
    """The same for a word that may also be something else, such as a glob."""
    return os.path.expanduser(text)


def called(file: str, command: str) -> str:
    """The program's name for its usage, as it was started: that of the file, or `ldm` and the command."""
    return f"ldm {command}" if Path(sys.argv[0]).name == "ldm" else file


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(`key=value` words, all other words), each in order: overrides may be anywhere on the line.

    Raises:
        ConfigError: one stands behind a flag that says where or what a run is, and may be meant for that.
    """
    for flag, word in pairwise(argv):
        if flag in _NAMES and _OVERRIDE.fullmatch(word):
            raise ConfigError(
                f"{flag} {word}: looks like an override; if it is what {flag} means, write {_NAMES[flag]}={word}"
            )
    overrides = [word for word in argv if _OVERRIDE.fullmatch(word)]
    return overrides, [word for word in argv if not _OVERRIDE.fullmatch(word)]


def parse(argv: Sequence[str]) -> Options:
    """Parse main.py's command line.

    Raises:
        ConfigError: naming the flag, and the nearest one that exists.
    """
    overrides, words = split_overrides(argv)
    parsed = _parser().parse_strictly(words)
    if parsed.seed is not None:
        overrides.append(f"seed={parsed.seed}")
    if not parsed.base and not parsed.resume:
        raise ConfigError("Nothing to run: give a configuration with --base FILE.yaml, or a run with --resume.")
    several = {"base": tuple(parsed.base), "trust": tuple(parsed.trust), "allow_change": tuple(parsed.allow_change)}
    return Options(**(vars(parsed) | several | {"overrides": tuple(overrides)}))


def _switch(text: str) -> bool:
    words = {"true": True, "t": True, "yes": True, "y": True, "1": True}
    words |= {"false": False, "f": False, "no": False, "n": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")
    return words[text.lower()]


def _parser() -> Parser:
    parser = Parser(
        prog=called("main.py", "train"),
        description="Train an autoencoder (stage 1) or a diffusion model (stage 2) from YAML files.",
        epilog="Words key=value anywhere on the line override the configuration: data.params.batch_size=64",
        allow_abbrev=False,
    )
    _add_run(parser.add_argument)
    _add_mode(parser.add_argument)
    _add_permissions(parser.add_argument)
    return parser


Add = Callable[..., Any]


def _add_run(add: Add) -> None:
    """What is run, and where."""
    files = {"nargs": "+", "type": path, "default": [], "action": "extend", "metavar": "FILE.yaml"}
    add("-b", "--base", **files, help="configuration files, merged left to right")
    resumed = "resume a run folder, a checkpoint, or `auto`: the newest run of this name, else start a new one"
    add("-r", "--resume", type=at_home, metavar="RUN", help=resumed)
    add("-n", "--name", help="the run's name (default: the config's `name`, else the first file's name)")
    add("-f", "--postfix", default="", help="appended to the name")
    add("-l", "--logdir", type=path, default=Path("logs"), help="where run folders are made (default: logs)")
    add("-p", "--project", default="ldm", help="the Weights & Biases project (default: ldm)")
    add("-s", "--seed", type=int, help="the same as seed=...")


def _add_mode(add: Add) -> None:
    """What is done with it."""
    full = "full tracebacks, and the debugger where an error was raised when run from a terminal"
    add("-d", "--debug", action="store_true", help=full)
    switch = {"nargs": "?", "const": True, "default": True, "type": _switch, "metavar": "BOOL"}
    add("-t", "--train", **switch, help="train (the default); `-t false` only validates")
    add("--no-train", dest="train", action="store_false", help="the same as --train false")
    scaled = "multiply every optimizer's lr by the global batch size (lr is then the rate for one image)"
    add("--scale-lr", action="store_true", help=scaled)
    dry = "print the resolved config, parameter counts, shapes and FLOPs per step; make no run folder"
    add("--dry-run", action="store_true", help=dry)


def _add_permissions(add: Add) -> None:
    """What is let through that is refused by default."""
    several = {"action": "append", "default": []}
    trusted = "let the configuration build objects of this package; it runs that package's code"
    add("--trust", **several, metavar="PACKAGE", help=trusted)
    changed = "accept that KEY differs from what the resumed run was started with"
    add("--allow-change", **several, metavar="KEY", help=changed)
