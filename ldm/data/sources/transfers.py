"""Bytes of files behind URLs, by fsspec: each request bounded in time, tried again, and compared with what was asked.

fsspec knows https://, s3://, gs://, memory:// and more, some with a package of their own (s3fs, gcsfs).
"""

import base64
import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ldm.data.sources.listing import natural
from ldm.data.sources.shards import Shard, changed
from ldm.errors import ConfigError, DataError, ResourceError
from ldm.ranges import CountOrZero, Positive

CHUNK = 8 << 20
"""Bytes that one request asks for at most."""

PAUSE = 0.5
"""Seconds before the second attempt; each following pause is twice as long."""

_THREADS = 16  # ask for the states of shards
_LONGEST_PAUSE = 30.0  # seconds between two attempts
_VERSIONS = ("ETag", "etag", "md5Hash", "Content-MD5", "LastModified", "Last-Modified", "mtime", "created")
_MD5 = ("md5Hash", "Content-MD5")
_NO_RANGES = "support range requests"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a full disk."""

_LATER = (408, 425, 429)  # the statuses of HTTP from 400 to 499 that may be others in a moment

Result = TypeVar("Result")


class NoRanges(Exception):
    """The server sends whole files alone."""


class Stalled(OSError):
    """Nothing came for too long."""


class Transfers:
    """Requests to one kind of file system.

    Args:
        timeout: seconds that one request for `CHUNK` bytes may take.
        retries: how often a request that failed is repeated, after pauses of 0.5 s, 1 s, 2 s, ...
        options: of fsspec's file system, such as {anon: true} of s3://.
    """

    def __init__(self, timeout: Positive, retries: CountOrZero, options: Mapping[str, Any] | None = None) -> None:
        self.timeout = timeout
        self.retries = retries
        self.options = dict(options or {})
        self._files: dict[str, list[Any]] = {}  # open ones that no thread reads at the moment
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": {}}

    def find(self, patterns: Sequence[str]) -> list[Shard]:
        """The present state of each file; a pattern with * or [ may name several.

        Raises:
            DataError: one is not there.
        """
        urls = [url for pattern in patterns for url in (self._matches(pattern) if _is_glob(pattern) else [pattern])]
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self.state, urls))

    def state(self, url: str) -> Shard:
        """Size and version of a file, as the server says."""
        return _shard(url, self._info(url))

    def _info(self, url: str) -> Mapping[str, Any]:
        def ask() -> Mapping[str, Any]:
            system = self._system(url)
            system.invalidate_cache()  # a listing that a glob has left there would hide a change
            info: Mapping[str, Any] = system.info(url)
            return info

        return self._tried(url, ask)

    def demand_arrived(self, shard: Shard, copy: Path) -> None:
        """Compare a copy with what the server says of the file now.

        Raises:
            ResourceError: the file was changed in between, or the server knows its MD5 and the copy has another.
        """
        info = self._info(shard.location)
        if _shard(shard.location, info) != shard:
            changed(shard.location)
        expected = next((str(info[key]) for key in _MD5 if info.get(key)), None)
        if expected is None:
            return
        with copy.open("rb") as file:
            found = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
        if found != expected:
            raise ResourceError(
                f"{shard.location}: arrived damaged: its MD5 is {found}, expected {expected}; start again"
            )

    def read(self, shard: Shard, offset: int, length: int) -> bytes:
        """A piece of a file, whole.

        Raises:
            NoRanges: the server sends nothing but whole files.
            ResourceError: it could not be had.
        """
        return self._tried(shard.location, lambda: self._piece(shard, offset, length))

    def download(self, shard: Shard, place: Path) -> None:
        """Write the whole file, from a server without ranges; a part that arrived is of no use then."""
        self._tried(shard.location, lambda: self._whole(shard, place), lambda: _size(place))

    def _piece(self, shard: Shard, offset: int, length: int) -> bytes:
        if self._process != os.getpid():  # a file system's thread does not come along with a fork
            self._files, self._process = {}, os.getpid()
        url = shard.location
        try:
            file = self._files[url].pop()  # taken out, for it has one position and several threads may read
        except LookupError:
            file = self._system(url).open(url, "rb", cache_type="none")
        file.seek(offset)
        found: bytes = file.read(length)
        if len(found) != length:
            raise OSError(f"{len(found)} of {length} bytes came from byte {offset} on")
        self._files.setdefault(url, []).append(file)
        return found

    def _whole(self, shard: Shard, place: Path) -> None:
        place.unlink(missing_ok=True)  # an attempt that was given up may still write into its own file
        with place.open("wb") as file:
            self._system(shard.location).get_file(shard.location, file)
        if (found := place.stat().st_size) != shard.size:
            raise OSError(f"{found} of {shard.size} bytes came")

    def _matches(self, pattern: str) -> list[str]:
        system = self._system(pattern)
        found = self._tried(pattern, lambda: system.glob(pattern))
        if not found:
            raise DataError(f"{pattern}: no such shard; set `shards` to files that exist, or a glob that finds some")
        return sorted((system.unstrip_protocol(name) for name in found), key=natural)

    def _system(self, url: str) -> Any:
        try:
            import fsspec  # type: ignore[import-untyped]
        except ImportError as error:
            raise ConfigError(f"{url}: needs fsspec: pip install -e '.[sources]'") from error
        try:
            return fsspec.core.url_to_fs(url, **self.options)[0]
        except (ImportError, ValueError, TypeError) as error:  # a protocol without its package, or a wrong option
            raise ConfigError(f"{url}: {error}") from error

    def _tried(self, url: str, request: Callable[[], Result], arrived: Callable[[], int] = int) -> Result:
        """The result of the request, which is repeated where that may help."""
        for attempt in range(self.retries + 1):
            try:
                return self._bounded(request, arrived)
            except (ConfigError, NoRanges):
                raise
            except Exception as error:  # of fsspec, aiohttp, botocore, ...
                fault = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
                if _NO_RANGES in str(fault):
                    raise NoRanges(url) from error
                if isinstance(fault, OSError) and fault.errno in NO_ROOM:
                    raise fault from None
                _refuse_for_good(url, error, fault)
                last = fault
            self._files.pop(url, None)
            if attempt < self.retries:
                time.sleep(min(_LONGEST_PAUSE, PAUSE * 2**attempt))
        raise ResourceError(
            f"{url}: failed {self.retries + 1} times, at last with {type(last).__name__}: {_words(last)}. See that "
            "the server can be reached from here, and start again: what has arrived is kept"
        )

    def _bounded(self, request: Callable[[], Result], arrived: Callable[[], int]) -> Result:
        """In a thread of its own, which is left behind where nothing comes: no library's own limit is relied on."""
        results: list[Result] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(request())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="transfer", daemon=True)
        thread.start()
        before = -1
        while thread.is_alive() and before < (now := arrived()):
            before = now
            thread.join(self.timeout)
        if errors:
            raise errors[0]
        if not results:
            raise Stalled(f"no answer within {self.timeout:g} s")
        return results[0]


def _shard(url: str, info: Mapping[str, Any]) -> Shard:
    if not isinstance(info.get("size"), int):
        raise DataError(f"{url}: the server does not say how many bytes it has, so a cut copy could not be noticed")
    return Shard(url, info["size"], str(next((info[key] for key in _VERSIONS if info.get(key)), "")))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _refuse_for_good(url: str, error: Exception, fault: BaseException) -> None:
    """Raise DataError where another attempt would end the same: there is no such file, or it may not be read."""
    status = getattr(fault, "status", None)
    denied = isinstance(fault, PermissionError) or status in (401, 403)
    missing = isinstance(fault, FileNotFoundError) or status in (404, 410)
    if denied:
        raise DataError(
            f"{url}: the server refuses it ({_words(fault)}); see to the credentials, or `options`"
        ) from error
    if missing:
        raise DataError(f"{url}: no such file there; see that `shards` names those that exist") from error
    if isinstance(status, int) and 400 <= status < 500 and status not in _LATER:
        raise DataError(f"{url}: the server refuses the request ({_words(fault)})") from error


def _is_glob(pattern: str) -> bool:
    return "*" in pattern or "[" in pattern


def _words(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
