import math

import pytest
from PIL import Image

from ldm.cli import plot

METRICS = """step,epoch,train/loss,val/loss,val/ema/loss,train/lr
1,0,4.0,,,0.1
2,0,2.0,,,0.2
2,0,,3.0,3.5,
2,0,2.5,,,0.2
3,0,nan,,,0.3
"""


@pytest.fixture
def run_folder(tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    return tmp_path


def test_sparse_rows_become_curves_and_the_later_row_holds(run_folder):
    curves = plot.read_curves(run_folder)
    assert set(curves) == {"train/loss", "val/loss", "val/ema/loss", "train/lr"}
    steps, values = curves["train/loss"]
    assert steps == [1, 2, 3]
    assert values[:2] == [4.0, 2.5]
    assert math.isnan(values[2])
    assert curves["val/loss"] == ([2], [3.0])


def test_train_and_val_share_a_panel(run_folder):
    grouped = plot.panels(plot.read_curves(run_folder))
    assert {panel: set(group) for panel, group in grouped.items()} == {
        "loss": {"train", "val", "val/ema"},
        "lr": {"train"},
    }


def test_smoothing_keeps_a_constant_and_follows_a_step():
    assert plot.smooth([3.0] * 10, 4) == pytest.approx([3.0] * 10)
    assert plot.smooth([math.nan, 1.0, math.inf, 1.0], 4)[1:] == pytest.approx([1.0] * 3)
    after = plot.smooth([0.0] * 50 + [1.0] * 50, 5)
    assert after[49] == 0.0
    assert after[-1] == pytest.approx(1.0, abs=1e-3)


def test_a_picture_is_written(run_folder, capsys):
    assert plot.main([str(run_folder)]) == 0
    picture = run_folder / "metrics.png"
    assert capsys.readouterr().out.strip() == str(picture)
    with Image.open(picture) as image:
        assert image.width > image.height > 200
        assert len(image.convert("RGB").getcolors(maxcolors=10**6)) > 10  # more than an empty page


def test_two_runs_in_one_picture(run_folder, tmp_path):
    output = tmp_path / "both.png"
    arguments = [str(run_folder), str(run_folder / "metrics.csv"), "--only", "loss", "-o", str(output)]
    assert plot.main(arguments) == 0
    assert output.stat().st_size > 5000


def test_mistakes_have_exit_codes(run_folder, tmp_path, capsys):
    assert plot.main([str(tmp_path / "nowhere")]) == 3
    assert plot.main([str(run_folder), "--only", "lss"]) == 3
    assert "loss, lr" in capsys.readouterr().err
    assert plot.main([str(run_folder), "--outptu", "x"]) == 2
    assert "--output" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.csv").write_text("step,train/loss\n")
    assert plot.main([str(empty)]) == 3


@pytest.mark.parametrize(("output", "said"), [("missing/a.png", "no folder"), ("a", ".png"), ("a.xyz", ".png")])
def test_an_output_that_cannot_be(run_folder, capsys, output, said):
    assert plot.main([str(run_folder), "-o", str(run_folder / output)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --output")
    assert said in message


def test_an_output_that_is_a_folder(run_folder, capsys):
    (run_folder / "a.png").mkdir()
    assert plot.main([str(run_folder), "-o", str(run_folder / "a.png")]) == 6
    assert "a folder where a file is needed" in capsys.readouterr().err


def test_home_is_known_where_the_shell_left_it(run_folder, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(run_folder))
    assert plot.main(["~/metrics.csv", "--output=~/b.png"]) == 0
    assert (run_folder / "b.png").is_file()


def test_runs_of_one_name_are_told_apart(run_folder, tmp_path):
    for place in ("a", "b"):
        (tmp_path / place / "run").mkdir(parents=True)
        (tmp_path / place / "run" / "metrics.csv").write_text(METRICS)
    files = [tmp_path / place / "run" / "metrics.csv" for place in ("a", "b")]
    assert plot.called_apart(files) == ["a/run", "b/run"]
    assert plot.called_apart([files[0], run_folder]) == ["run", run_folder.name]
    assert plot.called_apart([files[0].parent, files[0]]) == ["run", "run"]


def test_each_name_of_only_is_that_of_a_panel(run_folder, capsys):
    assert plot.main([str(run_folder), "--only", "loss", "psrn"]) == 3
    assert "No metric is called psrn; there are: loss, lr" in capsys.readouterr().err
