"""Uploads, to a stand-in for the hub on this machine: what it gets, and what is said where it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.cli import export

pytest.importorskip("huggingface_hub")
pytest_plugins = ["tests.interop.hub_server"]
REPO = "somebody/model"


@pytest.fixture
def folder(runs, tmp_path, capsys) -> Path:
    out = tmp_path / "folder"
    assert export.main([str(runs.diffusion), "--to", "safetensors", "--out", str(out)]) == 0
    capsys.readouterr()
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_is_uploaded_whole_after_saying_who_will_see_it(runs, hub, tmp_path, capsys):
    out = tmp_path / "folder"
    words = [str(runs.diffusion), "--to", "safetensors", "--out", str(out), "--push", REPO]
    assert export.main(words) == 0
    said = capsys.readouterr().out
    assert said.index("EVERYONE can read it") < said.index(f"{hub.address}/{REPO}\n")
    assert "model.safetensors  " in said
    assert hub.files == contents(out)
    assert hub.private is False


def test_nothing_is_uploaded_unless_it_is_asked_for(folder, hub):
    assert hub.asked == []


def test_a_private_repository_is_one(folder, hub, capsys):
    assert export.main([str(folder), "--push", REPO, "--private"]) == 0
    assert hub.private is True
    assert "only you and those you let in" in capsys.readouterr().out


def test_a_public_repository_does_not_become_a_private_one_by_asking(folder, hub, capsys):
    hub.private = False
    assert export.main([str(folder), "--push", REPO, "--private"]) == 2
    assert "is there already, and public; nothing was uploaded" in capsys.readouterr().err
    assert hub.files == {}


@pytest.mark.parametrize(
    ("fails", "told"), [(401, "the hub answered 401 (not logged in"), (500, "500"), ("cut", "could")]
)
def test_a_failed_upload_is_one_message_loses_nothing_and_can_be_repeated(folder, hub, capsys, fails, told):
    before, hub.fails = contents(folder), fails
    assert export.main([str(folder), "--push", REPO]) == 6
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    assert said.count("\n") == 1
    assert told in said
    assert f"is whole and stays. Once that is solved: ldm export {folder} --push {REPO}" in said
    assert contents(folder) == before
    hub.fails = None
    assert export.main([str(folder), "--push", REPO]) == 0
    assert hub.files == before


def test_the_token_is_shown_to_the_hub_and_written_nowhere(folder, hub, tmp_path, capsys):
    hub.fails = 500
    assert export.main([str(folder), "--push", REPO]) == 6
    hub.fails = None
    assert export.main([str(folder), "--push", REPO]) == 0
    said = capsys.readouterr()
    assert {"Bearer hf_secret"} == {*hub.tokens}
    assert "hf_secret" not in said.out + said.err
    assert all(b"hf_secret" not in text for text in contents(tmp_path).values())


@pytest.mark.parametrize("repo", ["no spaces", "a/b/c", "--", "x/.."])
def test_an_impossible_name_is_refused_before_anything_is_loaded(runs, hub, tmp_path, capsys, repo):
    out = tmp_path / "folder"
    assert export.main([str(runs.diffusion), "--to", "safetensors", "--out", str(out), f"--push={repo}"]) == 2
    assert "cannot be the name of a repository" in capsys.readouterr().err
    assert not out.exists()
    assert hub.asked == []


def test_a_run_folder_is_not_uploaded_as_it_is(runs, hub, capsys):
    assert export.main([str(runs.diffusion), "--push", REPO]) == 2
    assert "is no exported folder" in capsys.readouterr().err
    assert hub.asked == []


def test_a_folder_with_a_readme_alone_is_not_uploaded(hub, tmp_path, capsys):
    """Such as a project with all its data."""
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "data.tar").write_text("mine, too")
    assert export.main([str(tmp_path), "--push", REPO]) == 2
    assert "is no exported folder" in capsys.readouterr().err
    assert hub.asked == []


def test_the_environment_names_another_hub(folder, hub):
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    code = f"import sys; from ldm.cli.export import main; sys.exit(main(['{folder}', '--push', '{REPO}']))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert hub.files == contents(folder)
