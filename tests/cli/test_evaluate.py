"""`ldm evaluate`: real runs of both stages, folders and arrays, killed, shared; every bad input in one message."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import main
from ldm.autoencoder.codec import Codec
from ldm.checkpoints import store
from ldm.cli import evaluate
from ldm.cli.evaluate_run import hours
from ldm.config.load import to_yaml
from ldm.diffusion.conditioners.classes import ClassVector
from ldm.evaluation import feature_store
from ldm.evaluation.features.classifier import save as save_classifier
from ldm.evaluation.features.classifier import train_classifier
from ldm.evaluation.pictures import configured
from ldm.evaluation.pictures.stored import opened
from ldm.evaluation.record import Record
from tests.evaluation.spaces import Projection

FID = "inception-2015/tf1-299"
QUICK = ("--steps", "2", "-n", "40", "--features", FID)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder to work in, and feature spaces that need no weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    own = evaluate.choose

    def choose(name, device):
        return own(name, device=device) if name.startswith("classifier:") else Projection(name)

    monkeypatch.setattr(evaluate, "choose", choose)


def draw(folder: Path, number: int, seed: int, side: int = 16, mode: str = "RGB") -> Path:
    """Pictures of coarse noise in three class folders."""
    random = np.random.default_rng(seed)
    for index in range(number):
        (folder / "abc"[index % 3]).mkdir(exist_ok=True, parents=True)
        pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(side // 4, axis=0).repeat(side // 4, axis=1)
        Image.fromarray(pixels).convert(mode).save(folder / "abc"[index % 3] / f"{index}.png")
    return folder


@pytest.fixture
def pictures(tmp_path):
    return draw(tmp_path / "pictures", 60, 3)


@pytest.fixture
def trained(tmp_path, autoencoder_tree, diffusion_tree) -> tuple[Path, Path]:
    """The run folders of both stages, each after four steps."""
    for tree in (autoencoder_tree, diffusion_tree):
        tree["data"]["params"]["num_validation"] = 8
        tree["lightning"]["trainer"] |= {"max_steps": 4, "log_every_n_steps": 1}
        (tmp_path / "tree.yaml").write_text(to_yaml(tree))
        assert main.main(["--base", "tree.yaml"]) == 0
    first, second = sorted(path for path in (tmp_path / "logs").iterdir())
    return first, second


def run(*words: Any, out: str = "here.json") -> Record:
    assert evaluate.main([*map(str, words), "--out", out]) == 0
    return Record.read(Path(out))


def numbers(record: Record) -> dict[str, float]:
    return {one.metric: one.value for one in record.values}


def equal(a: Record, b: Record) -> bool:
    """To 1e-9 relative."""
    ours, theirs = numbers(a), numbers(b)
    return ours.keys() == theirs.keys() and all(ours[key] == pytest.approx(theirs[key], rel=1e-9) for key in ours)


# ---- what is measured ----


def test_samples_against_a_folder(runs, pictures, capsys):
    record = run("-r", runs.diffusion, "--against", pictures, *QUICK, "--guidance", "1.5")
    found = {"FID", "sFID", "Inception Score", "KID", "Precision", "Recall", "Density", "Coverage"}
    assert found <= {*numbers(record)}
    printed = capsys.readouterr().out
    assert "| FID ↓" in printed
    assert "here.json" in printed
    protocol = record.protocol
    assert (protocol["images"], protocol["labels"], protocol["first seed"]) == (40, "balanced", 0)
    assert (protocol["sampler"], protocol["steps"], protocol["schedule"]) == ("ddim", 2, "default")
    assert (protocol["guidance"], protocol["weights"]) == (1.5, "ema")
    assert protocol["features"] == [{"name": FID, "weights": Projection().weights}]
    assert record.subject["training"]["step"] == 7
    assert record.machine["device"] == "cpu"
    assert {"python", "torch", "numpy"} <= {*record.versions}
    assert Image.open(record.sheets["pictures"]).size[0] > 100
    assert Image.open(record.sheets["nearest"]).size[0] > 100


def test_a_stage_2_run_is_compared_with_what_it_was_trained_on(trained, capsys):
    words = ["-r", str(trained[1]), "--steps", "2", "-n", "20", "--features", FID]
    assert evaluate.main(words) == 0, capsys.readouterr().err
    (file,) = (trained[1] / "evaluation").glob("*.json")
    assert file.name.startswith("step4-ema-ddim2-guidance1-balanced-20-")
    record = Record.read(file)
    assert record.protocol["reference"]["name"] == "its own data (train)"
    assert "FDr" in numbers(record)  # the validation part is held out
    assert "nearer than held-out" in numbers(record)
    training = record.subject["training"]
    assert training["images_seen"] == 24
    assert training["hours"] > 0
    assert record.protocol["average"]["target"].endswith("FixedDecay")


def test_samples_that_items_ask_for_are_looked_for_among_them(trained, pictures, capsys):
    words = ["-r", trained[1], "--steps", "2", "--features", FID, "--labels", "items"]
    record = run(*words, "-n", "24", "--metrics", "retrieval", "fd")
    found = {value.metric: value for value in record.values}
    assert {*found} == {"FID", "Retrieval@1", "Retrieval@10", "Retrieval median rank"}
    assert 0 <= found["Retrieval@1"].value <= found["Retrieval@10"].value <= 1
    assert 0 <= found["Retrieval@10"].settings["with shuffled captions"] <= 1
    assert record.protocol["labels"].startswith("items ")
    assert "retrieval" not in (again := run(*words, "-n", "24", "--against", pictures)).protocol
    assert "Retrieval@1" not in numbers(again)
    for refused, message in {
        ("--labels", "balanced"): "add --labels items",
        ("--against", str(pictures)): "leave out --against",
        ("--reference-images", "9"): "leave out --reference-images",
    }.items():
        assert evaluate.main([*map(str, words), "--metrics", "retrieval", *refused]) == 2
        assert message in capsys.readouterr().err


def test_a_stage_1_run(trained):
    found = numbers(run("-r", trained[0], "--features", FID))
    assert {"rFID", "PSNR", "SSIM", "latent std", "KL, nats an element", "dead latent channels"} <= {*found}
    record = Record.read(Path("here.json"))
    assert record.protocol["images"] == 8
    assert record.protocol["part"] == "validation"
    assert "PSNR" not in numbers(run("-r", trained[0], "--features", FID, "--metrics", "fd", "--part", "train"))
    assert any(note.startswith("LPIPS: left out") for note in record.notes)  # 16 pixels


def test_psnr_is_the_mean_over_pictures_of_the_posteriors_mean(trained):
    record = run("-r", trained[0], "--features", FID)
    codec = Codec.load(trained[0])
    config = store.record(Path(record.subject["training"]["checkpoint"]))["config"]
    originals = configured.of_data(config["data"], (), "validation", "").pictures.pixels(range(8))
    errors = (codec.decode(codec.encode(originals)[0]) - originals).square().flatten(1).mean(1).double()
    psnr = 10 * torch.log10(4 / errors)
    assert record.value("PSNR").value == pytest.approx(psnr.mean().item(), rel=1e-6)
    assert record.value("PSNR").error == pytest.approx(psnr.std().item() / 8**0.5, rel=1e-4)


def test_folders_and_arrays(pictures, tmp_path):
    draw(tmp_path / "others", 30, 4)
    by_folder = run("others", "--against", pictures, "--features", FID)
    images = opened(tmp_path / "others").images(range(30)).permute(0, 2, 3, 1).numpy()
    np.savez("others.npz", arr_0=images)
    by_array = run("others.npz", "--against", pictures, "--features", FID)
    assert equal(by_folder, by_array)


def test_the_order_of_files_changes_nothing(pictures, tmp_path):
    arrays = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    np.savez("one.npz", arr_0=arrays)
    np.savez("two.npz", arr_0=arrays[np.random.default_rng(1).permutation(40)])
    one, two = (run(f"{name}.npz", "--against", pictures, "--features", FID) for name in ("one", "two"))
    assert equal(one, two)


def test_a_configuration_as_reference(runs, pictures, autoencoder_tree, tmp_path):
    (tmp_path / "tree.yaml").write_text(to_yaml(autoencoder_tree))
    words = ["-r", runs.diffusion, *QUICK, "--against", "tree.yaml"]
    root = f"data.params.train.params.root={pictures}"
    record = run(*words, root, "data.params.num_validation=10")
    assert record.protocol["reference"]["name"] == "tree.yaml (train)"
    assert record.value("FID").settings["reference images"] == 50
    assert "FDr" in numbers(record)
    whole = run(*words, root, "data.params.num_validation=0")
    assert whole.value("FID").settings["reference images"] == 60
    assert "FDr" not in numbers(whole)
    folder = run("-r", runs.diffusion, *QUICK, "--against", pictures)
    assert numbers(folder)["FID"] == pytest.approx(numbers(whole)["FID"], rel=1e-9)


def test_statistics_are_saved_and_used(runs, pictures, capsys):
    words = ["-r", runs.diffusion, *QUICK]
    whole = run(*words, "--against", pictures, "--save-reference", "reference.npz")
    with np.load("reference.npz") as saved:
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= {*saved}
    record = run(*words, "--against", "reference.npz")
    for metric in ("FID", "sFID"):
        assert numbers(record)[metric] == pytest.approx(numbers(whole)[metric], rel=1e-9)
    assert "KID" not in numbers(record)
    assert "kid, precision, recall, density, coverage: left out" in capsys.readouterr().out


def test_pictures_beside_statistics_are_what_needs_pictures_is_computed_of(runs, pictures):
    """As in ADM's reference files: mean and covariance of all pictures, and a part of these."""
    words = ["-r", runs.diffusion, *QUICK]
    whole = run(*words, "--against", pictures, "--save-reference", "statistics.npz")
    some = opened(pictures).images(range(30)).permute(0, 2, 3, 1).numpy()
    np.savez("some.npz", arr_0=some)
    with np.load("statistics.npz") as saved:
        np.savez("both.npz", arr_0=some, **{key: saved[key] for key in ("mu", "sigma", "mu_s", "sigma_s")})
    part, both = run(*words, "--against", "some.npz"), run(*words, "--against", "both.npz")
    for metric in ("FID", "sFID"):
        assert numbers(both)[metric] == pytest.approx(numbers(whole)[metric], rel=1e-9)
    for metric in ("KID", "Precision", "Recall", "Density", "Coverage", "distance to nearest"):
        assert numbers(both)[metric] == pytest.approx(numbers(part)[metric], rel=1e-9)
    assert any("nearest: 30 of an unknown number of pictures" in note for note in both.notes)
    assert Image.open(both.sheets["nearest"]).size[0] > 100


