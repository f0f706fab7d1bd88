"""The command `ldm`: every program behind it, with an example each that its own command line accepts."""

import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from ldm.cli import command
from ldm.cli.command import COMMANDS

ROOT = Path(command.__file__).parents[2]
PROGRAM = "import sys; sys.argv[0] = '/usr/bin/ldm'; from ldm.cli.command import ldm; ldm()"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, cwd=ROOT, timeout=100
    )


@cache
def help_of(name: str) -> subprocess.CompletedProcess[str]:
    return run(name, "--help")


def test_pip_installs_it():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["ldm"].partition(":")
    assert getattr(importlib.import_module(module), name) is command.ldm


def test_help_shows_an_example_of_each():
    for words in ((), ("--help",)):
        done = run(*words)
        assert done.returncode == 0
        for name, (does, example) in COMMANDS.items():
            assert re.search(rf"^  {name} +{does}\n +{re.escape(example)}$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_help_of_its_own(name):
    done = help_of(name)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: ldm {name} ")


@pytest.mark.parametrize(
    "name", sorted({*COMMANDS} - {"sample", "evaluate"})
)  # whose flags name samplers, functions of torch
def test_a_wrong_flag_is_answered_before_torch_is_loaded(name):
    code = (
        f"import sys; from ldm.cli.{name} import main\n"
        "assert main(['--nonsense']) == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_of_their_command_and_have_its_flags(name):
    program, word, *rest = shlex.split(COMMANDS[name][1])
    assert (program, word) == ("ldm", name)
    known = help_of(name).stdout
    assert all(flag in known for flag in rest if flag.startswith("-"))


def test_an_unknown_command_names_the_nearest():
    done = run("trian")
    assert done.returncode == 2
    assert "unknown command 'trian': did you mean train?" in done.stderr


def test_it_does_what_the_file_does(autoencoder_tree, tmp_path):
    (tmp_path / "run.yaml").write_text("name: x\n")
    words = ["--base", str(tmp_path / "run.yaml")]
    other = subprocess.run([sys.executable, "main.py", *words], capture_output=True, text=True, cwd=ROOT, timeout=100)
    done = run("train", *words)
    assert (done.returncode, done.stderr) == (other.returncode, other.stderr)
    assert done.returncode == 2


def test_every_file_beside_main_that_has_a_command_starts_it():
    doors = {"main.py": "train", "cache_latents.py": "cache", "sample.py": "sample", "evaluate.py": "evaluate"}
    doors |= {"reconstruct_ema.py": "ema", "plot_run.py": "plot", "weights.py": "weights"}
    doors |= {"convert.py": "convert", "export.py": "export", "tokenizer.py": "tokenizer"}
    doors["demo.py"] = "demo"
    assert {*doors.values()} == {*COMMANDS}
    for file, name in doors.items():
        path = ROOT / file if file == "main.py" else ROOT / "scripts" / file
        assert f'start("{name}", sys.argv[1:])' in path.read_text()
