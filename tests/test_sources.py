"""Where shards come from: a real server on this machine that is slow, refuses, drops and cuts short; commands; buckets."""

import io
import json
import os
import resource
import shutil
import signal
import socket
import tarfile
import time
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from stair.data import remote as sources
from stair.data import shard_index
from stair.data.pairs import EvaluationPairs
from stair.data.remote import LastingError, NoRangeError, Remote, open_shard, read_ranges
from stair.data.shard_index import SampleReader, build, read_index, sizes, write
from stair.errors import FileError, SettingError
from tests.support.server import Server
from tests.support.shards import digest, keys, loader, picture, shards, take, write_shards


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    yield server
    server.httpd.shutdown()
    server.httpd.server_close()


QUICK = Remote(timeout=20, retries=4)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(sources, "_PAUSE", 0.01)


def manifest(folder: Path, sizes: list[int]) -> None:
    entries = {
        f"train-{i:04d}.tar": {"samples": size, "bytes": (folder / f"train-{i:04d}.tar").stat().st_size, "sha256": ""}
        for i, size in enumerate(sizes)
    }
    (folder / "index.json").write_text(json.dumps({"format": 1, "shards": entries}))


def indexed(folder: Path, counts: list[int], bad=None) -> str:
    """Shards with their indexes, as `stair doctor --write_index` leaves them."""
    spec = write_shards(folder, counts, bad)
    for path in folder.glob("*.tar"):
        write(f"{path}.idx", build(path)[0], path.stat().st_size)
    manifest(folder, counts)
    return spec


# ---- bytes over a bad connection


@pytest.mark.parametrize(
    "manner", ["good", "busy", "drops", pytest.param("stuck", marks=pytest.mark.slow), "slow", "rangeless"]
)
def test_what_is_read_over_a_bad_connection_is_the_file_to_the_byte(tmp_path, server, manner):
    write_shards(tmp_path / "served", [16])
    data = (tmp_path / "served" / "train-0000.tar").read_bytes()
    remote = Remote(timeout=0.5, retries=20) if manner == "stuck" else QUICK
    url = server.url(manner, "train-0000.tar")
    with open_shard(url, remote) as file:
        assert file.read() == data
    if manner == "rangeless":
        (refused,) = read_ranges([(url, 100, 900)], remote)
        assert isinstance(refused, NoRangeError) and "data.remote.cache" in str(refused)
        return
    ranges = [(url, start, start + 700) for start in range(0, len(data), 1_000)]
    assert list(read_ranges(ranges, remote)) == [data[start:stop] for _, start, stop in ranges]


def test_a_file_of_many_blocks_comes_whole_over_connections_that_break_off(tmp_path, server, monkeypatch):
    monkeypatch.setattr(sources, "_PART", 512)
    data = os.urandom(3 * 4_096)
    (tmp_path / "served" / "a").write_bytes(data)
    for manner in ("good", "drops", "busy"):
        with open_shard(server.url(manner, "a"), QUICK) as file:
            assert file.read() == data


def test_what_cannot_be_had_is_given_up_with_its_cause_in_bounded_time(tmp_path, server):
    write_shards(tmp_path / "served", [16])
    start = time.monotonic()

    def refusal(url):
        (found,) = read_ranges([(url, 0, 9_000)], QUICK)
        assert isinstance(found, OSError)
        return found

    gone = refusal(server.url("gone", "train-0000.tar"))
    assert isinstance(gone, LastingError) and "train-0000.tar" in str(gone)
    assert server.asked["gone/train-0000.tar"] == 1  # asking again would not help
    assert "tried 5 times" in str(refusal(server.url("truncated", "train-0000.tar")))
    assert server.asked["truncated/train-0000.tar"] == 5
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert "tried 5 times" in str(refusal(f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar"))
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("http://169.254.169.254/latest/meta-data", "local address 169.254.169.254"),
        ("http://localhost:1/x", "local address"),
        ("http://[::1]:1/x", "local address ::1"),
        ("http://0.0.0.0:1/x", "local address 0.0.0.0"),
        ("file:///etc/passwd", "only http and https"),
        ("ftp://127.0.0.1/x", "only http and https"),
    ],
)
def test_a_redirect_to_an_address_of_this_network_is_not_followed(server, target, reason):
    with pytest.raises(LastingError, match=reason):
        open_shard(server.url("to:" + target.encode().hex()), QUICK).read()


