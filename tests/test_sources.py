"""Where shards come from: a real server on this machine that is slow, refuses, drops and cuts short; commands; buckets."""

import io
import json
import multiprocessing
import re
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from stair.data import counts
from stair.data import remote as sources
from stair.data.counts import Size, sizes
from stair.data.remote import LastingError, Remote
from stair.data.shard_cache import open_shard
from tests.test_resume_data import take
from tests.test_shards import keys, loader, shards, write_shards, write_words

QUICK = Remote(timeout=20, retries=4)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(sources, "_PAUSE", 0.01)


@pytest.fixture
def vocab(tmp_path):
    return write_words(tmp_path)


class Server:
    """Serves a folder under `/MANNER/name`, each manner with a fault of its own."""

    def __init__(self, folder: Path) -> None:
        self.asked: Counter[str] = Counter()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                manner, name = self.path.partition("?")[0].split("/")[1:]
                server.asked[f"{manner}/{name}"] += 1
                server.answer(self, manner, folder / name, server.asked[f"{manner}/{name}"])

            def log_message(self, *_):
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def url(self, manner: str, name: str = "") -> str:
        return f"http://127.0.0.1:{self.httpd.server_address[1]}/{manner}/{name}"

    def answer(self, ask: BaseHTTPRequestHandler, manner: str, path: Path, time_asked: int) -> None:
        if manner == "busy" and time_asked <= 2:
            return ask.send_error(503)
        if manner.startswith("to:"):
            ask.send_response(302)
            ask.send_header("Location", bytes.fromhex(manner[3:]).decode())
            return ask.end_headers()
        if not path.is_file() or manner == "gone":
            return ask.send_error(404)
        data, start = path.read_bytes(), 0
        asked = re.fullmatch(r"bytes=(\d+)-", ask.headers.get("Range", ""))
        if asked and manner != "rangeless":
            start = int(asked[1])
            ask.send_response(206)
            ask.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            ask.send_response(200)
        ask.send_header("ETag", f'"{time_asked if manner == "changing" else 0}"')
        ask.send_header("Content-Length", str(len(data) - start))
        ask.end_headers()
        step = {"drops": 7_000, "rangeless": 4_000 * time_asked, "changing": 7_000, "truncated": 9_000}.get(manner)
        stop = len(data) if step is None else start + step
        if manner == "truncated":
            stop = 9_000
        if manner == "stuck":
            stop = 5_000
        try:
            ask.wfile.write(data[start:stop])
            if manner == "stuck":
                ask.wfile.flush()
                time.sleep(1.5 if time_asked < 3 else 0)
                ask.wfile.write(data[start:][5_000 - start :] if time_asked >= 3 else b"")
        except OSError:
            pass  # the reader left


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    yield server
    server.httpd.shutdown()
    server.httpd.server_close()


def index(folder: Path, sizes: list[int]) -> None:
    entries = {
        f"train-{i:04d}.tar": {"samples": size, "bytes": (folder / f"train-{i:04d}.tar").stat().st_size, "sha256": ""}
        for i, size in enumerate(sizes)
    }
    (folder / "index.json").write_text(json.dumps({"format": 1, "shards": entries}))


# ---- one unbroken run of bytes


@pytest.mark.parametrize("manner", ["good", "busy", "drops", "rangeless", "stuck"])
def test_what_is_read_over_a_bad_connection_is_the_file_to_the_byte(tmp_path, server, manner):
    write_shards(tmp_path / "served", [16])
    data = (tmp_path / "served" / "train-0000.tar").read_bytes()
    remote = Remote(timeout=0.5, retries=20) if manner == "stuck" else QUICK
    with open_shard(server.url(manner, "train-0000.tar"), remote) as file:
        assert file.read() == data
    assert server.asked[f"{manner}/train-0000.tar"] == 1 or manner != "good"
    assert server.asked[f"{manner}/train-0000.tar"] > 1 or manner == "good"


