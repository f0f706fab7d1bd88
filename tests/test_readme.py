"""Every command of the README (and of the configurations' headers) is one that the programs take."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from ldm import commandline

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands(text: str) -> list[str]:
    """Lines of code blocks and code spans that start with a program of ours; `[...]` marks what may be left out."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", text)
    found = [re.sub(r"\s+#.*", "", re.sub(r"\[[^\]]*\]", "", line)) for line in lines]
    return [line for line in dict.fromkeys(found) if re.match(r"(make|python|torchrun|pip|conda) ", line)]


def header_commands() -> list[str]:
    texts = [re.sub(r"\\\n#\s*", "", path.read_text()) for path in sorted((ROOT / "configs").rglob("*.yaml"))]
    lines = [line.lstrip("# ").strip() for text in texts for line in text.splitlines() if line.startswith("#")]
    return [re.sub(r"\s{2,}[#(].*", "", line) for line in dict.fromkeys(lines) if line.startswith("python ")]


@cache
def usage(*words: str) -> str:
    """What a script says of itself; importing torch takes it seconds."""
    ended = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


COMMANDS = commands(README) + header_commands()


def test_the_readme_has_commands():
    assert {"make quickstart", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command):
    program, *words = shlex.split(command)
    if program == "make":
        assert subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True).returncode == 0
    elif program == "python" and words[0] == "main.py":
        options = commandline.parse(words[1:])
        for file in options.base:
            assert (ROOT / file).is_file() or "FILE" in str(file) or "my_" in str(file), f"{file} does not exist"
    elif program == "python" and words[0].startswith("scripts/"):
        subcommand = words[1:2] if words[0] == "scripts/bench.py" else []
        text = usage(words[0], *subcommand)
        for flag in (word.split("=")[0] for word in words if word.startswith("-")):
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text), f"{words[0]} has no flag {flag}"
    elif program == "conda":
        assert (ROOT / words[words.index("-f") + 1]).is_file()


def test_pictures_of_the_readme_exist_and_are_attributed():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)
    assert "CC BY-SA 4.0" in README
    assert "openmoji.org" in README