def test_a_redirect_on_the_server_itself_is_followed(tmp_path, server):
    (tmp_path / "served" / "a.tar").write_bytes(b"here")
    there = server.url("to:" + server.url("good", "a.tar").encode().hex())
    assert open_shard(there, QUICK).read() == b"here"


def test_a_password_in_netrc_is_sent_and_one_in_a_url_is_an_error(tmp_path, vocab, server, monkeypatch):
    with pytest.raises(ValueError, match=r"on host.x has a name or password in its URL.*netrc") as refused:
        loader("https://me:secret@host.x/{0..3}.tar", vocab)
    assert "secret" not in str(refused.value)
    with pytest.raises(ValueError, match=r"give a brace pattern"):
        loader("s3://bucket/*.tar", vocab)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    sent = []
    plain = server.answer
    monkeypatch.setattr(
        server, "answer", lambda ask, *more: (sent.append(ask.headers["Authorization"]), plain(ask, *more))
    )
    (tmp_path / "served" / "a").write_bytes(b"here")
    fsspec.get_filesystem_class("http").clear_instance_cache()  # sessions read the file when they are opened
    assert list(read_ranges([(server.url("good", "a"), 0, 4)], QUICK)) == [b"here"]
    assert sent == ["Basic bWU6c2VjcmV0"]


# ---- commands


def test_a_command_that_fails_is_an_error_and_one_that_is_left_ends():
    for command, reason in (("exit 4", "`exit 4` ended with 4"), ("printf abc; exit 3", "ended with 3")):
        with pytest.raises(OSError, match=reason):
            open_shard("pipe:" + command, QUICK).read()
    with open_shard("pipe:yes", QUICK) as file:
        assert file.read(10) == b"y\n" * 5


def test_a_command_that_is_silent_or_does_not_end_is_given_up_in_bounded_time():
    start = time.monotonic()
    remote = Remote(timeout=0.3, retries=1)
    for command, reason in (
        ("sleep 60", r"`sleep 60` gave no byte for 0.3 s"),
        ("printf abc; sleep 60 | cat", r"gave no byte for 0.3 s"),
        ("printf abc; exec >&-; sleep 60", r"closed its output and did not end for 0.3 s"),
    ):
        with pytest.raises(OSError, match=reason):
            open_shard("pipe:" + command, remote).read()
    assert time.monotonic() - start < 20
    with open_shard("pipe:for i in 1 2 3; do sleep 0.4; printf $i; done", Remote(timeout=5, retries=0)) as file:
        assert file.read() == b"123"  # slow is not silent


def test_a_command_that_is_left_takes_what_it_started_with_it(tmp_path):
    number = tmp_path / "pid"
    file = open_shard(f"pipe:printf abc; sh -c 'echo $$ > {number}; exec sleep 60' | cat", QUICK)
    assert file.read1(3) == b"abc"
    while not (number.exists() and number.read_text().strip()):
        time.sleep(0.01)
    file.close()
    state = Path(f"/proc/{number.read_text().strip()}/stat")
    for _ in range(200):  # killed, it stays a zombie until somebody asks for its status
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    pytest.fail("what the command started goes on")


# ---- buckets


class FlakyBucket(MemoryFileSystem):
    protocol = "flaky"
    failures, failure = 0, TimeoutError

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky:/"))

    def cat_file(self, path, start=None, end=None, **options):
        bucket = type(self)
        if bucket.failures > 0:
            bucket.failures -= 1
            raise bucket.failure("the bucket is tired")
        return super().cat_file(path, start, end, **options)


class ClientPayloadError(Exception):
    """What aiohttp raises where a transfer is cut, under s3fs and gcsfs: no OSError."""


class NoCredentialsError(Exception):
    """As botocore's."""


