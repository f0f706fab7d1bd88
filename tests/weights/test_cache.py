"""Finding files of weights: every place, every way in which a file can be missing or be another one."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.errors import CheckpointError
from ldm.weights import cache
from ldm.weights.catalog import FILES

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No file in any cache."""
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path / "own"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path


@pytest.fixture
def known(monkeypatch):
    """known(name, sha256): from now on the file of that name has that hash."""

    def known(name: str, sha256: str = SHA256) -> None:
        monkeypatch.setitem(FILES, name, replace(FILES[name], sha256=sha256))

    return known


def write(path: Path, content: bytes = CONTENT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def hugging_face(root: Path, repository: str, *names: str) -> Path:
    """A model as the hub's client leaves it; the folder of its files."""
    model = root / f"models--{repository.replace('/', '--')}"
    snapshot = model / "snapshots" / "abc123"
    write(model / "refs" / "main", b"abc123")
    for name in names:
        write(snapshot / name)
    return snapshot


def test_the_folder_follows_the_environment(monkeypatch):
    monkeypatch.delenv("LDM_WEIGHTS", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.folder() == Path("/home/me/.cache/ldm/weights")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache.folder() == Path("/caches/ldm/weights")
    monkeypatch.setenv("LDM_WEIGHTS", "~/mine")
    assert cache.folder() == Path("/home/me/mine")


def test_own_cache_goes_before_torch_hub_s(nowhere, known):
    known("alexnet")
    hub = write(nowhere / "hub" / "checkpoints" / FILES["alexnet"].file)
    assert cache.find("alexnet") == hub
    own = write(nowhere / "own" / FILES["alexnet"].file)
    assert cache.find("alexnet") == own


def test_hugging_face_s_cache_is_looked_into_and_a_model_without_its_config_is_none(nowhere):
    snapshot = hugging_face(nowhere / "hf", "facebook/dinov2-base", "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors and config\.json of dinov2-base"):
        cache.find("dinov2-base")
    write(snapshot / "config.json")
    assert cache.find("dinov2-base") == snapshot / "model.safetensors"


def test_a_path_may_be_given_as_file_or_folder(nowhere, known, monkeypatch):
    known("inception-2015")
    file = write(nowhere / "any" / "name.pth")
    assert cache.find("inception-2015", file) == file
    monkeypatch.setenv("HOME", str(nowhere))
    assert cache.find("inception-2015", "~/any/name.pth") == file
    folder = hugging_face(nowhere, "some/where", "model.safetensors", "config.json")
    assert cache.find("dinov2-large", folder) == folder / "model.safetensors"


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_one_message_with_all_that_it_takes(name, nowhere):
    entry = FILES[name]
    with pytest.raises(CheckpointError) as error:
        cache.find(name)
    message = str(error.value)
    place = nowhere / "own" / entry.file
    for part in (str(place), str(entry.source), entry.sha256 or "sha256 not known"):
        assert part in message
    assert entry.source.command(name, place) in message
    assert not (nowhere / "own").exists()
    with pytest.raises(CheckpointError, match="given/file"):
        cache.find(name, "given/file")


@pytest.mark.parametrize("given", [False, True])
def test_another_file_in_its_place_is_named_with_both_hashes(given, nowhere, known):
    known("inception-2015")
    path = write(nowhere / "own" / FILES["inception-2015"].file, b"something else")
    with pytest.raises(CheckpointError) as error:
        cache.find("inception-2015", path if given else None)
    other = hashlib.sha256(b"something else").hexdigest()
    for part in (str(path), SHA256, other, "curl -L"):
        assert part in str(error.value)


def test_first_digits_are_compared_where_no_more_is_known(nowhere, known):
    path = write(nowhere / "own" / FILES["alexnet"].file)
    known("alexnet", SHA256[:8])
    assert cache.find("alexnet") == path
    known("alexnet", "01234567")
    with pytest.raises(CheckpointError, match="expected sha256 01234567, found"):
        cache.find("alexnet")


def test_any_of_several_files_will_do_and_all_are_named_where_there_is_none(nowhere, known):
    names = ("vgg16", "lpips-vgg16")
    with pytest.raises(CheckpointError) as error:
        cache.find_any(names)
    assert all(FILES[name].file in str(error.value) for name in names)
    known("lpips-vgg16")
    second = write(nowhere / "own" / FILES["lpips-vgg16"].file)
    assert cache.find_any(names) == second


def test_a_hash_is_computed_once_until_the_file_changes(nowhere, monkeypatch):
    counted = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: counted.append(file.name) or digest(file, kind))
    path = write(nowhere / "file")
    assert [cache.sha256(path) for _ in range(3)] == [SHA256] * 3
    assert len(counted) == 1
    before = path.stat()
    write(path, b"WEIGHTS")  # of the same size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert cache.sha256(path) == hashlib.sha256(b"WEIGHTS").hexdigest()
    other = write(nowhere / "other")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)  # of the same size and time
    assert cache.sha256(path) == SHA256
    assert len(counted) == 3


@pytest.mark.parametrize("index", [b"", b"[]", b"{", b'{"x": 1}', b'{"FILE": []}', b'{"FILE": null}', b"\xff"])
def test_a_damaged_index_is_ignored(index, nowhere):
    path = write(nowhere / "file")
    write(nowhere / "own" / "sha256.json", index.replace(b"FILE", str(path).encode()))
    assert cache.sha256(path) == SHA256
    assert cache.sha256(path) == SHA256


def test_an_index_that_cannot_be_written_costs_time_alone(nowhere, monkeypatch):
    write(nowhere / "occupied")
    monkeypatch.setenv("LDM_WEIGHTS", str(nowhere / "occupied" / "below"))
    path = write(nowhere / "file")
    assert cache.sha256(path) == SHA256


def test_the_index_keeps_what_it_knows_of_other_files(nowhere):
    first, second = write(nowhere / "first"), write(nowhere / "second", b"2")
    cache.sha256(first)
    cache.sha256(second)
    assert set(json.loads((nowhere / "own" / "sha256.json").read_text())) == {str(first), str(second)}


def test_reads_both_kinds_of_file(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    torch.save(tensors, tmp_path / "w.pth")
    save_file(tensors, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        assert torch.equal(cache.read(tmp_path / name)["a"], tensors["a"])
        whole = (tmp_path / name).read_bytes()
        write(tmp_path / name, whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match=name):
            cache.read(tmp_path / name)
