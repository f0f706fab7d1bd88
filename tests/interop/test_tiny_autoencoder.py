"""TAESD: from either file, their folder or diffusers', and what does not fit."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from ldm.autoencoder.codec import Codec
from ldm.errors import CheckpointError, ConfigError
from ldm.interop import sources
from ldm.interop.convert import convert, recognized
from ldm.interop.models import Request
from ldm.interop.sources import Source
from ldm.interop.tables import to_theirs
from ldm.interop.tiny_autoencoder import FAMILY, table
from tests.interop import foreign

INVENTORIES = Path(__file__).parent / "inventories"


def run_of(path: Path, logs: Path) -> Path:
    (line,) = convert(path, Request(), config=None, license=None, name=None, logdir=logs)
    assert "(TAESD; license: unknown)" in line
    return next(logs.iterdir())


@pytest.mark.parametrize(("name", "channels"), [("taesd", 4), ("taef1", 16)])
def test_published_files_fit_and_go_out_again(name, channels):
    shapes = json.loads(gzip.decompress((INVENTORIES / f"first_stage_{name}.json.gz").read_bytes()))
    source = Source(Path(f"{name}_encoder.pth"), {key: torch.empty(one, device="meta") for key, one in shapes.items()})
    assert recognized(source) is FAMILY
    (converted,) = FAMILY.convert(source, Request())
    assert converted.name == name
    assert converted.params["encoder"]["params"]["latent_channels"] == channels
    assert converted.statistics == {"mean": [0.0] * channels, "std": [1.0] * channels}
    own = {key: one for key, one in converted.weights.items() if not key.startswith("loss.")}
    assert {key: [*one.shape] for key, one in to_theirs(table(converted.params), own).items()} == shapes


@pytest.mark.parametrize("given", ["taesd_encoder.pth", "taesd_decoder.pth", "."])
def test_either_file_or_their_folder(given, tmp_path):
    tensors = foreign.tiny(tmp_path)
    source = sources.read(tmp_path / given)
    assert source.tensors.keys() == tensors.keys()
    assert all(torch.equal(source.tensors[key], one) for key, one in tensors.items())
    assert [*source.sha256] == ["taesd_encoder.pth", "taesd_decoder.pth"]
    (converted,) = FAMILY.convert(source, Request())
    own = {key: one for key, one in converted.weights.items() if not key.startswith("loss.")}
    back = to_theirs(table(converted.params), own)
    assert all(torch.equal(back[key], one) for key, one in tensors.items())


def test_a_folder_of_diffusers_is_the_same_run(tmp_path):
    foreign.tiny(tmp_path)
    codec = Codec.load(run_of(tmp_path, tmp_path / "logs"))
    model = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1),
    ).eval()
    weights = {f"encoder.{name}": one for name, one in codec.encoder.state_dict().items()}
    weights |= {f"decoder.{name}": one for name, one in codec.decoder.state_dict().items()}
    model.load_state_dict(to_theirs(table(codec.config, diffusers=True), weights))
    model.save_pretrained(tmp_path / "theirs")
    again = Codec.load(run_of(tmp_path / "theirs", tmp_path / "logs2"))
    assert again.weight_hash() == codec.weight_hash()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = model.encode(images).latents
        torch.testing.assert_close(again.encode(images)[0], latents)
        torch.testing.assert_close(again.decode(latents), model.decode(latents).sample.clamp(-1, 1))


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_one_half_alone_names_what_is_missing(half, tmp_path):
    foreign.tiny(tmp_path)
    (tmp_path / f"taesd_{half}.pth").rename(tmp_path / "alone.pth")
    with pytest.raises(CheckpointError, match=r"one half of an autoencoder\. Expected both files in one folder"):
        run_of(tmp_path / "alone.pth", tmp_path / "logs")


def test_several_pairs_in_a_folder_must_be_named(tmp_path):
    foreign.tiny(tmp_path)
    foreign.tiny(tmp_path, "taef1", 16)
    with pytest.raises(CheckpointError, match=r"several models \(taef1_encoder\.pth, taesd_encoder\.pth\)"):
        sources.read(tmp_path)
    assert Codec.load(run_of(tmp_path / "taef1_encoder.pth", tmp_path / "logs")).encoder.latent_channels == 16


def test_a_larger_kin_is_refused_by_name(tmp_path):
    """taef2 has a pooled branch in its blocks."""
    foreign.tiny(tmp_path)
    encoder = torch.load(tmp_path / "taesd_encoder.pth") | {"3.pool.0.weight": torch.zeros(32, 8, 1, 1)}
    torch.save(encoder, tmp_path / "taesd_encoder.pth")
    with pytest.raises(CheckpointError, match=r"in no place of this model \(1\):\n    encoder\.3\.pool\.0\.weight"):
        run_of(tmp_path, tmp_path / "logs")
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("said", [{"scaling_factor": 0}, {"scaling_factor": "x"}, {"shift_factor": [1]}])
def test_a_scale_that_makes_no_sense_is_named(said, tmp_path):
    foreign.tiny(tmp_path)
    (tmp_path / "own.json").write_text(json.dumps(said))
    source = sources.read(tmp_path / "taesd_encoder.pth", tmp_path / "own.json")
    with pytest.raises(ConfigError, match=f"{next(iter(said))}: expected a number"):
        FAMILY.convert(source, Request())