@pytest.mark.parametrize("failure", [TimeoutError, ClientPayloadError, IndexError])
def test_buckets_are_read_through_fsspec_and_through_their_failures(tmp_path, vocab, monkeypatch, failure):
    indexed(tmp_path, [16])
    monkeypatch.setattr(FlakyBucket, "failure", failure)
    fsspec.register_implementation("flaky", FlakyBucket, clobber=True)
    for path in tmp_path.glob("*.*"):
        fsspec.filesystem("flaky").pipe(f"/bucket/{path.name}", path.read_bytes())
    FlakyBucket.failures = 3
    with open_shard("flaky://bucket/train-0000.tar", QUICK) as file:
        assert file.read() == (tmp_path / "train-0000.tar").read_bytes() and FlakyBucket.failures == 0
    train = loader("flaky://bucket/train-0000.tar", vocab, remote=QUICK)
    FlakyBucket.failures = 3
    assert len(set(keys(train))) == 16
    for url, reason in (
        ("flaky://bucket/other.tar", "FileNotFoundError"),
        ("nosuch://bucket/a.tar", "cannot be opened: Protocol not known: nosuch"),
    ):
        with pytest.raises(LastingError, match=reason):
            open_shard(url, QUICK).read()
    monkeypatch.setattr(FlakyBucket, "failure", NoCredentialsError)
    FlakyBucket.failures = 9
    with pytest.raises(LastingError, match="NoCredentialsError"):
        open_shard("flaky://bucket/train-0000.tar", QUICK).read()
    FlakyBucket.failures = 0
    fsspec.register_implementation("absent", "no_such_package.Files", errtxt="Install no_such_package", clobber=True)
    with pytest.raises(LastingError, match=r"Install no_such_package; .*remote"):
        open_shard("absent://bucket/a.tar", QUICK).read()


# ---- training and evaluation over them


@pytest.mark.parametrize("manner", ["drops", "busy", "slow"])
def test_training_over_a_bad_connection_sees_what_training_on_local_files_sees_also_resumed(
    tmp_path, vocab, server, manner
):
    spec = indexed(tmp_path / "served", [9, 12])
    whole = take(loader(spec, vocab), 8)
    url = server.url(manner, "train-{0000..0001}.tar")
    first = loader(url, vocab, remote=QUICK)
    assert take(first, 3) == whole[:3]
    second = loader(url, vocab, remote=QUICK)
    second.load_state_dict(first.state_dict())
    assert take(second, 5) == whole[3:]


def test_a_bad_sample_far_away_is_replaced_as_a_near_one_is(tmp_path, vocab, server):
    spec = indexed(tmp_path / "served", [9, 12], {"00003.png": b"x", "00004.json": b"{}"})
    options = {"max_bad_share": 0.5}
    near, far = (
        loader(spec, vocab, **options),
        loader(server.url("good", "train-{0000..0001}.tar"), vocab, remote=QUICK, **options),
    )
    assert [digest(batch) for batch in far] == [digest(batch) for batch in near]
    assert {cause: count for (cause, _, _), count in far.counter.skipped.items()} == {
        cause: count for (cause, _, _), count in near.counter.skipped.items()
    }


def test_a_server_that_is_gone_stops_the_run_with_the_shard_named_and_does_not_hang(tmp_path, vocab, server):
    indexed(tmp_path / "served", [20, 20])
    data = loader(server.url("good", "train-{0000..0001}.tar"), vocab, remote=Remote(timeout=20, retries=1))
    server.httpd.shutdown()
    server.httpd.server_close()
    start = time.monotonic()
    with pytest.raises(FileError, match=r"no (good )?sample .*shard broken: .*tried 2 times.*train-000\d.tar"):
        list(data)
    assert time.monotonic() - start < 60


def test_a_shard_that_is_gone_is_counted_and_replaced_by_the_next(tmp_path, vocab, server):
    indexed(tmp_path / "served", [12, 12])
    data = loader(
        server.url("good", "train-{0000..0001}.tar"), vocab, remote=QUICK, max_bad_share=0.9, global_batch_size=8
    )
    (tmp_path / "served" / "train-0001.tar").unlink()
    assert set(keys(data)) <= {f"train-0000/{n:05d}" for n in range(12)}
    assert data.counter.by_cause() == {"shard broken": 12}


def test_evaluation_sets_may_lie_far_away_with_an_index_or_without(tmp_path, server):
    spec = write_shards(tmp_path / "served", [5])
    near = EvaluationPairs(spec, 8, 10_000)
    url = server.url("busy", "train-0000.tar")
    for _ in range(2):
        far = EvaluationPairs(url, 8, 10_000, QUICK)
        assert [far[i].key for i in range(5)] == [near[i].key for i in range(5)]
        assert all((far[i].pixels == near[i].pixels).all() and far[i].captions == near[i].captions for i in range(5))
        indexed(tmp_path / "served", [5])


def test_remote_shards_without_an_index_are_an_error_that_says_what_to_do_or_are_drawn_from(tmp_path, vocab, server):
    write_shards(tmp_path / "served", [8])
    url = server.url("good", "train-0000.tar")
    with pytest.raises(FileError, match=r"has no index.*write_index.*resample") as refused:
        loader(url, vocab, remote=QUICK)
    assert "train-0000.tar" in str(refused.value.path)
    assert len(set(keys(loader(url, vocab, remote=QUICK, resample=True, train_samples=40)))) == 8
    indexed(tmp_path / "served", [8])
    with pytest.raises(OSError, match=r"train-0001.tar: FileNotFoundError"):  # not that it should be indexed
        loader(server.url("good", "train-{0000..0001}.tar"), vocab, remote=QUICK)


