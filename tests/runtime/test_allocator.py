import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
from ldm.runtime import allocator
allocator.keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
size = 2**24
b'x' * size  # touches every page
before = faults()
for _ in range(20):
    b'x' * size
print(faults() - before)
"""


def pages_cleared(**environment):
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, env=environment, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_used_again():
    given_back = pages_cleared(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert pages_cleared() < given_back / 5
