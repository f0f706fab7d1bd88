import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ldm.cli import cache
from ldm.latents.manifest import verify

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(runs, tmp_path, monkeypatch):
    """A configuration of 150 small pictures in two classes, in whose folder the test runs."""
    monkeypatch.chdir(tmp_path)
    for index in range(150):
        picture = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        path = tmp_path / "pictures" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    data = {
        "target": "ldm.latents.datamodule.LatentDataModule",
        "params": {
            "train": {"target": "ldm.data.sources.folder.ImageFolder", "params": {"root": "pictures"}},
            "autoencoder": str(runs.autoencoder),
            "batch_size": 4,
            "resolution": 8,
            "seed": "${seed}",
            "num_validation": 20,
        },
    }
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump({"seed": 0, "model": {"target": "torch.nn.Identity"}, "data": data})
    )
    return tmp_path / "base.yaml"


def test_builds_where_the_configuration_says_and_verifies(base, capsys):
    assert cache.main(["data.params.cache=here", "--base", str(base)]) == 0
    printed = capsys.readouterr().out
    assert "here/train: 130 items of (4, 2, 2), 0 broken" in printed
    assert "here/validation: 20 items" in printed
    assert cache.main(["--verify", "here/train", "here/validation"]) == 0
    assert "here/train: sound, 130 items" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["data.params.cache=taken"], ["data.params.cache=taken/deeper"], []])
def test_a_file_in_the_place_of_the_cache(base, capsys, words):
    Path("taken").touch()
    Path("cache").touch()  # where it lies when nothing is said
    assert cache.main(["--base", str(base), *words]) == 6
    assert "cannot build a latent cache there: Not a directory" in capsys.readouterr().err


def test_verify_looks_at_every_folder_and_ends_with_code_3(base, capsys):
    assert cache.main(["--base", str(base), "data.params.cache=here"]) == 0
    shard = Path("here/train/shard-00001.bin")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    capsys.readouterr()
    assert cache.main(["--verify", "here/train", "here/none", "here/validation"]) == 3
    out, err = capsys.readouterr()
    assert "error: here/train/shard-00001.bin: damaged: crc32: expected" in err
    assert "error: here/none/manifest.json: no such file" in err
    assert "here/validation: sound" in out


def test_a_stage_1_configuration_is_refused(base, capsys):
    tree = yaml.safe_load(base.read_text())
    tree["data"]["target"] = "ldm.data.datamodule.ImageDataModule"
    del tree["data"]["params"]["autoencoder"]
    base.write_text(yaml.safe_dump(tree))
    capsys.readouterr()
    assert cache.main(["--base", str(base)]) == 2
    assert "data.target: expected ldm.latents.datamodule.LatentDataModule, found" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--base", "x.yaml", "--verify", "y"], ["--bose", "x"], ["--base", "none.yaml"]])
def test_wrong_use_is_one_clear_line(words, capsys):
    assert cache.main(words) == 2
    assert capsys.readouterr().err.startswith("error: ")


def run(base: Path, rank: int, world: int, cache: str) -> subprocess.Popen:
    environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["scripts/cache_latents.py", "--base", str(base), f"data.params.cache={base.parent / cache}"]
    words.append(f"data.params.train.params.root={base.parent / 'pictures'}")
    return subprocess.Popen([sys.executable, *words], env=environment, cwd=ROOT)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "claims"}


@pytest.mark.slow
def test_two_ranks_build_the_same_bytes_as_one(base):
    for name, world in (("one", 1), ("two", 2)):
        processes = [run(base, rank, world, name) for rank in range(world)]
        assert [process.wait() for process in processes] == [0] * world
    for part in ("train", "validation"):
        one, two = (content(base.parent / name / part) for name in ("one", "two"))
        assert one == two
        verify(base.parent / "two" / part)