# ---- local copies


def test_copies_are_fetched_once_kept_within_their_limit_and_used_longest_ago_go_first(tmp_path, server):
    write_shards(tmp_path / "served", [8, 8, 8])
    urls = [server.url("drops", f"train-{i:04d}.tar") for i in range(3)]
    contents = [(tmp_path / "served" / f"train-{i:04d}.tar").read_bytes() for i in range(3)]
    size = max(map(len, contents))
    remote = Remote(timeout=20, retries=4, cache=str(tmp_path / "cache"), cache_gib=2.5 * size / 2**30)

    def read(i):
        before = server.asked.total()
        with open_shard(urls[i], remote) as file:
            assert file.read() == contents[i]
        return server.asked.total() > before

    def held():
        return sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.copy"))

    assert [read(i) for i in (0, 1, 0)] == [True, True, False]
    assert read(2) and held() <= 2.5 * size  # room is made by shard 1, which was used longest ago
    assert [read(i) for i in (0, 1)] == [False, True]
    small = Remote(timeout=20, retries=4, cache=str(tmp_path / "small"), cache_gib=0.5 * size / 2**30)
    with pytest.raises(SettingError) as refused:
        open_shard(urls[0], small)
    assert refused.value.setting == "data.remote.cache_gib"
    assert not list((tmp_path / "small").glob("*.copy")) and not list((tmp_path / "small").glob("*.part"))


def test_training_on_copies_needs_no_index_beside_the_shards(tmp_path, vocab, server):
    spec = write_shards(tmp_path / "served", [9, 12])
    manifest(tmp_path / "served", [9, 12])
    remote = Remote(timeout=20, retries=4, cache=str(tmp_path / "cache"))
    url = server.url("rangeless", "train-{0000..0001}.tar")
    assert take(loader(url, vocab, remote=remote), 8) == take(loader(spec, vocab), 8)
    assert server.asked["rangeless/train-0001.tar"] <= 3


def test_a_folder_that_cannot_hold_copies_is_an_error_before_anything_is_read(tmp_path, vocab):
    (tmp_path / "file").write_text("")
    for folder in (str(tmp_path / "file"), "/proc/nothing/can/be/made"):
        with pytest.raises(SettingError, match=folder) as refused:
            loader("http://nowhere/0.tar", vocab, remote=Remote(cache=folder))
        assert refused.value.setting == "data.remote.cache"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_is_full_of_copies_stops_the_run_and_leaves_no_part(tmp_path, vocab, server, workers):
    indexed(tmp_path / "served", [60])
    remote = Remote(timeout=20, retries=1, cache=str(tmp_path / "cache"))
    data = loader(server.url("good", "train-0000.tar"), vocab, remote=remote, workers=workers)
    shutil.rmtree(tmp_path / "cache")  # copies of the checks before the first step
    size = (tmp_path / "served" / "train-0000.tar").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if workers:  # whose process this one cannot limit
        data._loader.worker_init_fn = limit_files
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(SettingError, match=f"{tmp_path}/cache.*free space") as refused:
            next(iter(data))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert refused.value.setting == "data.remote.cache"
    assert not list((tmp_path / "cache").glob("*train-0000.tar.copy")) and not list((tmp_path / "cache").glob("*.part"))


def limit_files(worker: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, 1 << 15))


def test_settings_out_of_range_are_errors_by_name(vocab):
    for name, value in (("timeout", 0), ("retries", -1), ("cache_gib", 0)):
        with pytest.raises(SettingError) as refused:
            Remote(**{name: value})
        assert refused.value.setting == f"data.remote.{name}"
    assert shards(None, vocab).remote == Remote()


# ---- indexes


