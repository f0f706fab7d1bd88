"""What a start imports, each in a process of its own: which libraries were imported is a property of a process."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.runtime import imports

ROOT = Path(imports.__file__).parents[2]


def python(code: str) -> str:
    """What a new process prints that runs `code`."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imported_by(code: str) -> set[str]:
    """The packages that are imported after `code`."""
    return set(python(f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})").split())


TRAINING = "from ldm.runtime import imports; imports.prepare(); import ldm.training.trainer"


def test_training_imports_no_library_of_metrics_that_it_does_not_have():
    found = imported_by(TRAINING)
    assert {"torch", "pytorch_lightning", "torchmetrics"} <= found
    assert not found & {"scipy", "transformers", "torch_fidelity", "wandb", "datasets", "diffusers", "timm", "gradio"}


def test_sampling_imports_neither_lightning_nor_what_trains():
    found = imported_by("import ldm.cli.sample, ldm.sampling.pipeline")
    assert "torch" in found
    assert not found & {"pytorch_lightning", "torchmetrics", "torchvision", "matplotlib"}
    assert not found & {"scipy", "transformers", "diffusers", "wandb"}


@pytest.mark.parametrize(
    "wanted",
    [
        "from torchmetrics import MeanMetric as found",
        "import torchmetrics; found = torchmetrics.image.StructuralSimilarityIndexMeasure",
        "from torchmetrics.image.kid import KernelInceptionDistance as found",
        "from torchmetrics.metric import Metric as found",
        "import torchmetrics; found = torchmetrics.__version__.split",
        "import torchmetrics.functional.text; found = torchmetrics.functional.text.bert_score",
    ],
)
def test_all_of_torchmetrics_is_there_for_those_who_ask(wanted):
    check = (
        "import torchmetrics, pytorch_lightning.core.module as used\n"
        "assert callable(found)\n"
        "assert issubclass(torchmetrics.MeanMetric, used.Metric)\n"
        "assert {*torchmetrics.__all__} <= {*dir(torchmetrics)}\n"
        "assert torchmetrics.functional.structural_similarity_index_measure\n"
    )
    python(f"from ldm.runtime import imports; imports.prepare()\n{wanted}\n{check}")


def test_lightning_gets_torchmetrics_own_classes():
    python(
        f"{TRAINING}\n"
        "import torchmetrics, pytorch_lightning.core.module as used\n"
        "early = torchmetrics.Metric, torchmetrics.MetricCollection\n"
        "torchmetrics.Accuracy\n"  # only its __init__ has it
        "assert (torchmetrics.Metric, torchmetrics.MetricCollection) == early == (used.Metric, used.MetricCollection)"
    )


def test_what_torchmetrics_does_not_have_is_an_attribute_error():
    python(
        "from ldm.runtime import imports; imports.prepare()\n"
        "import torchmetrics\n"
        "assert not hasattr(torchmetrics, '__nonsense__')\n"
        "assert not hasattr(torchmetrics, 'nonsense')\n"
    )


def test_a_process_that_has_torchmetrics_keeps_it():
    python(
        "import torchmetrics; before = torchmetrics\n"
        "from ldm.runtime import imports; imports.prepare()\n"
        "import torchmetrics, sys; assert sys.modules['torchmetrics'] is before is torchmetrics"
    )


@pytest.mark.parametrize("before", [True, False])
def test_garbage_is_looked_for_as_before_once_the_imports_are_done_or_have_failed(before):
    def work() -> None:
        with imports.uncollected():
            assert not gc.isenabled()
            raise ImportError

    was = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        with pytest.raises(ImportError):
            work()
        assert gc.isenabled() == before
    finally:
        (gc.enable if was else gc.disable)()


def test_imported_modules_are_not_looked_through_again_and_all_else_is():
    counts = python(
        "import gc; from ldm.runtime import imports; imports.prepare()\n"
        "with imports.uncollected(): import sys\n"
        "nothing = gc.get_freeze_count()\n"
        "with imports.uncollected(): import torch\n"
        "print(nothing, gc.get_freeze_count() > 100_000, len(gc.get_objects()) < 1000)\n"
        "class Some: pass\n"
        "import weakref; one = Some(); one.own = one; seen = weakref.ref(one); del one\n"
        "gc.collect(); print(seen())"
    )
    assert counts.split() == ["0", "True", "True", "None"]


def test_where_models_come_and_go_nothing_is_kept_from_collection():
    counts = python(
        "import gc; from ldm.runtime import imports\n"
        "with imports.uncollected(): import torch\n"
        "print(gc.get_freeze_count())"
    )
    assert counts == "0"


def test_at_the_end_of_a_program_all_is_looked_through_as_ever():
    counts = python(
        "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count()))\n"
        "import ldm.cli.program as program; from ldm.cli.command import start\n"
        "program.run = lambda work: print(gc.get_freeze_count() > 0)\n"
        "start('plot', [])"
    )
    assert counts.split() == ["True", "0"]
