"""`make roundtrip`: from a folder of diffusers through both trainings back to one, with the same pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.errors import NumericError
from ldm.run_folder import RunFolder
from scripts import roundtrip

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("configs", "scripts", "main.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


@pytest.mark.slow
def test_the_same_pictures_come_out_again(place, capfd):
    assert roundtrip.main(["--steps", "4", "6"]) == 0, capfd.readouterr().err
    said = capfd.readouterr().out
    assert said.count("$ python main.py") == 2
    assert "pictures.png: ldm above, diffusers below" in said
    sheet = np.asarray(Image.open("roundtrip/pictures.png"))
    assert sheet.shape == (128, 11 * 64, 3)
    assert np.abs(sheet[:64].astype(int) - sheet[64:]).max() <= 1
    # Started again: the runs are there, and are not made anew.
    runs = sorted(Path("logs").iterdir())
    assert roundtrip.main(["--steps", "4", "6"]) == 0
    assert sorted(Path("logs").iterdir()) == runs
    # A folder that makes other pictures is told.
    index = Path("roundtrip/pipeline/model_index.json")
    tree = json.loads(index.read_text())
    tree["latents_mean"] = [mean + 1 for mean in tree["latents_mean"]]
    index.write_text(json.dumps(tree))
    with pytest.raises(NumericError, match="differ by up to"):
        roundtrip.compared(runs[-1], Path("roundtrip/pipeline"), Path("other.png"))


def test_a_first_stage_that_is_named_has_to_be_there(place, capfd):
    assert roundtrip.main(["--first-stage", "models/sd-vea"]) == 2
    assert "--first-stage models/sd-vea: no such folder" in capfd.readouterr().err
    assert not Path("models").exists()


def test_another_first_stage_is_not_ignored(place, capfd, monkeypatch):
    run = RunFolder(Path("logs/2026-01-01T00-00-00_roundtrip_first_stage"))
    run.make()
    run.config_file.touch()
    run.origin_file.write_text('{"source": "first"}')
    Path("second").mkdir()
    monkeypatch.setattr(roundtrip, "do", lambda *words: pytest.fail(f"{words} is not to be run"))
    assert roundtrip.main(["--first-stage", "second"]) == 2
    assert "was made of first, not of second" in capfd.readouterr().err


def test_a_step_that_fails_ends_it(place, capfd):
    (place / "roundtrip" / "first_stage").mkdir(parents=True)
    assert roundtrip.main([]) == 1
    assert "ended with 4" in capfd.readouterr().err
    assert not (place / "logs").exists() or not [*(place / "logs").iterdir()]
