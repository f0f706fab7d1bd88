from collections.abc import Iterator

import pytest

from tests.config.house import PARTS
from tests.own_package import importable


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The package of house.py."""
    files = {"house/__init__.py": "from house.parts import Part as Shown\n", "house/parts.py": PARTS}
    with importable(tmp_path_factory.mktemp("site"), files):
        yield