def test_an_index_says_where_each_member_of_each_sample_lies(tmp_path):
    write_shards(tmp_path, [5])
    path = tmp_path / "train-0000.tar"
    rows, _ = build(path)
    write(f"{path}.idx", rows, path.stat().st_size)
    data = path.read_bytes()
    index = read_index(str(path), QUICK)
    assert index[0].nbytes <= 40 and (index == rows).all() and len(index) == 5
    for n, (first, blocks, _) in enumerate(index.tolist()):
        with tarfile.open(fileobj=io.BytesIO(data[first * 512 : (first + blocks) * 512] + bytes(1024))) as tar:
            assert tar.getnames() == [f"{n:05d}.png", f"{n:05d}.json"]
            assert tar.extractfile(f"{n:05d}.png").read() == picture(n)
    with open(f"{path}.idx", "rb") as file:  # a plain numpy array
        stored = np.load(file, allow_pickle=False)
    assert stored.shape == (6, 3) and stored[0, 2] == len(data)


def test_missing_indexes_are_made_before_the_first_step_and_kept(tmp_path, vocab, monkeypatch):
    spec = write_shards(tmp_path, [6, 6])
    loader(spec, vocab)
    assert sorted(path.name for path in tmp_path.glob("*.idx")) == ["train-0000.tar.idx", "train-0001.tar.idx"]
    monkeypatch.setattr(shard_index, "build", lambda path: pytest.fail("made again"))
    assert len(set(keys(loader(spec, vocab)))) == 12


@pytest.mark.parametrize(("processes", "silent"), [(1, 0), (2, 0), (1, 60)])
def test_shards_are_indexed_by_one_or_several_processes_with_a_progress_bar_where_it_takes_long(
    tmp_path, monkeypatch, capsys, processes, silent
):
    write_shards(tmp_path, [3, 4, 5])
    monkeypatch.setattr(shard_index, "_IN_PARALLEL", 0)
    monkeypatch.setattr(shard_index, "_SILENT", silent)
    paths = [str(tmp_path / f"train-{i:04d}.tar") for i in range(3)]
    assert sizes(paths, QUICK, processes) == {path: (count, "") for path, count in zip(paths, (3, 4, 5), strict=True)}
    assert ("3/3" in capsys.readouterr().err) == (not silent)


def test_the_index_of_a_folder_that_cannot_be_written_to_lies_in_the_users_cache(tmp_path, vocab, monkeypatch):
    spec = write_shards(tmp_path, [6, 6])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    plain = shard_index.write

    def refuse(path, *more):
        if str(path).endswith(".idx"):
            raise PermissionError("read-only")
        plain(path, *more)

    monkeypatch.setattr(shard_index, "write", refuse)
    loader(spec, vocab)
    assert len(list((tmp_path / "home" / "stair" / "index").iterdir())) == 2 and not list(tmp_path.glob("*.idx"))
    monkeypatch.setattr(shard_index, "build", lambda path: pytest.fail("made again"))
    assert len(set(keys(loader(spec, vocab)))) == 12


def test_an_index_of_another_file_is_an_error_with_path_and_remedy(tmp_path, vocab):
    spec = write_shards(tmp_path, [8, 8])
    shard = tmp_path / "train-0000.tar"
    loader(spec, vocab)
    index = Path(f"{shard}.idx")
    whole = index.read_bytes()
    # of a shard of the same size
    shutil.copy(tmp_path / "train-0001.tar.idx", index)
    with pytest.raises(FileError, match=r"is not the file that its index describes.*write_index") as refused:
        list(loader(spec, vocab))
    assert refused.value.path == shard
    for content in (
        b"",
        b"rubbish",
        whole[:100],
        whole[:200],
        whole.replace(b"fortran_order': False", b"fortran_order': Fxlse"),
    ):
        index.write_bytes(content)
        with pytest.raises(FileError, match=r"write_index") as refused:
            list(loader(spec, vocab))
        assert refused.value.path == index
    index.write_bytes(whole)
    with open(shard, "ab") as file:
        file.write(bytes(512))
    with pytest.raises(FileError, match=r"made for a file of \d+ bytes.*write_index") as refused:
        loader(spec, vocab)
    assert refused.value.path == shard


@pytest.mark.parametrize("new", [lambda data: data[2_560:] + bytes(2_560), lambda data: data[:5_000]])
@pytest.mark.parametrize("place", ["here", "in a reader", "far away"])
def test_a_shard_that_is_replaced_during_a_run_stops_it(tmp_path, vocab, server, place, new):
    spec = indexed(tmp_path / "served", [40])
    spec = server.url("good", "train-0000.tar") if place == "far away" else spec
    batches = iter(loader(spec, vocab, workers=place == "in a reader", remote=QUICK))
    next(batches)
    shard = tmp_path / "served" / "train-0000.tar"
    shard.write_bytes(new(shard.read_bytes()))
    with pytest.raises(FileError, match=r"is not the file that its index describes.*write_index") as refused:
        list(batches)
    assert refused.value.path.name == "train-0000.tar"


