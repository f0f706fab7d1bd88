import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli import sample
from ldm.cli.sample_conditions import chosen_classes, requested
from ldm.cli.sample_options import named, parse, read_conditions, read_prompts
from ldm.errors import ConfigError
from ldm.runtime import precision
from ldm.sampling import samplers, timesteps
from ldm.sampling.generate import generate
from ldm.sampling.guidance import Guidance
from ldm.sampling.pipeline import Pipeline
from ldm.sampling.sample_folder import default_folder
from tests.tiny_runs import CLASSES, save_diffusion

QUICK = ["--steps", "2", "--guidance", "2"]


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture
def run(runs, tmp_path):
    """run(*arguments) -> (exit code, output folder)."""

    def call(*arguments, out="out", source=runs.diffusion):
        return sample.main(["-r", str(source), "--out", str(tmp_path / out), *QUICK, *arguments]), tmp_path / out

    return call


def test_pictures_grid_record_and_arrays(runs, run, capsys):
    code, out = run("--classes", "2", "cat", "-n", "3", "--seed", "5", "--npz")
    assert code == 0
    files = [f"{label:03d}-{seed:06d}.png" for label in (2, 0) for seed in (5, 6, 7)]
    assert {path.name for path in out.iterdir()} == {*files, "grid.png", "samples.json", "samples.npz", ".lock"}
    expected = [
        made.image
        for made in generate(
            Pipeline.load(runs.diffusion), [5, 6, 7], [{"class_label": 2}] * 3, steps=2, guidance=Guidance(2)
        )
    ]
    arrays = np.load(out / "samples.npz")["arr_0"]
    assert (arrays.shape, arrays.dtype) == ((6, 16, 16, 3), np.uint8)
    # A batch of another size moves a pixel by one level at most.
    assert np.abs(arrays[:3].astype(int) - np.stack(expected)).max() <= 1
    assert all(np.array_equal(pixels(out / file), image) for file, image in zip(files, arrays, strict=True))
    assert np.array_equal(pixels(out / "grid.png")[20:84:4, 68:132:4], arrays[1])  # below the class
    record = json.loads((out / "samples.json").read_text())
    assert record["settings"]["guidance"] == 2
    assert record["settings"]["weights"] == "ema"
    assert [image["file"] for image in record["images"]] == sorted(files)
    assert record["images"][-1] == {
        "file": "002-000007.png",
        "condition": {"class_label": 2},
        "seed": 7,
        "name": "Ankle boot",
    }
    assert np.load(out / "samples.npz")["names"].tolist() == files
    assert np.load(out / "samples.npz")["arr_1"].tolist() == [2, 2, 2, 0, 0, 0]
    assert str(out / "grid.png") in capsys.readouterr().out


def test_a_second_run_makes_only_what_is_missing(run):
    code, out = run("--classes", "1", "-n", "2")
    assert code == 0
    kept, lost = sorted(out.glob("001-*.png"))
    before, image = kept.stat().st_mtime_ns, pixels(lost)
    lost.unlink()
    code, out = run("--classes", "1", "-n", "4", "--batch-size", "1")
    assert code == 0
    assert kept.stat().st_mtime_ns == before
    assert np.abs(pixels(lost).astype(int) - image).max() <= 1
    assert len(list(out.glob("001-*.png"))) == 4


def listed(folder):
    return [image["file"] for image in json.loads((folder / "samples.json").read_text())["images"]]


def test_a_second_call_keeps_the_firsts_pictures_in_the_record(run):
    run("--classes", "2", "-n", "2", "--npz")
    code, out = run("--classes", "0", "--seed", "7", "-n", "1", "--npz")
    assert code == 0
    assert listed(out) == ["000-000007.png", "002-000000.png", "002-000001.png"]
    assert pixels(out / "grid.png").shape == (86, 68, 3)  # of this call
    assert np.load(out / "samples.npz")["names"].tolist() == ["000-000007.png"]


