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
from ldm.latents.parts import PartSpec
from ldm.latents.shards import PLAN

log = logging.getLogger(__name__)


def place(plans: Sequence[CacheSpec], folder: Path | None, trust: Sequence[str] = ()) -> tuple[Path, CacheSpec]:
    """The folder of a cache, and the plan as it would be written there.

    A folder is named by the fingerprint of its plan. One with the same content may have another name, because its plan
    was written under former names, or when a source's fingerprint did not yet cover its bytes, or for another decoder,
    or when captions lay in the cache itself, or what lies on the pictures counted as if it did; it is used all the
    same.

    Args:
        plans: what the cache is to hold; then the same as its plan was written formerly, such as with captions in it,
            and what holds more, with mirror images.
        folder: the one that was named; None: the one in `cache/` that serves.
        trust: packages that the configuration of an autoencoder may name.
    """
    if folder is not None:
        return folder, _as_found(plans, folder, trust)
    for named in (Path("cache") / own.fingerprint() for own in plans):
        if named.is_dir():
            return named, _as_found(plans, named, trust)
    for other in sorted(Path("cache").glob(f"*/{PLAN}")):
        with suppress(DataError):  # of another kind; or damaged: of no use here, and not ours to report
            meant = _as_found(plans, other.parent, trust)
            same = not meant.differences(CacheSpec.read(other.parent))
            if same and noted_source(other.parent) in (None, meant.source):
                return other.parent, meant
    return Path("cache") / plans[0].fingerprint(), plans[0]


def place_part(plans: Sequence[PartSpec], folder: Path | None) -> tuple[Path, PartSpec]:
    """As `place`, for a part."""
    if folder is None:
        named = ((Path("cache") / plan.fingerprint(), plan) for plan in plans)
        return next((one for one in named if one[0].is_dir()), (Path("cache") / plans[0].fingerprint(), plans[0]))
    if not (folder / PLAN).is_file():
        return folder, plans[0]
    found = PartSpec.read(folder)
    return folder, next((plan for plan in plans if not plan.differences(found)), plans[0])


def _as_found(plans: Sequence[CacheSpec], folder: Path, trust: Sequence[str]) -> CacheSpec:
    """The plan as it would have been written when that in the folder was."""
    if not (folder / PLAN).is_file():
        return plans[0]
    found = CacheSpec.read(folder)
    alike = [plan for plan in plans if plan.captions == found.captions] or plans[:1]
    meant = [adopted(plan, found, trust) for plan in alike]
    return next((plan for plan in meant if not plan.differences(found)), meant[0])


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