@pytest.mark.parametrize("same_size", [False, True])
def test_an_index_of_another_shard_far_away_stops_the_run(tmp_path, vocab, server, same_size):
    folder = tmp_path / "served"
    indexed(folder, [8, 8 if same_size else 9])
    shutil.copy(folder / "train-0001.tar.idx", folder / "train-0000.tar.idx")
    with pytest.raises(FileError, match=r"write_index") as refused:
        list(loader(server.url("good", "train-0000.tar"), vocab, remote=QUICK))
    assert refused.value.path.name == "train-0000.tar"


def test_a_manifest_of_other_files_is_an_error_and_one_of_another_tool_is_not_ours(tmp_path, vocab):
    spec = indexed(tmp_path, [8])
    for name, content, reason in (
        ("index.json", json.dumps({"format": 7, "shards": {}}), r"its format is 7, expected 1"),
        ("index.json", "{", "not an index of shards"),
        ("index.json", json.dumps({"format": 1, "shards": {"train-0000.tar": {"samples": 8, "bytes": 5}}}), "says 5"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(FileError, match=reason):
            loader(spec, vocab)
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": [{"column_names": []}]}))
    assert len(loader(spec, vocab)) == 2
    manifest(tmp_path, [9])
    with pytest.raises(FileError, match="fewer samples than were counted"):
        list(loader(spec, vocab))


def test_a_sample_from_afar_costs_a_part_of_the_index(tmp_path, server):
    indexed(tmp_path / "served", [8])
    rows = np.resize(build(tmp_path / "served" / "train-0000.tar")[0], (100_000, 3))
    write(tmp_path / "served" / "train-0000.tar.idx", rows, 1)
    url = server.url("good", "train-0000.tar")
    one, other = SampleReader(QUICK).read([(url, 54_321, 100_000), (url, 54_321 + 8, 100_000)])
    assert one == other and one.key == "00001" and server.sent < 40_000


def test_neighbours_from_afar_are_read_by_one_request(tmp_path, vocab, server):
    spec = indexed(tmp_path / "served", [40])
    far, near = (loader(where, vocab, shuffle=0) for where in (server.url("good", "train-0000.tar"), spec))
    server.parts.clear()
    assert digest(next(iter(far))) == digest(next(iter(near)))
    assert sum(count for part, count in server.parts.items() if ".idx" not in part) == 1


@pytest.mark.parametrize(("machines", "shared"), [(2, 1), (3, 8), (4, 3)])
def test_a_machine_fetches_its_own_shards_and_few_that_another_one_fetches(tmp_path, vocab, server, machines, shared):
    """Parts may end within a shard. Of the 8 lanes of a batch, 2 serve two of 3 machines; a lane is of up to 4 shards."""
    indexed(tmp_path / "served", [15, 25] * 12)
    fetched, seen = Counter(), []
    for machine in range(machines):
        url = server.url("good", "train-{0000..0023}.tar")
        data = loader(url, vocab, machine, machines, remote=QUICK, global_batch_size=96)
        server.asked.clear()
        seen += keys(data)
        fetched.update({name.removesuffix(".idx") for name in server.asked})
    assert len(fetched) == 24 and len(seen) == len(set(seen)) == 480
    assert fetched.total() <= 24 + shared


def test_images_are_read_by_few_bytes_of_a_shard(tmp_path, vocab, server):
    """A batch costs its own samples, not the shards up to its place."""
    spec = indexed(tmp_path / "served", [400])
    url = server.url("good", "train-0000.tar")
    data = loader(url, vocab, remote=QUICK)
    data.load_state_dict({"epoch": 3, "batches": 90, "fingerprint": data.fingerprint})
    server.sent = 0
    first = digest(next(iter(data)))
    assert server.sent < os.path.getsize(spec.replace("*", "0000")) / 5
    near = loader(spec, vocab)
    near.load_state_dict({"epoch": 3, "batches": 90, "fingerprint": near.fingerprint})
    assert digest(next(iter(near))) == first


def test_an_index_json_of_unbounded_size_is_an_error(tmp_path, vocab, server, monkeypatch):
    indexed(tmp_path / "served", [8])
    monkeypatch.setattr(shard_index, "_LONGEST", 50)
    with pytest.raises(FileError, match="more than 50 bytes"):
        loader(server.url("good", "train-0000.tar"), vocab, remote=QUICK)