def test_an_interrupted_call_records_what_it_made(run, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sample.signals, "stop_if_asked", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--classes", "1", "-n", "4", "--batch-size", "2")
    monkeypatch.undo()
    code, out = run("--classes", "0", "-n", "1")
    assert code == 0
    assert listed(out) == ["000-000000.png", "001-000000.png"]
    assert not list(out.glob("*.tmp*"))


def test_pictures_of_other_settings_are_left_alone(run, capsys):
    _, out = run("--classes", "1", "-n", "1")
    image = pixels(out / "001-000000.png")
    code, _ = run("--classes", "1", "-n", "1", "--raw")
    assert code == 2
    assert "weights: ema there, raw now" in capsys.readouterr().err
    assert np.array_equal(pixels(out / "001-000000.png"), image)
    (out.parent / "foreign").mkdir()
    (out.parent / "foreign" / "thesis.tex").touch()
    assert run(out="foreign")[0] == 2


def test_another_precision_is_recorded_and_has_a_folder_of_its_own(runs, run, capsys):
    words = ["--classes", "1", "-n", "2"]
    code, out = run(*words, "--precision", "bf16-mixed", out="half")
    assert code == 0
    assert json.loads((out / "samples.json").read_text())["settings"]["precision"] == "bf16-mixed"
    half = Pipeline.load(runs.diffusion, compute=torch.bfloat16)
    (expected, _) = half.generate([0, 1], [{"class_label": 1}] * 2, steps=2, guidance=Guidance(2))
    assert np.array_equal(pixels(out / "001-000000.png"), expected)
    assert run(*words, out="half")[0] == 2
    assert "precision: bf16-mixed there, None now" in capsys.readouterr().err
    # As records from before there was a choice.
    code, out = run(*words, "--precision", "32-true", out="whole")
    assert "precision" not in json.loads((out / "samples.json").read_text())["settings"]
    assert run(*words, out="whole")[0] == 0
    assert run(*words, "--precision", "bf16-mixed", out="whole")[0] == 2
    assert "precision: None there, bf16-mixed now" in capsys.readouterr().err
    settings = {"checkpoint": "run/checkpoints/step=7.ckpt", "step": 7, "weights": "ema", "sampler": "ddim eta=0.5"}
    settings |= {"schedule": "default", "steps": 2, "guidance": 2.0, "precision": "bf16-mixed"}
    assert str(default_folder(settings)) == "run/samples/step7-ema-ddim2-eta0.5-bf16-mixed-guidance2"


def test_another_decoder_is_recorded_and_has_a_folder_of_its_own(runs, run, tuned_autoencoder, capsys):
    """It would otherwise make nothing, where the pictures of the first are, and show these."""
    code, out = run("-n", "1")
    assert code == 0
    assert run("-n", "1", "--autoencoder", str(tuned_autoencoder))[0] == 2
    tuned = Pipeline.load(runs.diffusion, autoencoder=tuned_autoencoder)
    digits = tuned.manifest.plan.autoencoder["weights"][:16]
    assert f"autoencoder: None there, {digits} now" in capsys.readouterr().err
    code, other = run("-n", "1", "--autoencoder", str(tuned_autoencoder), out="other")
    assert code == 0
    assert json.loads((other / "samples.json").read_text())["settings"]["autoencoder"] == digits
    assert not np.array_equal(pixels(out / "000-000000.png"), pixels(other / "000-000000.png"))
    # The same one from another place is none.
    assert run("-n", "1", "--autoencoder", str(runs.autoencoder))[0] == 0


def test_a_guiding_model_computes_in_the_same_precision(runs, run, monkeypatch):
    types = []

    def watched(pipeline, *given, guidance, **options):
        types.append((pipeline.compute, guidance.guide.compute))
        return generate(pipeline, *given, guidance=guidance, **options)

    monkeypatch.setattr(sample, "generate", watched)
    guided = ["--classes", "1", "-n", "1", "--guide", str(runs.diffusion)]
    assert run(*guided, out="whole")[0] == run(*guided, "--precision", "bf16-mixed", out="half")[0] == 0
    assert types == [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize("native", [True, False])
def test_precision_goes_by_the_device(run, capsys, monkeypatch, native):
    monkeypatch.setattr(precision, "_cpu_says", lambda: native)
    monkeypatch.setattr(precision, "bf16_slowdown", lambda: 27.4)
    code, out = run("--classes", "1", "-n", "1", "--precision", "auto")
    assert code == 0
    chosen = "bf16-mixed" if native else "32-true"
    assert capsys.readouterr().err.startswith(f"precision: {chosen}, since this processor ")
    assert json.loads((out / "samples.json").read_text())["settings"].get("precision", "32-true") == chosen
    assert run("--classes", "1", "-n", "1", "--precision", "bf16-mixed", out="half")[0] == 0
    said = capsys.readouterr().err
    assert said.count("emulates: a matrix product takes 27 times as long as in float32. Use --precision 32-true") == (
        not native
    )


def test_each_setting_has_a_folder_of_its_own_by_default(runs, capsys):
    arguments = ["-r", str(runs.diffusion.parent / "*_tiny_diffusion"), "--classes", "0", "-n", "1", *QUICK]
    for more in (
        [],
        ["--sampler", "ancestral"],
        ["--sampler", "ddim", "eta=0.5"],
        ["--sampler", "unipc", "--schedule", "karras"],
        ["--schedule", "compvis"],
    ):
        assert sample.main([*arguments, *more]) == 0
    folders = sorted(path.name for path in (runs.diffusion / "samples").iterdir())
    settings = ("ancestral2", "ddim2-compvis", "ddim2-eta0.5", "ddim2", "unipc2-karras")
    assert folders == [f"step7-ema-{name}-guidance2" for name in settings]
    assert "samples/step7-ema-ddim2-guidance2/grid.png" in capsys.readouterr().out


def test_fresh_noise_on_the_way_changes_the_picture(run):
    pictures = []
    for name, more in {"none": [], "half": ["eta=0.5"], "all": ["eta=1"]}.items():
        code, out = run("--classes", "0", "-n", "1", "--steps", "3", "--sampler", "dpmpp_2m", *more, out=name)
        assert code == 0
        pictures.append(pixels(out / "000-000000.png").tobytes())
    assert len({*pictures}) == 3


OWN = """
import torch

from ldm.ranges import Positive
from ldm.sampling.steps import first_order_step


def wait(denoise, objective, x, times, draws, factor: Positive = 1.0):
    (t, s), *_ = [*zip(times, times[1:])]
    return factor * first_order_step(objective, x, denoise(x, t), t, times[-1])


def ends(objective, steps, shape):
    return torch.tensor([objective.t_max, 0.0])
"""


def test_a_sampler_and_a_schedule_of_ones_own(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sampling.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    words = ["--classes", "0", "-n", "1", "--trust", "own"]
    named = ["--sampler", "own.sampling.wait", "--schedule", "own.sampling.ends"]
    pictures = []
    for out, more in {"one": [], "two": ["--sampler", "own.sampling.wait", "factor=0.5"]}.items():
        code, folder = run(*words, *named, *more, out=out)
        assert code == 0, capsys.readouterr().err
        pictures.append(pixels(folder / "000-000000.png").tobytes())
    settings = json.loads((folder / "samples.json").read_text())["settings"]
    assert settings["sampler"] == "own.sampling.wait factor=0.5"
    assert settings["schedule"] == "own.sampling.ends"
    assert pictures[0] != pictures[1]
    assert run(*words, "--sampler", "own.sampling.wait", "factor=0", out="three")[0] == 2
    assert "expected a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["sampler", "schedule"])
def test_every_function_of_its_file_has_a_name(run, capsys, flag):
    """And each makes pictures."""
    module = {"sampler": samplers, "schedule": timesteps}[flag]
    names = named(module)
    assert {"ddim", "heun", "unipc"} <= {*names} or {"default", "karras", "shifted"} <= {*names}
    for name in names:
        code, out = run("--classes", "0", "-n", "1", f"--{flag}", name, out=name)
        assert code == 0, capsys.readouterr().err
        assert json.loads((out / "samples.json").read_text())["settings"][flag] == name


def test_settings_are_the_same_however_they_are_written(run, capsys):
    words = ["--classes", "0", "-n", "1"]
    assert run(*words, "--sampler", "heun", "s_churn=40", "s_noise=1.003")[0] == 0
    assert run(*words, "--sampler", "heun", "s_noise=1.0030", "s_churn=40.0")[0] == 0, capsys.readouterr().err


def test_conditions_from_a_file(run, tmp_path, capsys):
    wanted = tmp_path / "wanted.json"
    wanted.write_text('[{"class_label": 2}, {"class_label": 0}, {"class_label": 2}]')
    code, out = run("--conditions", str(wanted), "-n", "2")
    assert code == 0
    assert listed(out) == ["000-000000.png", "000-000001.png", "002-000000.png", "002-000001.png"]
    by_class = run("--classes", "2", "-n", "1", out="classes")[1]
    assert np.array_equal(pixels(by_class / "002-000000.png"), pixels(out / "002-000000.png"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON file"),
        ("{}", "expected a list of mappings"),
        ("[]", "expected a list of mappings"),
        ("[3]", "expected a list of mappings"),
        ('[{"clas_label": 3}]', "expected the keys that the model reads, class_label; found clas_label"),
        ('[{"class_label": 3}]', "class 3: expected 0 to 2"),
        ('[{"class_label": "cat"}]', "expected a whole number, found 'cat'"),
        ('[{"boxes": 5}]', "expected the keys that the model reads, class_label; found boxes"),
        (None, "cannot be read: No such file"),
    ],
)
def test_conditions_that_cannot_be_are_one_message(run, tmp_path, capsys, text, message):
    wanted = tmp_path / "wanted.json"
    if text is not None:
        wanted.write_text(text)
    code, out = run("--conditions", str(wanted))
    assert code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
    assert run("--conditions", str(wanted), "--classes", "0")[0] == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_given_seeds_are_used_for_every_class(run):
    code, out = run("--seeds", "9", "7", "9", "--classes", "0", "1")
    assert code == 0
    assert sorted(p.name for p in out.glob("0*.png")) == [f"{c:03d}-{s:06d}.png" for c in (0, 1) for s in (7, 9)]


def test_grey_pictures_of_an_unconditional_model_in_a_square(make_runs, run):
    code, out = run("-n", "5", "--npz", "--guidance", "1", source=make_runs(channels=1, classes=None).diffusion)
    assert code == 0
    assert Image.open(out / "000003.png").mode == "L"
    assert pixels(out / "grid.png").shape == (2 + 2 * 66, 2 + 3 * 66)
    assert np.load(out / "samples.npz")["arr_0"].shape == (5, 16, 16, 3)
    assert "arr_1" not in np.load(out / "samples.npz")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--classes", "3"], 2, "0 to 2"),
        (["--classes", "ankel boot"], 2, "did you mean 'ankle boot'"),
        (["--classes", "bird"], 2, "cat, dog, Ankle boot"),
        (["--device", "cuda:99"], 2, "--device cuda:99: cannot be computed on here"),
        (["--steps", "0"], 2, "--steps: expected a whole number of 1 or more, found '0'"),
        (["--steps", "2000"], 2, "1 to 1000"),
        (["--sampler", "ancestral", "eta=0.5"], 2, "ldm.sampling.samplers.ancestral has no parameter 'eta'"),
        (["--sampler", "hun"], 2, "--sampler hun: there is none of this name; did you mean 'heun'?"),
        (["--sampler", "dpm"], 2, "there is none of this name; valid: ancestral, ddim, dpmpp_2m"),
        (["--sampler", "Sampler"], 2, "there is none of this name"),
        (["--sampler", "first_order_step"], 2, "there is none of this name"),
        (["--sampler", "heun", "s_chrun=4"], 2, "did you mean 's_churn'?"),
        (["--sampler", "heun", "4"], 2, "--sampler heun: expected its settings as setting=value, found '4'"),
        (
            ["--schedule", "karras", "steps=20"],
            2,
            "is no setting, but what it is called with, that is --steps",
        ),
        (["--sampler", "ddim", "draws=null"], 2, "draws=null: is no setting, but what it is called with"),
        (["--sampler", "ldm.images.picture"], 2, "expected a function of (denoise, objective, x, times, draws, ...)"),
        (["--sampler", "own.samplers.mine"], 2, "add --trust own"),
        (["--schedule", "karras", "ratio_min=3", "ratio_max=2"], 2, "expected ratio_min < ratio_max, found 3 and 2"),
        (["--schedule", "karas"], 2, "--schedule karas: there is none of this name; did you mean 'karras'?"),
        (["--steps", "3", "--schedule", "compvis"], 2, "a proper divisor of 1000"),
        (["--sampler", "ddim", "eta=1.5"], 2, "sampler.params.eta (command line: params.eta=1.5): expected a number"),
        (["--sampler", "plms"], 2, "ancestral"),
        (["--guidence", "2"], 2, "--guidance"),
        (["--seeds", "-1"], 2, "--seeds"),
        (["--seed", str(2**63 - 1)], 2, "8 pictures would need seeds beyond 2^63 - 1"),
        (["--prompt", "a cat"], 2, "--prompt: this model reads no captions; leave it out"),
        (["--prompts-file", "missing.txt"], 2, "--prompts-file missing.txt: cannot be read: No such file"),
        (["--prompt", "a", "--prompts-file", "b"], 2, "--prompt and --prompts-file: both say what to make"),
        (["--prompt", "a", "--conditions", "b"], 2, "--prompt and --conditions: both say what to make"),
        (["--guidance", "2", "--negative", "a dog"], 2, "negative: caption: the model reads class_label alone"),
        (["--guidance", "1", "--negative", "a dog"], 2, "--negative: does nothing at --guidance 1"),
        (["--size", "1", "2", "3"], 2, "--size: expected one side, or height and width, found 3 numbers"),
        (["--size", "18"], 2, "size 18: "),
        (["--size", "0"], 2, "--size: expected a whole number of 1 or more"),
    ],
)
def test_mistakes_are_one_message(run, capsys, arguments, code, message):
    status, out = run(*arguments)
    assert status == code
    assert not out.exists()
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_another_size_is_made_recorded_and_named(run):
    code, out = run("--classes", "1", "-n", "2", "--size", "16", "24")
    assert code == 0
    assert pixels(out / "001-000000.png").shape == (16, 24, 3)
    assert json.loads((out / "samples.json").read_text())["settings"]["size"] == [16, 24]
    assert run("--classes", "1", "-n", "2")[0] == 2  # the folder holds pictures of that size


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "expected a caption on each line, found none"), (b" \n\n", "found none"), (b"\xff\xfe", "text in UTF-8")],
)
def test_a_file_of_prompts_that_cannot_be_is_one_message(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_prompts(file)


def test_a_prompt_that_is_said_twice_is_one():
    manifest = SimpleNamespace(plan=SimpleNamespace(class_names=None))
    reader = SimpleNamespace(conditioner=SimpleNamespace(keys=("caption",)), num_classes=None, manifest=manifest)
    asked = parse(["-r", "run", "--prompt", "a cat", "a dog", "a cat"])
    assert requested(reader, asked) == [{"caption": "a cat"}, {"caption": "a dog"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # as Notepad saves it
def test_a_prompt_a_line_each_once(tmp_path, caplog, encoding):
    file = tmp_path / "prompts.txt"
    file.write_text("red heart\n\n قلب \nred heart\n🐱\n", encoding=encoding)
    assert read_prompts(file) == ["red heart", "قلب", "🐱"]
    assert "1 lines repeat others" in caplog.text


def test_a_file_of_conditions_may_begin_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "wanted.json"
    file.write_text('[{"class_label": 2}]', encoding="utf-8-sig")
    assert read_conditions(file) == [{"class_label": 2}]


def test_words_that_could_mean_two_classes(caplog):
    names = ["1", "10", "2", "Cat", "cat"]
    assert chosen_classes(["1", "0"], 5, names) == [1, 0]
    assert "--classes 1: the number of class '10'; the class that is called so has the number 0" in caplog.text
    assert chosen_classes(["10", "cat", "Cat"], 5, names) == [1, 4, 3]
    with pytest.raises(ConfigError, match="--classes CAT: could be Cat or cat"):
        chosen_classes(["CAT"], 5, names)


def test_wrong_checkpoints_are_one_message(runs, run, other_autoencoder, tmp_path, capsys):
    assert run(source=tmp_path / "nowhere")[0] == 4
    assert run(source=runs.autoencoder)[0] == 4
    assert run("--autoencoder", str(other_autoencoder))[0] == 4
    assert "not the autoencoder" in capsys.readouterr().err


def test_classes_of_an_unconditional_model_are_refused(make_runs, run, capsys):
    source = make_runs(classes=None).diffusion
    assert run("--classes", "0", source=source)[0] == 2
    assert "--classes 0: this model was trained without classes" in capsys.readouterr().err
    code, out = run("--guidance", "2", source=source)
    assert code == 2
    assert "guidance scale: found 2, but this model was trained without conditions" in capsys.readouterr().err
    assert not out.exists()


def test_steering_is_done_recorded_and_named(runs, tmp_path, capsys):
    guide = tmp_path / "guide"
    guide.mkdir()
    save_diffusion(guide, runs.autoencoder, CLASSES, seed=5)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save(tmp_path / "line.png")
    image = ["--image", str(tmp_path / "red.png")]
    arguments = ["-r", str(runs.diffusion), "--classes", "1", "-n", "2", *QUICK]
    assert sample.main(arguments) == 0
    made = {pixels(runs.diffusion / "samples" / "step7-ema-ddim2-guidance2" / "001-000000.png").tobytes()}
    wanted = {
        "-guidance_channels3": ["--guidance-channels", "3"],
        "-shifted-shift2.5": ["--schedule", "shifted", "shift=2.5"],
        "-rescale0.5": ["--rescale", "0.5"],
        "-interval0.1_2": ["--interval", "0.1", "2"],
        "-guide_": ["--guide", str(guide)],
        "-image_red_": [*image],
        "-strength1": [*image, "--strength", "1"],
        "-mask_line_": [*image, "--mask", str(tmp_path / "line.png")],
    }
    for name, more in wanted.items():
        before = {*(runs.diffusion / "samples").glob("*")}
        assert sample.main([*arguments, *more]) == 0, capsys.readouterr().err
        (folder,) = {*(runs.diffusion / "samples").glob("*")} - before
        assert name in folder.name
        settings = json.loads((folder / "samples.json").read_text())["settings"]
        assert re.match(r"-([a-z]+)", name)[1] in str(settings)
        made.add(pixels(folder / "001-000000.png").tobytes())
    assert len(made) == len(wanted) + 1  # each flag makes another picture


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mask", "m.png"], "--mask m.png: belongs to --image FILE"),
        (["--strength", "0.5"], "--strength 0.5: belongs to --image FILE"),
        (["--guidance", "1", "--rescale", "0.5"], "--rescale: does nothing at --guidance 1"),
        (["--guidance", "1", "--guidance-channels", "3"], "--guidance-channels: does nothing at --guidance 1"),
        (["--guidance-channels", "5"], "guidance channels: expected 1 to 4, the channels of this model's latents"),
        (["--image", "nothing.png"], "nothing.png"),
        (["--guide", "nowhere"], "nowhere"),
    ],
)
def test_steering_that_cannot_be_writes_nothing(run, capsys, words, message):
    code, out = run(*words)
    assert code in (2, 3, 4)
    assert message in capsys.readouterr().err
    assert not out.exists()


NUMBERS = {
    "--guidance": ["nan", "inf", "-inf", "1e400", "two"],
    "--rescale": ["nan", "-0.1", "2", "inf"],
    "--strength": ["nan", "0", "-1", "1.1", "inf"],
    "--steps": ["nan", "0", "-5", "2.5", "inf"],
    "--guidance-channels": ["nan", "0", "-1", "1.5"],
    "--number": ["0", "nan"],
    "--batch-size": ["0", "inf"],
    "--seed": ["-1", "nan"],
    "--interval": ["nan 1", "0 nan", "-1 2", "3 1", "2 2", "inf inf"],
}


@pytest.mark.parametrize(("flag", "values"), [(flag, value.split()) for flag in NUMBERS for value in NUMBERS[flag]])
def test_numbers_out_of_range_are_named_by_flag_before_anything_is_loaded(run, capsys, tmp_path, flag, values):
    words = [f"{flag}={values[0]}"] if len(values) == 1 else [flag, *values]
    code, out = run(*words, source=tmp_path / "nowhere")  # a run that is not there is not looked for
    assert code == 2
    error = capsys.readouterr().err
    assert flag in error
    assert "expected" in error
    assert any(value in error for value in values)
    assert "nowhere" not in error
    assert not out.exists()


def test_an_interval_without_an_upper_end(run):
    code, out = run("--classes", "0", "-n", "1", "--interval", "0.2", "inf")
    assert code == 0
    assert json.loads((out / "samples.json").read_text())["settings"]["interval"] == [0.2, float("inf")]


def test_a_folder_of_steered_pictures_is_not_continued_without(run, tmp_path, capsys):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    assert run("--classes", "1", "-n", "1", "--image", str(tmp_path / "red.png"))[0] == 0
    assert run("--classes", "1", "-n", "1")[0] == 2
    assert "strength: 0.6 there, None now" in capsys.readouterr().err


def test_an_output_that_is_a_file(run, tmp_path, capsys):
    (tmp_path / "taken").touch()
    for out in ("taken", "taken/deeper"):
        assert run(out=out)[0] == 6
        assert "there is a file where a folder is needed" in capsys.readouterr().err


def test_home_is_known_where_the_shell_left_it(runs, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(runs.diffusion.parent))
    home = f"~/{runs.diffusion.name}"
    for source in (home, "~/*_tiny_diffusion"):
        options = sample.parse(["-r", source, "--out=~/a", "--autoencoder=~/b", "--image=~/c", "--mask=~/d"])
        pictures = [options.out, options.autoencoder, *options.image, *options.mask]
        assert pictures == [runs.diffusion.parent / name for name in "abcd"]
    words = ["-r", "~/*_tiny_diffusion", "--guide", home, "--out", str(tmp_path / "out"), "--classes", "0", "-n", "1"]
    assert sample.main([*words, *QUICK]) == 0