def test_agreement_with_a_classifier(runs, pictures):
    images = torch.randint(0, 256, (300, 3, 16, 16), dtype=torch.uint8)
    save_classifier(train_classifier(images, torch.arange(300) % 3, 3, epochs=1), 16, Path("classifier.safetensors"))
    record = run("-r", runs.diffusion, "--against", pictures, *QUICK, "--classifier", "classifier.safetensors")
    agreement = record.value("agreement with the class")
    assert 0 <= agreement.value <= 1
    assert agreement.features.startswith("classifier/")


def test_other_metrics_of_the_same_pictures_are_added_to_the_record(runs, pictures, capsys):
    words = ["-r", runs.diffusion, "--against", pictures, *QUICK]
    first = run(*words, "--metrics", "fd", "nearest")
    second = run(*words, "--metrics", "kid")
    assert [*numbers(second)] == [*numbers(first), "KID"]
    assert second.value("FID") == first.value("FID")
    assert {*second.sheets} == {"pictures", "nearest"}
    assert "still holds 2 other values" in capsys.readouterr().out
    assert numbers(run(*words, "--metrics", "kid", "fd")) == numbers(second)  # measured again, and there once


def test_a_record_of_other_pictures_is_replaced(pictures, tmp_path, capsys):
    draw(tmp_path / "others", 30, 4)
    words = ["others", "--against", pictures, "--features", FID, "--metrics"]
    run(*words, "fd")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "others" / "a" / "0.png")
    capsys.readouterr()
    assert [*numbers(run(*words, "kid"))] == ["KID"]
    assert "here.json: replaced, since what was there is of other pictures" in capsys.readouterr().out


