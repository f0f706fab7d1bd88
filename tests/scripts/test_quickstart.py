"""`make quickstart` on one's own pictures, and its last words: every command that it prints works as printed."""

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main
from ldm.cli import sample
from scripts import quickstart

ROOT = Path(__file__).parents[2]
SMALL = [
    *("lightning.trainer.max_steps=2", "lightning.trainer.accelerator=cpu", "lightning.trainer.devices=1"),
    *("lightning.logger=null", "data.params.batch_size=4"),
]
SMALLER = {
    "autoencoder": ["model.params.encoder.params.base_channels=32"],
    "diffusion": ["model.params.network.params.model_channels=32", "lightning.callbacks.images=null"],
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("configs", "scripts", "main.py", "Makefile", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def thirty_pictures(folder: Path, classes: list[str]) -> str:
    random = np.random.default_rng(7)
    for number in range(30):
        file = folder / classes[number % len(classes)] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 26, 3), dtype=np.uint8)).save(file)
    return str(folder)


def do(command: str, *more: str) -> int:
    """A line of make or of the script, in this process; trained for two steps, sampled in two."""
    program, *words = shlex.split(command)
    if program == "make":
        return subprocess.run([program, "-n", *words], capture_output=True).returncode
    assert program.endswith("python"), program
    if words[0] == "main.py":
        stage = "autoencoder" if "configs/quickstart/autoencoder.yaml" in words else "diffusion"
        return main.main([*words[1:], *SMALL, *SMALLER[stage], *more])
    if words[0] == "scripts/sample.py":
        return sample.main([*words[1:], "-n", "2", "--steps", "2"])
    return quickstart.main(words[1:])


@pytest.mark.slow
@pytest.mark.parametrize("classes", [[""], ["cats", "dogs", "two words"]], ids=["flat", "classes"])
def test_own_pictures_and_the_commands_to_try_next(place, capsys, classes):
    pictures = thirty_pictures(place / "my pictures", classes)
    recipe = subprocess.run(
        ["make", "-n", "quickstart", f"PICTURES={pictures}", "VENV=venv"], capture_output=True, text=True
    )
    lines = [line for line in recipe.stdout.splitlines() if re.match(r"venv/bin/python (main.py|scripts)", line)]
    assert "scripts/weights.py" in lines.pop(0)
    assert len(lines) == 4
    for line in lines:
        assert do(line) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    for picture in re.findall(r":  (\S+\.png)$", said, re.MULTILINE):
        assert (place / picture).is_file()
    assert len(re.findall(r":  (\S+\.png)$", said, re.MULTILINE)) == 2
    commands = [line[24:] for line in said.split("What to try next:\n")[1].splitlines()]
    assert len(commands) == 3
    for command in commands:
        assert do(command) == 0, capsys.readouterr().err
    assert "lightning.trainer.max_steps=8" in commands[1]  # four times as many
    assert ("--guidance" in commands[2]) == (len(classes) > 1)
    # Once more, it goes on with what is there.
    for line in lines:
        assert do(line) == 0, capsys.readouterr().err
    assert "nothing to do, 2 steps are done" in capsys.readouterr().out
    assert sorted(run.name.split("_", 1)[1] for run in (place / "logs").iterdir()) == [
        *("own_my_pictures_autoencoder", "own_my_pictures_diffusion", "own_my_pictures_longer")
    ]


def test_without_a_run_it_says_what_is_missing(place, capsys):
    assert quickstart.main(["emoji"]) == 2
    assert "logs/*_emoji_autoencoder" in capsys.readouterr().err


def test_home_in_the_folder_of_pictures(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    seen = []
    monkeypatch.setattr(quickstart, "ending", lambda name, pictures: seen.append(pictures) or "")
    assert quickstart.main(["own", "--pictures=~/holiday"]) == 0
    assert seen == [Path("/home/me/holiday")]


def test_emoji_are_the_default(place):
    recipe = subprocess.run(["make", "-n", "quickstart", "VENV=venv"], capture_output=True, text=True).stdout
    assert "--name emoji_autoencoder --base configs/quickstart/autoencoder.yaml" in recipe
    assert "own_pictures" not in recipe
