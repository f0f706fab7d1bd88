"""`make roundtrip`: from a folder of diffusers through both trainings back to one, with the same pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.errors import NumericError
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


def test_a_step_that_fails_ends_it(place, capfd):
    (place / "roundtrip" / "first_stage").mkdir(parents=True)
    assert roundtrip.main([]) == 1
    assert "ended with 4" in capfd.readouterr().err
    assert not (place / "logs").exists() or not [*(place / "logs").iterdir()]
