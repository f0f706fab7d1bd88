import torch

from ldm.weights.digest import weight_hash


def test_the_hash_follows_names_types_shapes_and_bytes_alone():
    a, b = torch.arange(6.0), torch.ones(2, dtype=torch.bfloat16)
    known = weight_hash({"a": a, "b": b})
    assert len(known) == 64
    assert weight_hash({"b": b, "a": a.clone().requires_grad_()}) == known
    transposed = a.reshape(2, 3).t().contiguous().t()
    assert weight_hash({"a": transposed}) == weight_hash({"a": a.reshape(2, 3)})
    others = [
        {"a": a},
        {"a": b, "b": a},
        {"a": a.reshape(2, 3), "b": b},
        {"a": a + 1, "b": b},
        {"a": a.double(), "b": b},
    ]
    assert known not in {weight_hash(other) for other in others}