# ---- exact, resumable, shared ----


def test_batches_and_ranks_change_nothing(runs, pictures, forked, monkeypatch):
    """Of features that do not depend on their batch: the pictures come from an array."""
    monkeypatch.setattr(feature_store, "BLOCK", 16)
    np.savez("samples.npz", arr_0=np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8))
    words = ["samples.npz", "--against", str(pictures), "--features", FID]
    alone = run(*words)
    Path("cache").rename("cache64")
    small = run(*words, "--batch-size", "7", out="small.json")
    Path("cache").rename("cache7")
    codes = forked(2, lambda rank: evaluate.main([*words, "--batch-size", "7", "--out", "ranks.json"]))
    assert codes == [0, 0]
    assert equal(alone, small)
    assert equal(alone, Record.read(Path("ranks.json")))


def test_samples_of_two_ranks_are_those_of_one(runs, pictures, forked, monkeypatch):
    """A batch has the same pictures in both: not a bit differs."""
    monkeypatch.setattr(feature_store, "BLOCK", 8)
    words = ["-r", str(runs.diffusion), "--against", str(pictures), *QUICK]
    alone = run(*words)
    Path("cache").rename("cache1")
    assert forked(2, lambda rank: evaluate.main([*words, "--out", "ranks.json"])) == [0, 0]
    assert equal(alone, Record.read(Path("ranks.json")))


