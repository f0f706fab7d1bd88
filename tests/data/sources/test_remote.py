"""Shards behind URLs against a loopback server that fails, stalls, cuts, changes files and refuses ranges."""

import errno
import io
import logging
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
from torch.utils.data import DataLoader

from ldm.data.sources import remote
from ldm.data.sources.remote import Store
from ldm.data.sources.shards import Shard
from ldm.data.sources.transfers import Transfers
from ldm.data.sources.webdataset import WebDataset
from ldm.errors import ConfigError, DataError, ResourceError
from tests.tars import png, served, until, write_tar

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.data.sources.transfers.PAUSE", 0.01)
    return tmp_path


@pytest.fixture
def server():
    with served() as running:
        yield running


def store(max_bytes=10**9, **params) -> Store:
    return Store("store", max_bytes=max_bytes, **{"timeout": 10.0, "retries": 2} | params)


def filled(server, here, shards=3, items=4, side=8) -> str:
    """Shards on the server, and the same ones in `here`; returns their URL."""
    for shard in range(shards):
        numbers = range(items * shard, items * shard + items)
        files = {f"{n:04}.png": png(n, side, side) for n in numbers} | {f"{n:04}.txt": b"c%d" % n for n in numbers}
        server.files[f"{shard}.tar"] = write_tar(here / f"{shard}.tar", dict(sorted(files.items()))).read_bytes()
    return server.url(f"{{0..{shards - 1}}}.tar")


def pixels(dataset) -> list[int]:
    return [int(np.asarray(dataset[row]["image"]).sum()) for row in range(len(dataset))]


def copies(here) -> list:
    return sorted((here / "store").glob("*.shard"))


def test_items_are_those_of_local_tars_and_each_shard_is_fetched_once(server, here):
    url = filled(server, here)
    dataset = WebDataset(url, store())
    local = WebDataset("{0..2}.tar", index="local")
    dataset.prepare()
    assert pixels(dataset) == pixels(local)
    assert dataset.fingerprint() == local.fingerprint()
    assert dataset[5]["caption"] == "c5"
    assert [server.gets(f"{shard}.tar") for shard in range(3)] == [1, 1, 1]
    again = WebDataset(url, store())
    assert pixels(again) == pixels(local)
    assert [server.gets(f"{shard}.tar") for shard in range(3)] == [1, 1, 1]


def fetched(url: str) -> int:
    return sum(pixels(WebDataset(url, Store("store", 10**9))))


