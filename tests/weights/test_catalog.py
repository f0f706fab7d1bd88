"""The catalog is consistent with itself, and with the libraries that download the same files."""

import re

import pytest
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchvision.models import AlexNet_Weights, VGG16_Weights

from ldm.weights.catalog import FILES
from ldm.weights.sources import Package


@pytest.mark.parametrize("entry", FILES.values(), ids=FILES)
def test_an_entry_says_all(entry):
    assert re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{8}|", entry.sha256)
    assert entry.size > 1e6
    assert entry.use
    assert entry.license
    if digits := re.search(
        r"-([0-9a-f]{8})\.pth$", entry.file
    ):  # torch hub's rule; one file is named by something else
        assert entry.sha256.startswith(digits[1]) or entry.name == "efficientnet-lite0"


def test_files_do_not_share_a_place():
    assert len({entry.file for entry in FILES.values()}) == len(FILES)


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("alexnet", AlexNet_Weights.DEFAULT.url),
        ("vgg16", VGG16_Weights.DEFAULT.url),
        ("inception-2015", URL_INCEPTION_V3),
    ],
)
def test_addresses_are_those_of_the_libraries(name, url):
    assert FILES[name].source.url == url
    assert FILES[name].file == url.rsplit("/", 1)[1]


def test_what_packages_carry_is_known_to_the_last_byte():
    carried = [entry for entry in FILES.values() if isinstance(entry.source, Package)]
    assert carried
    for entry in carried:
        package = entry.source
        assert {len(digest) for digest in (entry.sha256, package.archive_sha256, package.member_sha256)} == {64}
        assert "==" in package.requirement
        assert all(len(other.sha256) == 64 and other.size for other in entry.beside)