def test_killed_in_the_middle_it_goes_on(runs, pictures, monkeypatch):
    monkeypatch.setattr(feature_store, "BLOCK", 8)
    words = ["-r", str(runs.diffusion), "--against", str(pictures), *QUICK]
    whole = run(*words)
    Path("cache").rename("cache1")
    child = os.fork()
    if child == 0:
        os._exit(evaluate.main([*words, "--out", "never.json"]))
    of_samples = 8 + 2
    while len([*Path("cache").rglob("0*.npy")]) < of_samples:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not Path("never.json").exists()
    made = len([*Path("cache").rglob("0*.npy")])
    assert made < 8 + 5
    assert equal(whole, run(*words))


def test_more_samples_are_added_to_those_there(runs, pictures, monkeypatch):
    monkeypatch.setattr(feature_store, "BLOCK", 8)
    words = ["-r", runs.diffusion, "--against", pictures, "--steps", "2", "--features", FID]
    run(*words, "-n", "16")
    before = {file: file.stat().st_mtime_ns for file in Path("cache").rglob("0*.npy")}
    run(*words, "-n", "24")
    after = {file: file.stat().st_mtime_ns for file in Path("cache").rglob("0*.npy")}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1


def test_a_reference_that_has_changed_is_computed_anew(runs, pictures):
    words = ["-r", runs.diffusion, "--against", pictures, *QUICK]
    before = run(*words)
    Image.new("RGB", (16, 16), "red").save(pictures / "a" / "0.png")
    after = run(*words)
    assert before.protocol["reference"]["identity"] != after.protocol["reference"]["identity"]
    assert numbers(before)["FID"] != numbers(after)["FID"]


# ---- side by side ----


def test_runs_side_by_side(runs, make_runs, pictures, capsys):
    """Two models that differ, by the same protocol; then by one with other steps."""
    others = make_runs()
    for one, words in {
        "a": [runs.diffusion],
        "b": [runs.diffusion, "--raw"],
        "c": [others.diffusion, "--steps", "3"],
    }.items():
        run("-r", words[0], "--against", pictures, *QUICK, *words[1:], out=f"{one}.json")
    capsys.readouterr()
    assert evaluate.main(["compare", "a.json", "b.json"]) == 0
    printed = capsys.readouterr().out
    assert "| weights" in printed  # which hinders nothing
    assert "No winner" not in printed
    assert Image.open("comparison.png").size[0] > 500
    assert Image.open("comparison.pictures.png").size[0] > 500
    assert evaluate.main(["compare", "a.json", "b.json", "c.json", "--out", "three"]) == 0
    assert "The samples were made differently (steps): that may be why one is better." in capsys.readouterr().out
    assert Path("three.png").is_file()


