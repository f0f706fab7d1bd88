"""Both stages on tars, local and behind URLs, are the runs that the folder with the same pictures gives."""

from pathlib import Path

import pytest

import main
from ldm.config.load import to_yaml
from ldm.data.sources.folder import ImageFolder
from ldm.training.metrics_table import read_metrics
from tests.conftest import node
from tests.tars import served, write_tar

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

SHORT = {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tars(here, image_folder) -> Path:
    """The pictures of the folder in its order, in three tars."""
    folder = ImageFolder(image_folder)
    for shard in range(3):
        files = {}
        for row in range(7 * shard, min(7 * shard + 7, len(folder))):
            files[f"{row:03}.png"] = Path(folder.path(row)).read_bytes()
            files[f"{row:03}.cls"] = folder.class_names[folder.class_labels()[row]].encode()
        write_tar(here / "tars" / f"{shard}.tar", files)
    return here / "tars"


def losses(tree, name: str, dataset, *words: str) -> list[dict[str, str]]:
    """What a run of 4 steps logs, which is interrupted after 2 for the data set in question."""
    tree["name"] = name
    tree["data"]["params"]["train"] = dataset
    tree["lightning"]["trainer"] |= SHORT
    Path(f"{name}.yaml").write_text(to_yaml(tree))
    assert main.main(["--base", f"{name}.yaml", "lightning.trainer.max_steps=2", *words]) == 0
    (folder,) = Path("logs").glob(f"*_{name}")
    assert main.main(["-r", str(folder), "lightning.trainer.max_steps=4"]) == 0
    rows = read_metrics(folder / "metrics.csv")
    kept = [{key: value for key, value in row.items() if "loss" in key or key == "step"} for row in rows]
    assert len(kept) >= 4
    return kept


def test_stage_1_on_tars(autoencoder_tree, image_folder, tars):
    folder = node("ldm.data.sources.folder.ImageFolder", root=str(image_folder))
    tar = node("ldm.data.sources.webdataset.WebDataset", shards=f"{tars}/{{0..2}}.tar")
    expected = losses(autoencoder_tree, "of_folder", folder)
    assert losses(autoencoder_tree, "of_tars", tar, "data.params.num_workers=2") == expected


def test_stage_2_on_tars_behind_a_server(diffusion_tree, image_folder, tars, runs):
    data = diffusion_tree["data"]["params"]
    data |= {"autoencoder": str(runs.autoencoder), "resolution": 16}
    with served() as server:
        server.files = {tar.name: tar.read_bytes() for tar in tars.glob("*.tar")}
        size = sum(map(len, server.files.values()))
        folder = node("ldm.data.sources.folder.ImageFolder", root=str(image_folder))
        expected = losses(diffusion_tree, "of_folder", folder)
        store = node("ldm.data.sources.remote.Store", folder="store", max_bytes=size - 1)
        tar = node("ldm.data.sources.webdataset.WebDataset", shards=server.url("{0..2}.tar"), store=store)
        assert losses(diffusion_tree, "of_ranges", tar) == expected


def test_a_damaged_tar_ends_with_one_message(autoencoder_tree, tars, capsys):
    whole = (tars / "1.tar").read_bytes()
    (tars / "1.tar").write_bytes(whole[: len(whole) // 4 // 512 * 512])
    autoencoder_tree["data"]["params"]["train"] = node(
        "ldm.data.sources.webdataset.WebDataset", shards=f"{tars}/{{0..2}}.tar"
    )
    Path("config.yaml").write_text(to_yaml(autoencoder_tree))
    assert main.main(["--base", "config.yaml"]) == 3
    said = capsys.readouterr().err
    assert "1.tar: byte " in said
    assert "Traceback" not in said
    assert not [*Path("logs").glob("*")]