def test_several_processes_fetch_a_shard_once(server, here):
    url = filled(server, here)
    with ProcessPoolExecutor(3) as pool:
        assert len(set(pool.map(fetched, [url] * 3))) == 1
    assert [server.gets(f"{shard}.tar") for shard in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("fault", ["500", "stall", "cut"])
def test_a_fault_is_tried_again(server, here, fault):
    url = filled(server, here)
    server.faults = [fault, fault]
    dataset = WebDataset(url, store(timeout=1.0))
    assert pixels(dataset) == pixels(WebDataset("*.tar", index="local"))
    assert server.gets("0.tar") == 3


@pytest.mark.parametrize(("fault", "words"), [("500", "500"), ("stall", "no answer within 0.3 s"), ("cut", "")])
def test_a_fault_that_stays_is_one_message_and_what_came_is_kept(server, here, fault, words, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK", 4096)
    url = filled(server, here, shards=1)
    assert len(server.files["0.tar"]) > 2 * 4096
    server.faults = ["", *[fault] * 3]
    with pytest.raises(ResourceError, match=rf"0\.tar: failed 3 times, at last with .*{words}.* kept"):
        WebDataset(url, store(timeout=0.3))
    (part,) = (here / "store").glob("*.part")
    assert part.stat().st_size == 4096
    server.log.clear()
    assert len(WebDataset(url, store())) == 4
    assert next(asked for method, _, asked in server.log if method == "GET").startswith("bytes=4096-")
    assert not list((here / "store").glob("*.part"))


def test_a_server_without_ranges_sends_whole_shards(server, here, caplog):
    url = filled(server, here)
    server.ranges = False
    server.faults = ["cut", "stall"]
    dataset = WebDataset(url, store(timeout=1.0))
    assert pixels(dataset) == pixels(WebDataset("*.tar", index="local"))
    with pytest.raises(ConfigError, match=r"2\.tar: the server sends whole files only, 3 shards of 30720 bytes"):
        WebDataset(url, store(20_000))


def test_a_store_that_is_too_small_for_a_shard_names_both_numbers(server, here):
    url = filled(server, here)
    with pytest.raises(ConfigError, match=r"0\.tar: has 10240 bytes, and the store .*/store may hold 9000"):
        WebDataset(url, store(9000))


def test_a_store_that_is_too_small_for_all_reads_single_items(server, here, caplog):
    url = filled(server, here)
    local = WebDataset("*.tar", index="local")
    with caplog.at_level(logging.WARNING):
        dataset = WebDataset(url, store(20_480))
    assert "3 shards of 30720 bytes together, and the store" in caplog.text
    assert "items are fetched one by one" in caplog.text
    assert len(copies(here)) == 2
    dataset.prepare()
    server.log.clear()
    order = np.random.default_rng(0).permutation(12).tolist()
    assert [np.asarray(dataset[row]["image"]).sum() for row in order] == [
        np.asarray(local[row]["image"]).sum() for row in order
    ]
    assert len(copies(here)) == 2  # no thrashing
    asked = [(name, wanted) for method, name, wanted in server.log if method == "GET"]
    assert {name for name, _ in asked} == {"0.tar"}
    assert len(asked) <= 4
    assert dataset.fingerprint() == local.fingerprint()


def test_items_in_order_are_read_ahead(server, here):
    url = filled(server, here, shards=3, items=40)
    size = len(server.files["0.tar"])
    dataset = WebDataset(url, store(2 * size))
    server.log.clear()
    for row in range(40):  # the first shard made way for the others
        dataset[row]
    assert server.gets("0.tar") < 15


def test_threads_that_read_at_once_do_not_move_each_others_place(monkeypatch):
    class Slow(io.BytesIO):
        def seek(self, place: int, whence: int = 0) -> int:
            found = super().seek(place, whence)
            time.sleep(0.05)
            return found

    class System:
        def open(self, *args, **options) -> Slow:
            return Slow(bytes(range(8)))

    transfers = Transfers(timeout=10.0, retries=0)
    monkeypatch.setattr(transfers, "_system", lambda url: System())
    shard = Shard("x://a", 8, "")
    transfers.read(shard, 0, 1)
    with ThreadPoolExecutor(4) as pool:
        assert b"".join(pool.map(lambda place: transfers.read(shard, place, 1), range(8))) == bytes(range(8))


def test_workers_share_the_store(server, here):
    url = filled(server, here)
    dataset = WebDataset(url, store(20_480))
    expected = pixels(WebDataset("*.tar", index="local"))
    loader = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=list)
    assert [int(np.asarray(item["image"]).sum()) for batch in loader for item in batch] == expected


def test_a_file_that_changes_while_it_is_fetched_is_not_taken(server, here, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK", 4096)
    url = filled(server, here, shards=1)
    shards = store()
    found = shards.find([url.replace("{0..0}", "0")])
    other = write_tar(here / "other.tar", {f"{n}.png": png(n + 50, 8, 8) for n in range(4)}).read_bytes()
    read = shards.transfers.read

    def changes(shard, offset, length):
        data = read(shard, offset, length)
        server.files["0.tar"] = other
        return data

    monkeypatch.setattr(shards.transfers, "read", changes)
    with (
        pytest.raises(ResourceError, match=r"0\.tar: was changed or removed while it was in use"),
        shards.whole(found[0]),
    ):
        pass
    assert not copies(here)
    assert not list((here / "store").glob("*.part"))
    monkeypatch.undo()
    os.chdir(here)
    assert pixels(WebDataset(url, store())) == pixels(WebDataset("other.tar", index="local"))


def test_a_listing_that_is_kept_does_not_hide_a_change(monkeypatch):
    import fsspec

    kept = {}

    class Listed(type(fsspec.filesystem("memory"))):
        def info(self, path, **options):
            return kept.setdefault(path, {**super().info(path, **options), "ETag": hash(self.cat(path))})

        def invalidate_cache(self, path=None):
            kept.clear()

    transfers = Transfers(timeout=10.0, retries=0)
    system = Listed()
    monkeypatch.setattr(transfers, "_system", lambda url: system)
    states = []
    for content in (b"one", b"two"):
        system.pipe("/a.tar", content)
        states.append(transfers.state("memory://a.tar"))
    system.rm("/a.tar")
    assert states[0] != states[1]


def test_a_shard_that_changes_later_stops_the_run(server, here):
    url = filled(server, here)
    dataset = WebDataset(url, store(20_480))
    server.files["0.tar"] = write_tar(here / "x.tar", {f"{n}.png": png(n + 50, 8, 8) for n in range(4)}).read_bytes()
    with pytest.raises(ResourceError, match=r"0\.tar: was changed or removed while it was in use"):
        dataset[1]
    del server.files["0.tar"]
    with pytest.raises(ResourceError, match=r"0\.tar: no such file there"):
        dataset[3]


def test_copies_used_longest_ago_make_way_but_not_one_in_use(server, here):
    filled(server, here, shards=4)
    shards = store(30_720)
    zero, one, two, three = shards.find([server.url(f"{n}.tar") for n in range(4)])
    for age, shard in ((300, zero), (200, one), (100, two)):
        with shards.whole(shard) as path:
            stat = path.stat()
        os.utime(path, (stat.st_atime - age, stat.st_mtime - age))
    with shards.whole(zero) as oldest:
        os.utime(oldest, (0, 0))
        with shards.whole(three):
            assert oldest.exists()
            assert not shards._place(one).exists()
            assert sum(path.stat().st_size for path in copies(here)) == 30_720


def test_no_room_beside_copies_in_use(server, here, monkeypatch):
    monkeypatch.setattr(remote, "_PATIENCE", 0.3)
    filled(server, here, shards=2)
    shards = store(10_240)
    zero, one = shards.find([server.url(f"{n}.tar") for n in range(2)])
    with (
        shards.whole(zero),
        pytest.raises(ResourceError, match=r"no room for .*1\.tar \(10240 bytes\) within `max_bytes` \(10240\)"),
        shards.whole(one),
    ):
        pass
    entered = threading.Event()

    def later():
        with shards.whole(one):
            entered.set()

    with shards.whole(zero):
        thread = threading.Thread(target=later)
        thread.start()
    until(entered.is_set)
    thread.join()


def test_a_full_disk_keeps_what_has_come(server, here, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK", 4096)
    url = filled(server, here, shards=1)
    write = remote._write

    def full(handle, data, offset):
        if offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(handle, data, offset)

    monkeypatch.setattr(remote, "_write", full)
    message = (
        r"/store: cannot keep .*0\.tar \(10240 bytes\): No space left on device; make room there, or lower `max_bytes`"
    )
    with pytest.raises(ResourceError, match=message):
        WebDataset(url, store())
    assert [part.stat().st_size for part in (here / "store").glob("*.part")] == [4096]


def test_a_store_where_nothing_can_be_written(server, here):
    url = filled(server, here)
    (here / "store").write_text("")
    with pytest.raises(ResourceError, match=r"/store: cannot keep .*name another `folder`"):
        WebDataset(url, store())


def test_an_unreachable_host_and_missing_files(server, here):
    with pytest.raises(ResourceError, match=r"http://127\.0\.0\.1:9/0\.tar: failed 3 times, at last with .*See that"):
        WebDataset("http://127.0.0.1:9/{0..3}.tar", store())
    with pytest.raises(DataError, match=r"x\.tar: no such file there"):
        WebDataset(server.url("x.tar"), store())
    with pytest.raises(ConfigError, match="nonsense://"):
        WebDataset("nonsense://a/b.tar", store())


def test_other_file_systems_of_fsspec(here):
    import fsspec

    files = {f"{n}.png": png(n) for n in range(3)}
    memory = fsspec.filesystem("memory")
    for shard in ("a", "b"):
        memory.pipe(f"/set/{shard}.tar", write_tar(here / "x.tar", files).read_bytes())
    assert pixels(WebDataset("memory://set/*.tar", store())) == 2 * pixels(WebDataset("x.tar"))
    with pytest.raises(DataError, match=r"memory://none/\*\.tar: no such shard"):
        WebDataset("memory://none/*.tar", store())
    memory.rm("/set", recursive=True)


def test_a_parquet_file_behind_a_url(server, here):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"caption": ["a", "b"]}), here / "x.parquet")
    server.files["x.parquet"] = (here / "x.parquet").read_bytes()
    shards = store()
    (found,) = shards.find([server.url("x.parquet")])
    with shards.whole(found) as path:
        assert parquet.read_table(path)["caption"].to_pylist() == ["a", "b"]