def test_another_precision_is_another_protocol(runs, trained, pictures, capsys):
    half = ["--precision", "bf16-mixed"]
    words = ["-r", runs.diffusion, "--against", pictures, *QUICK]
    plain, found = run(*words, out="a.json"), run(*words, *half, out="b.json")
    assert plain.protocol.keys() == found.protocol.keys() - {"precision"}
    assert found.protocol["precision"] == "bf16-mixed"
    assert plain.subject["pictures"] != found.subject["pictures"]
    assert plain.machine["precision"] == "float32"
    assert found.machine["precision"] == "float32 (of samples bf16-mixed)"
    assert not equal(plain, found)
    capsys.readouterr()
    assert evaluate.main(["compare", "a.json", "b.json"]) == 0
    printed = capsys.readouterr().out
    assert "The samples were made differently (precision): that may be why one is better." in printed
    assert "| precision" in printed
    # Reconstructions are decoded in it; their latents are the same.
    words = ["-r", trained[0], "--features", FID]
    plain, found = run(*words, out="c.json"), run(*words, *half, out="d.json")
    assert (plain.protocol.get("precision"), found.protocol["precision"]) == (None, "bf16-mixed")
    assert plain.value("latent std").value == found.value("latent std").value
    assert plain.value("PSNR").value != found.value("PSNR").value
    assert found.value("PSNR").value == pytest.approx(plain.value("PSNR").value, rel=0.01)


def test_another_decoder_is_another_protocol(runs, pictures, tuned_autoencoder):
    words = ["-r", runs.diffusion, "--against", pictures, *QUICK]
    plain, found = run(*words, out="a.json"), run(*words, "--autoencoder", tuned_autoencoder, out="b.json")
    assert plain.protocol.keys() == found.protocol.keys() - {"autoencoder"}
    assert len(found.protocol["autoencoder"]) == 16
    assert plain.subject["pictures"] != found.subject["pictures"]