def test_what_cannot_be_had_is_given_up_with_its_cause_in_bounded_time(tmp_path, server):
    write_shards(tmp_path / "served", [16])
    start = time.monotonic()
    with pytest.raises(LastingError, match="404"):
        open_shard(server.url("gone", "train-0000.tar"), QUICK).read()
    assert server.asked["gone/train-0000.tar"] == 1  # asking again would not help
    with pytest.raises(OSError, match=r"cannot be read beyond byte 9000, tried 5 times.*9000 of \d+ bytes"):
        open_shard(server.url("truncated", "train-0000.tar"), QUICK).read()
    with pytest.raises(LastingError, match="was changed while it was read"):
        open_shard(server.url("changing", "train-0000.tar"), QUICK).read()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match=r"beyond byte 0, tried 5 times: .*refused"):
            open_shard(f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar", QUICK).read()
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("http://169.254.169.254/latest/meta-data", "local address 169.254.169.254"),
        ("http://localhost:1/x", "local address"),
        ("http://[::1]:1/x", "local address ::1"),
        ("http://0.0.0.0:1/x", "local address 0.0.0.0"),
        ("file:///etc/passwd", "the server says 302"),
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


def test_a_command_that_fails_is_run_again_and_goes_on_where_it_stopped(tmp_path):
    whole = bytes(range(256)) * 5_000
    (tmp_path / "data").write_bytes(whole)
    failing = f"cd {tmp_path}; if [ -e once ]; then cat data; else touch once; head -c 700000 data; exit 3; fi"
    with open_shard("pipe:" + failing, QUICK) as file:
        assert file.read() == whole
    with pytest.raises(OSError, match=r"`exit 4` ended with 4 after 0 bytes"):
        open_shard("pipe:exit 4", QUICK).read()
    with open_shard("pipe:yes", QUICK) as file:  # left before its end, it is ended
        assert file.read(10) == b"y\n" * 5


def test_a_command_that_is_silent_or_does_not_end_is_given_up_in_bounded_time(tmp_path):
    start = time.monotonic()
    remote = Remote(timeout=0.3, retries=1)
    for command, reason in (
        ("sleep 60", r"beyond byte 0, tried 2 times: TimeoutError: `sleep 60` gave no byte for 0.3 s"),
        ("printf abc; sleep 60 | cat", r"beyond byte 3, .* gave no byte for 0.3 s"),
        ("printf abc; exec >&-; sleep 60", r"beyond byte 3, .* closed its output and did not end for 0.3 s"),
    ):
        with pytest.raises(OSError, match=reason):
            open_shard("pipe:" + command, remote).read()
    assert time.monotonic() - start < 20
    with open_shard("pipe:for i in 1 2 3; do sleep 0.4; printf $i; done", Remote(timeout=2, retries=0)) as file:
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


class FlakyBucket(MemoryFileSystem):
    protocol = "flaky"
    failures, failure = 0, TimeoutError

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky:/"))

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode, **options)
        if "w" in mode:
            return file
        bucket, plain = type(self), io.BytesIO(file.getvalue())

        class Flaky(io.BytesIO):
            size = len(plain.getvalue())

            def readinto(self, buffer):
                if self.tell() > 3_000 and bucket.failures > 0:
                    bucket.failures -= 1
                    raise bucket.failure("the bucket is tired")
                return super().readinto(memoryview(buffer)[:1_500])

        return Flaky(plain.getvalue())


class ClientPayloadError(Exception):
    """What aiohttp raises where a transfer is cut, under s3fs and gcsfs: no OSError."""


class NoCredentialsError(Exception):
    """As botocore's."""


@pytest.mark.parametrize("failure", [TimeoutError, ClientPayloadError, IndexError])
def test_buckets_are_read_through_fsspec_and_through_their_failures(tmp_path, vocab, monkeypatch, failure):
    write_shards(tmp_path, [16])
    monkeypatch.setattr(FlakyBucket, "failure", failure)
    fsspec.register_implementation("flaky", FlakyBucket, clobber=True)
    data = (tmp_path / "train-0000.tar").read_bytes()
    fsspec.filesystem("flaky").pipe("/bucket/train-0000.tar", data)
    FlakyBucket.failures = 3
    with open_shard("flaky://bucket/train-0000.tar", QUICK) as file:
        assert file.read() == data and FlakyBucket.failures == 0
    train = loader("flaky://bucket/train-0000.tar", vocab, train_samples=16, remote=QUICK)
    assert len(set(keys(train))) == 16
    with pytest.raises(LastingError, match="FileNotFoundError"):
        open_shard("flaky://bucket/other.tar", QUICK).read()
    monkeypatch.setattr(FlakyBucket, "_open", lambda *_, **__: raising(NoCredentialsError("none found")))
    with pytest.raises(LastingError, match="NoCredentialsError: none found"):
        open_shard("flaky://bucket/train-0000.tar", QUICK).read()
    fsspec.register_implementation("absent", "no_such_package.Files", errtxt="Install no_such_package", clobber=True)
    with pytest.raises(LastingError, match=r"Install no_such_package; `pip install .*remote"):
        open_shard("absent://bucket/a.tar", QUICK).read()
    with pytest.raises(LastingError, match=r"nosuch://bucket/a.tar cannot be opened: Protocol not known: nosuch"):
        open_shard("nosuch://bucket/a.tar", QUICK).read()


def raising(error):
    raise error


