from concurrent.futures import ThreadPoolExecutor

import torch

from ldm.runtime.full_precision import full_precision


def test_autocast_and_fast_kernels_are_off_within_and_as_before_afterwards(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = torch.backends.mkldnn.matmul.fp32_precision
    a = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision("cpu"):
            product = a @ a
            assert not torch.backends.cudnn.benchmark
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert (a @ a).dtype == torch.bfloat16
    assert product.dtype == torch.float32
    torch.testing.assert_close(product.double(), a.double() @ a.double(), rtol=1e-5, atol=1e-4)
    assert torch.backends.cudnn.benchmark
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_threads_within_at_once_leave_the_settings_as_they_were():
    """One leaves while another is within, whose own leaving must not bring back what it found."""
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    first, second = full_precision("cpu"), full_precision("cpu")
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(first.__enter__).result()
        other.submit(second.__enter__).result()
        one.submit(first.__exit__, None, None, None).result()
        assert convolutions.fp32_precision == "ieee"
        other.submit(second.__exit__, None, None, None).result()
    assert convolutions.fp32_precision == before