def test_what_cannot_be_compared_is_one_message(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    for words, code, message in (
        (["x.json", "x.json"], 3, "x.json: is not a record"),
        (["nowhere", "nowhere"], 3, "nowhere: has no records to compare; make one"),
        ([], 2, "compare --help"),
    ):
        assert evaluate.main(["compare", *words]) == code
        assert message in capsys.readouterr().err
    assert not Path("comparison.png").exists()


# ---- bad input ----


def refused(capsys, *words: Any, code: int) -> str:
    """The message; nothing is written."""
    capsys.readouterr()
    assert evaluate.main([*map(str, words), "--out", "never/never.json"]) == code
    printed = capsys.readouterr()
    assert printed.out.strip() == ""
    assert printed.err.count("error:") == 1
    assert not Path("never").exists()
    return printed.err


def test_pictures_of_another_size(runs, pictures, tmp_path, capsys):
    large = draw(tmp_path / "large", 30, 4, side=32)
    message = refused(capsys, "-r", runs.diffusion, *QUICK, "--against", large, code=3)
    assert "the pictures have 16 x 16 pixels" in message
    assert "32 x 32: compare pictures of one size; --resolution" in message
    run("-r", runs.diffusion, *QUICK, "--against", large, "--resolution", "16")
    assert "32 x 32" in refused(capsys, large, "--against", pictures, "--features", FID, code=3)


def test_a_truncated_array(pictures, capsys):
    np.savez("samples.npz", arr_0=np.zeros((30, 16, 16, 3), np.uint8))
    content = Path("samples.npz").read_bytes()
    Path("samples.npz").write_bytes(content[: len(content) // 2])
    assert "cannot be read as an .npz" in refused(capsys, "samples.npz", "--against", pictures, code=3)
    assert "cannot be read as an .npz" in refused(capsys, pictures, "--against", "samples.npz", code=3)


def test_pictures_that_are_not_finite(pictures, capsys):
    np.savez("samples.npz", arr_0=np.full((30, 16, 16, 3), np.nan, np.float32))
    message = refused(capsys, "samples.npz", "--against", pictures, code=3)
    assert "of uint8, 0 to 255; found arr_0 (30, 16, 16, 3) of float32, some of which are not finite" in message


def test_a_model_whose_samples_are_not_finite(runs, pictures, capsys, monkeypatch):
    monkeypatch.setattr(Codec, "decode", lambda self, latents: latents.new_full((len(latents), 3, 16, 16), np.nan))
    message = refused(capsys, "-r", runs.diffusion, "--against", pictures, *QUICK, code=5)
    assert "is not finite: the weights are damaged" in message


def test_metrics_of_another_kind_are_refused_before_anything_is_made(runs, pictures, trained, capsys):
    words = ["-r", runs.diffusion, "--against", pictures, *QUICK, "--metrics"]
    message = refused(capsys, *words, "latents", code=2)
    assert "--metrics latents: samples have none; they have fd, sfd, is, kid" in message
    words = ["-r", trained[0], "--features", FID, "--metrics"]
    assert "--metrics fdr: reconstructions have none; they have fd, sfd, psnr" in refused(capsys, *words, "fdr", code=2)
    message = refused(capsys, *words, "lpips", code=2)  # of 16 pixels
    assert "--metrics lpips: it compares pictures of 1 or 3 channels" in message
    assert "left out" not in message
    assert [*numbers(run(*words, "recall"))] == ["rRecall"]


def test_held_out_pictures_are_called_so_and_are_not_the_reference(runs, pictures, tmp_path, capsys, monkeypatch):
    large = draw(tmp_path / "large", 30, 4, side=32)
    words = ["-r", runs.diffusion, *QUICK, "--against", pictures, "--held-out"]
    message = refused(capsys, *words, large, code=3)
    assert f"those of the held-out pictures {large} 32 x 32" in message
    monkeypatch.setattr(feature_store.FeatureStore, "fill", lambda *_: pytest.fail("something was computed"))
    assert "pictures: is the reference itself" in refused(capsys, *words, pictures, code=3)


def test_a_gray_reference_is_noted(pictures, tmp_path):
    gray = draw(tmp_path / "gray", 30, 4, mode="L")
    record = run(pictures, "--against", gray, "--features", FID)
    assert "the first 24 pictures are in color, those of the reference are gray" in record.notes


def test_gray_pictures_are_noted(pictures, tmp_path, capsys):
    gray = draw(tmp_path / "gray", 30, 4, mode="L")
    record = run(gray, "--against", pictures, "--features", FID)
    assert any("are gray, those of the reference are in color" in note for note in record.notes)
    assert "note: the first 24 pictures are gray" in capsys.readouterr().out


def test_fewer_pictures_than_features_are_noted(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "choose", lambda name, device: Projection(name, width=70))
    record = run(pictures, "--against", pictures, "--features", FID)
    assert any("60 pictures are too few for the covariance of 70 features" in note for note in record.notes)


def test_too_few_pictures(pictures, tmp_path, capsys):
    message = refused(capsys, pictures, "-n", "1", "--against", pictures, "--features", FID, code=3)
    assert "1 pictures, expected 2 or more" in message


def test_statistics_of_other_features(runs, capsys):
    np.savez("reference.npz", mu=np.zeros(5), sigma=np.eye(5))
    message = refused(capsys, "-r", runs.diffusion, *QUICK, "--against", "reference.npz", code=3)
    assert "reference.npz: mu: expected the shape (6,), found (5,)" in message


def test_a_wrong_classifier(runs, pictures, capsys):
    words = ["-r", runs.diffusion, *QUICK, "--against", pictures, "--classifier"]
    assert "no such file" in refused(capsys, *words, "nothing.safetensors", code=4)
    Path("wrong.safetensors").write_bytes(b"wrong")
    assert "wrong.safetensors: cannot be read" in refused(capsys, *words, "wrong.safetensors", code=4)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "What is to be measured?"),
        (["-r", "a", "b"], 2, "What is to be measured?"),
        (["pictures"], 2, "Name a reference with --against"),
        (["-r", "nowhere"], 4, "nowhere: no checkpoint"),
        (["-r", "nowhere", "--device", "cuda:99"], 2, "--device cuda:99: cannot be computed on here"),
        (["-r", "nowhere", "--device", "graphics"], 2, "--device graphics: cannot be computed on here"),
        (["nowhere", "--against", "pictures"], 3, "nowhere: expected a folder of pictures, or an .npz"),
        (["pictures", "--against", "nowhere"], 3, "nowhere: expected a folder of pictures, or an .npz"),
        (["pictures", "--against", "nowhere.yaml"], 2, "nowhere.yaml: no such file"),
        (["pictures", "--against", "pictures", "x=1"], 2, "expected one reference, found 'x=1'"),
        (["pictures", "--against", "a.yaml", "x"], 2, "expected key=value, found 'x'"),
        (["pictures", "--against", "pictures", "--metrics", "fid"], 2, "--metrics"),
        (
            ["pictures", "--against", "pictures", "--metrics", "fd", "psnr"],
            2,
            "--metrics psnr: pictures have none",
        ),
        (["pictures", "--against", "pictures", "--resolution", "1", "2", "3"], 2, "--resolution"),
        (["pictures", "--against", "pictures", "--save-reference", "x.pt"], 2, "ends in .npz"),
        (["pictures", "--against", "pictures", "--rescale", "0.5"], 2, "--rescale: does nothing at --guidance 1"),
        (["pictures", "--agianst", "pictures"], 2, "did you mean --against?"),
        (
            ["pictures", "--against", "pictures", "--steps", "9"],
            2,
            "--steps: has no meaning for pictures; leave it out",
        ),
        (["pictures", "--against", "pictures", "--part", "train"], 2, "--part: is a part of a data set"),
        (
            ["pictures", "--against", "pictures", "--metrics", "kid", "--held-out", "x"],
            2,
            "--held-out: is of the metrics fdr and nearest alone",
        ),
        (
            ["pictures", "--against", "pictures", "--features", "alexnet", "vgg16", "--save-reference", "x.npz"],
            2,
            "--save-reference: holds the statistics of one feature space, found --features alexnet vgg16",
        ),
        (
            ["pictures", "--against", "pictures", "--precision", "auto"],
            2,
            "--precision auto: pictures that are there are",
        ),
    ],
)
def test_mistakes_are_one_message(pictures, capsys, words, code, message):
    assert message in refused(capsys, *words, code=code)


