"""The fingerprint of what a cache, or a part of one, is made of, so that a change of all else leaves it as it is."""

from collections.abc import Sequence

from ldm.data.dataset import ImageDataset, aligned_apart, aligned_keys, texts
from ldm.data.fingerprint import together


def source(dataset: ImageDataset, aligned: Sequence[str] = ()) -> str:
    """Changes with the pictures and with what lies on them under the keys `aligned`.

    Of a data set that cannot tell these from the rest: as `former_source`.
    """
    apart = aligned_apart(dataset)
    if apart is None or not {*aligned} <= {*aligned_keys(dataset)}:
        return former_source(dataset)
    values = (f"{key} {apart.aligned_fingerprint(key)}" for key in sorted({*aligned}))
    return together(apart.bare_fingerprint(), *values)


def former_source(dataset: ImageDataset) -> str:
    """Changes with the pictures and all that lies on them, as the source of each cache did at first."""
    alone = texts(dataset)
    return dataset.fingerprint() if alone is None else alone.pictures_fingerprint()
