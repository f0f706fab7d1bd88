"""What a start need not wait for: libraries that few runs use, and a look for garbage where there is none.

Lightning imports torchmetrics for two classes, and torchmetrics then imports every metric that it has, with scipy,
transformers and torchvision where they are installed: longer than all of Lightning. After `prepare` these two classes
come by themselves. Whatever else torchmetrics is asked for is there as ever, since its packages then run in full.
"""

import atexit
import gc
import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# A package before those in it. SSIM and PSNR are in the last; `utilities` imports `metric`, which needs its modules.
_PACKAGES = ("torchmetrics", "torchmetrics.utilities", "torchmetrics.functional", "torchmetrics.functional.image")

_ALONE = {
    ("torchmetrics", "Metric"): "torchmetrics.metric",
    ("torchmetrics", "MetricCollection"): "torchmetrics.collections",
}
"""(package, name): the module that the package has it from."""


class _Deferred(ModuleType):
    """A package whose `__init__` runs when it is first asked for a name that is not in _ALONE.

    Its modules can be imported before that.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python asks every module for some of these
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if (module := _ALONE.get((self.__name__, name))) is not None:
            return getattr(importlib.import_module(module), name)
        self.__class__ = ModuleType  # type: ignore[assignment]  # before it runs: it may ask itself for names
        importlib.reload(self)
        return getattr(self, name)


_in_program = False  # whether this process ends with the work that it was started for


def prepare() -> None:
    """For a program, before it imports Lightning: defer torchmetrics' packages, unless it is imported already.

    From now on `uncollected` has modules left out of every later look for garbage, up to the program's end: some
    libraries complain if something is left then.
    """
    global _in_program
    _in_program = True
    atexit.register(gc.unfreeze)
    if "torchmetrics" in sys.modules:
        return
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        package = importlib.util.module_from_spec(spec)
        package.__class__ = _Deferred
        sys.modules[name] = package
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, package)
    # Its modules import the one, and Lightning asks for the other.
    said = {"_logger": logging.getLogger("torchmetrics"), "__version__": importlib.metadata.version("torchmetrics")}
    vars(sys.modules["torchmetrics"]).update(said)


@contextmanager
def uncollected() -> Iterator[None]:
    """Within the block Python looks for no garbage: for imports, which leave none, and take a fifth longer with it.

    In a program, if modules were imported, whatever there is after it is looked through no more: a look through those
    of torch and Lightning takes 0.2 s. In a notebook this would keep models that are no longer used.
    """
    before, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if _in_program and len(sys.modules) > modules:
            gc.freeze()
        if before:
            gc.enable()