# ---- training over them


@pytest.mark.parametrize("manner", ["drops", "busy"])
@pytest.mark.parametrize("workers", [0, 2])
def test_training_over_a_bad_connection_sees_what_training_on_local_files_sees_also_resumed(
    tmp_path, vocab, server, manner, workers
):
    spec = write_shards(tmp_path / "served", [9, 12])
    index(tmp_path / "served", [9, 12])
    whole = take(loader(spec, vocab), 8) if not workers else take(loader(spec, vocab, workers=2), 8)
    url = server.url(manner, "train-{0000..0001}.tar")
    first = loader(url, vocab, workers=workers, remote=QUICK)
    assert take(first, 3) == whole[:3]
    second = loader(url, vocab, workers=workers, remote=QUICK)
    second.load_state_dict(first.state_dict())
    assert take(second, 5) == whole[3:]


def test_a_shard_that_breaks_in_one_run_and_not_in_the_next_moves_no_other_sample(tmp_path, vocab):
    spec = write_shards(tmp_path, [12, 12])
    index(tmp_path, [12, 12])
    options = {"max_bad_share": 0.9, "shuffle": 4}
    whole = take(loader(spec, vocab, **options), 6)
    broken = tmp_path / "train-0001.tar"
    data = broken.read_bytes()
    first = loader(spec, vocab, **options)
    broken.write_bytes(data[: len(data) // 2] + bytes(range(256)) * (len(data) // 512))
    found = take(first, 3)
    broken.write_bytes(data)
    second = loader(spec, vocab, **options)
    second.load_state_dict(first.state_dict())
    assert take(second, 3) == whole[3:]
    places = [(a, b) for (_, x), (_, y) in zip(found, whole, strict=False) for a, b in zip(x, y, strict=True)]
    assert any(a == b for a, b in places)


def test_a_server_that_is_gone_stops_the_run_with_the_shards_named_and_does_not_hang(tmp_path, vocab, server):
    write_shards(tmp_path / "served", [20, 20])
    index(tmp_path / "served", [20, 20])
    data = loader(server.url("good", "train-{0000..0001}.tar"), vocab, workers=1, remote=Remote(timeout=20, retries=1))
    server.httpd.shutdown()
    server.httpd.server_close()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"max_bad_share=0.1: \{'shard broken'.*train-000\d.tar with"):
        list(data)
    assert time.monotonic() - start < 60


# ---- sizes


def test_sizes_come_from_the_index_then_statistics_then_counting(tmp_path, server, monkeypatch):
    for folder in (tmp_path, tmp_path / "served"):
        write_shards(folder, [3, 4, 5, 6])
        index(folder, [3, 4])
        (folder / "train-0002_stats.json").write_text(json.dumps({"successes": 5}))
    names = [f"train-{i:04d}.tar" for i in range(4)]
    walked = []
    monkeypatch.setattr(counts, "walk", lambda path, mode: walked.append(path) or iter([("k", {})] * 6))
    local = [str(tmp_path / name) for name in names]
    assert sizes(local, QUICK) == [Size(3), Size(4), Size(5), Size(6)] and walked == local[3:]
    urls = [server.url("good", name) for name in names]
    assert sizes([*urls, "pipe:cat x"], QUICK) == [Size(3), Size(4), Size(5), Size(None), Size(None)]


def test_an_index_of_other_files_is_refused_and_one_of_another_tool_is_not_ours(tmp_path, vocab):
    spec = write_shards(tmp_path, [8])
    index(tmp_path, [8])
    with open(tmp_path / "train-0000.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError, match=r"train-0000.tar has \d+ bytes, .*index.json says \d+"):
        loader(spec, vocab)
    (tmp_path / "index.json").write_text(json.dumps({"format": 7, "shards": {}}))
    with pytest.raises(ValueError, match=r"index.json is no index of shards \(its format is 7, wanted 1\)"):
        loader(spec, vocab)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="no index of shards"):
        loader(spec, vocab)
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": [{"column_names": []}]}))
    assert len(loader(spec, vocab)) == 2


def test_what_took_long_to_count_is_counted_once(tmp_path, monkeypatch):
    write_shards(tmp_path, [3, 4])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(counts, "_WORTH_KEEPING", 0.0)
    local = [str(tmp_path / f"train-{i:04d}.tar") for i in range(2)]
    assert sizes(local, QUICK) == [Size(3), Size(4)]
    write_shards(tmp_path, [3, 6])  # another file under the old name
    plain, walked = counts.walk, []
    monkeypatch.setattr(counts, "walk", lambda path, mode: walked.append(path) or plain(path, mode))
    assert sizes(local, QUICK) == [Size(3), Size(6)] and local[1] in walked
    again = len(walked)
    assert sizes(local, QUICK) == [Size(3), Size(6)] and len(walked) == again


def test_remote_shards_without_sizes_are_refused_with_what_to_do(tmp_path, vocab, server):
    write_shards(tmp_path / "served", [8])
    with pytest.raises(ValueError, match=r"1 of 1 shards .*train_samples.*resample=true.*index"):
        loader(server.url("good", "train-0000.tar"), vocab, remote=QUICK)
    index(tmp_path / "served", [8])
    with pytest.raises(OSError, match=r"train-0001.tar: the server says 404"):  # not that it should be counted
        loader(server.url("good", "train-{0000..0001}.tar"), vocab, remote=QUICK)


def test_before_the_first_step_what_cannot_be_reached_is_given_up_after_few_tries_of_few_shards(vocab, monkeypatch):
    tried = []

    def refuse(url, at, timeout):
        tried.append((url, timeout))
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(sources, "_over_http", refuse)
    patient = Remote(timeout=600, retries=99)
    with pytest.raises(OSError, match=r"index.json cannot be read beyond byte 0, tried 4 times: .*refused"):
        loader("http://nowhere/{000..331}.tar", vocab, remote=patient)
    with pytest.raises(ValueError, match=r"no sample could be read from 3 of its shards.*tried 4 times: .*refused"):
        loader("http://nowhere/{000..331}.tar", vocab, remote=patient, train_samples=1000)
    assert len(tried) == 4 + 3 * 4 and {timeout for _, timeout in tried} == {10}


def test_urls_with_a_password_or_a_star_are_refused_and_netrc_is_read(tmp_path, vocab, monkeypatch):
    with pytest.raises(ValueError, match=r"on host.x has a name or password in its URL.*netrc") as refused:
        loader("https://me:secret@host.x/{0..3}.tar", vocab)
    assert "secret" not in str(refused.value)
    with pytest.raises(ValueError, match=r"nobody is asked which URLs there are; give a brace pattern"):
        loader("s3://bucket/*.tar", vocab)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine host.x login me password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert sources._authorization("host.x") == "Basic bWU6c2VjcmV0" and sources._authorization("host.y") is None
    (tmp_path / ".netrc").write_text("machine host.x nonsense\n")
    with pytest.warns(UserWarning, match=r"netrc cannot be read, so no password is sent: .*nonsense"):
        assert sources._authorization("host.x") is None


# ---- local copies


def test_local_copies_are_fetched_once_kept_within_their_limit_and_used_longest_ago_go_first(tmp_path, server):
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
        return sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.*"))

    assert [read(i) for i in (0, 1, 0)] == [True, True, False]
    assert read(2) and held() <= 2.5 * size  # room is made by shard 1, which was used longest ago
    assert [read(i) for i in (0, 1)] == [False, True]
    small = Remote(timeout=20, retries=4, cache=str(tmp_path / "small"), cache_gib=0.5 * size / 2**30)
    assert open_shard(urls[0], small).read() == contents[0] and not list((tmp_path / "small").glob("*.*"))


def fetch(url: str, remote: Remote, expected: bytes) -> None:
    with open_shard(url, remote) as file:
        assert file.read() == expected


def test_processes_that_want_the_same_copy_fetch_it_once_and_a_killed_ones_leavings_are_cleared(tmp_path, server):
    write_shards(tmp_path / "served", [8])
    url, data = server.url("drops", "train-0000.tar"), (tmp_path / "served" / "train-0000.tar").read_bytes()
    remote = Remote(timeout=20, retries=9, cache=str(tmp_path / "cache"))
    fetch(url, remote, data)
    (copy,) = (tmp_path / "cache").glob("*.shard")
    copy.rename(copy.with_name(f"{copy.name.partition('-')[0]}.1.part"))  # as if killed before the rename
    once = server.asked.total()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fetch, args=(url, remote, data)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert server.asked.total() == 2 * once
    assert not list((tmp_path / "cache").glob("*.part")) and copy.exists()


def test_a_folder_that_cannot_hold_copies_is_refused_before_anything_is_read(tmp_path, vocab):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data.remote.cache='.*file' cannot hold copies"):
        loader("http://nowhere/0.tar", vocab, remote=Remote(cache=str(tmp_path / "file")))


def test_out_of_range_settings_are_refused(tmp_path, vocab):
    for wrong in ({"timeout": 0}, {"retries": -1}, {"cache_gib": 0}):
        with pytest.raises(ValueError, match="wanted timeout and cache_gib above 0"):
            Remote(**wrong)
    assert shards(None, vocab).remote == Remote()
