"""Which folder's latent cache serves a plan: it may have been written under other names, or with less in the plan."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ldm.autoencoder.codec import with_encoder
from ldm.errors import DataError, ResourceError
from ldm.latents.claims import publish, read_sealed, seal
from ldm.latents.manifest import CONTENTS, CacheSpec
from ldm.latents.shards import PLAN

log = logging.getLogger(__name__)


def default_folder(plan: CacheSpec, trust: Sequence[str] = ()) -> Path:
    """The folder of the cache if none is given.

    A folder is named by the fingerprint of its plan. One with the same content may have another name, because its plan
    was written under former names, or when a source's fingerprint did not yet cover its bytes, or for another decoder;
    it is used all the same.
    """
    folder = Path("cache") / plan.fingerprint()
    if folder.is_dir():
        return folder
    for other in sorted(Path("cache").glob(f"*/{PLAN}")):
        with suppress(DataError):  # a damaged folder is of no use here, and not ours to report
            found = CacheSpec.read(other.parent)
            same = not adopted(plan, found, trust).differences(found)
            if same and noted_source(other.parent) in (None, plan.source):
                return other.parent
    return folder


def adopted(plan: CacheSpec, found: CacheSpec, trust: Sequence[str] = ()) -> CacheSpec:
    """`plan`, with the autoencoder of `found` if that has the same encoder but does not say so.

    Plans had no hash of the encoder at first.
    """
    theirs = found.autoencoder
    if "encoder" in theirs or plan.differences(replace(found, autoencoder=plan.autoencoder)):
        return plan
    known = replace(found, autoencoder=with_encoder(theirs, trust))
    return plan if plan.differences(known) else replace(plan, autoencoder=theirs)


def noted_source(folder: Path) -> str | None:
    """The fingerprint recorded later, for a cache from before contents were part of it; None if there is none."""
    path = folder / CONTENTS
    return str(read_sealed(path)["source"]) if path.is_file() else None


def note_source(folder: Path, plan: CacheSpec) -> None:
    """Record what the source of such a cache holds now, so that later replacements are noticed."""
    log.warning(
        "%s: was made when only names and sizes of the images were recorded, so an image may since have been replaced "
        "by another of equal size; from now on that is noticed. Remove the folder to have it rebuilt",
        folder,
    )
    with suppress(ResourceError):  # a folder that is not writable can still be used
        publish(folder / CONTENTS, seal({"source": plan.source}))