@pytest.mark.parametrize(
    ("stage", "words", "message"),
    [
        (1, ["--reference-images", "20"], "--reference-images: has no meaning for reconstructions"),
        (1, ["--guidance", "2"], "--guidance: has no meaning for reconstructions"),
        (1, ["--raw"], "--raw: has no meaning for reconstructions"),
        (2, ["--resolution", "16"], "--resolution: resizes folders of pictures, of which there is none here"),
    ],
)
def test_what_decides_nothing_of_a_run_is_refused(trained, capsys, stage, words, message):
    assert message in refused(capsys, "-r", trained[stage - 1], *words, code=2)


def test_what_no_item_says_is_for_folders(trained, pictures, capsys, monkeypatch):
    monkeypatch.setattr(ClassVector, "keys", property(lambda self: ("layout",)))
    message = refused(capsys, "-r", trained[1], *QUICK, "--against", pictures, code=2)
    assert "this model reads layout, which no item says" in message
    assert "sample.py --conditions FILE, and evaluate their folder" in message


# ---- training behind a checkpoint ----


def test_hours_are_summed_from_logged_speeds(tmp_path):
    table = tmp_path / "metrics.csv"
    table.write_text("step,images_per_second\n10,5\n20,\n30,10\n40,1\n")
    assert hours(table, 30, 60) == pytest.approx((10 * 60 / 5 + 20 * 60 / 10) / 3600)
    assert hours(tmp_path / "none.csv", 30, 60) is None
