"""Files: written completely or not at all, with the umask's mode, and those of others stay."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from stair.errors import FileError
from stair.files import atomic_folder, atomic_write, lock, read_json, sha256, write_json, write_text

NAMES = ("weights", "valid.json", "extra")


def mode(path):
    return path.stat().st_mode & 0o777


def save(folder, **content):
    with atomic_folder(folder, "valid.json", NAMES, lambda path: b"ours" in path.read_bytes()) as stage:
        for name, text in content.items():
            (stage / name.replace("_", ".")).write_text(text)


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o027, 0o077])
def test_a_file_and_a_folder_have_the_mode_of_the_umask_whatever_the_writer_does(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "deep" / "a") as part:
            os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))
        with atomic_folder(tmp_path / "m", "valid.json", NAMES, lambda path: True) as stage:
            os.close(os.open(stage / "valid.json", os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert mode(tmp_path / "deep" / "a") == mode(tmp_path / "m" / "valid.json") == 0o666 & ~umask
    assert mode(tmp_path / "m") == mode(tmp_path / "deep") == 0o777 & ~umask


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "a") as part:
        part.write_bytes(b"ne")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_what_a_killed_process_left_is_removed_by_the_next_write_and_that_of_a_living_one_stays(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from stair.files import atomic_write
with atomic_write(Path({str(tmp_path / "a")!r})) as part:
    part.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_write(tmp_path / "a") as part:
        part.write_bytes(b"slow")
        write_text(tmp_path / "a", "quick")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"slow"


def test_a_link_is_replaced_and_its_target_is_left_alone(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "a").symlink_to("theirs")
    write_text(tmp_path / "a", "ours")
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert (tmp_path / "a").read_text() == "ours"


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(FileError) as caught:
        write_text(tmp_path, "")
    assert caught.value.path == tmp_path


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="no /proc, which tells a zombie from a process")
def test_what_a_killed_process_left_is_removed_although_nobody_waited_for_it(tmp_path):
    """In a container without init its number stays taken."""
    code = f"""
import os, signal
from pathlib import Path
from stair.files import atomic_write
with atomic_write(Path({str(tmp_path / "a")!r})) as part:
    part.touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and not waited for
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    write_text(tmp_path / "a", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    process.wait()


def test_files_of_others_stay_and_stale_files_of_ours_go(tmp_path):
    folder = tmp_path / "m"
    save(folder, weights="1", valid_json="ours", extra="1")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / "thesis.tex").write_text("two years")
    os.link(folder / "thesis.tex", tmp_path / "linked")
    save(folder, weights="2", valid_json="ours, newer")
    assert sorted(path.name for path in folder.iterdir()) == [".git", "thesis.tex", "valid.json", "weights"]
    assert (folder / "thesis.tex").samefile(tmp_path / "linked")
    assert [(folder / name).read_text() for name in ("weights", "valid.json")] == ["2", "ours, newer"]


@pytest.mark.parametrize("theirs", [{"valid.json": "a BERT"}, {"weights": "theirs"}, {"extra": "theirs"}])
def test_files_of_others_under_our_names_are_refused_before_anything_is_written(tmp_path, theirs):
    for name, text in theirs.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(FileError) as caught:
        save(tmp_path, weights="2", valid_json="ours")
    assert caught.value.path == tmp_path
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == theirs


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path):
    save(tmp_path / "m", weights="1", valid_json="ours")
    for folder in (tmp_path / "m", tmp_path / "new"):
        with pytest.raises(RuntimeError), atomic_folder(folder, "valid.json", NAMES, lambda path: True) as stage:
            (stage / "weights").write_text("2")
            raise RuntimeError
    assert {path.name: path.read_text() for path in (tmp_path / "m").iterdir()} == {
        "weights": "1",
        "valid.json": "ours",
    }
    assert not (tmp_path / "new").exists()


def test_a_save_killed_between_two_renames_is_no_valid_folder_and_can_be_repeated(tmp_path, monkeypatch):
    folder = tmp_path / "m"
    save(folder, weights="1", valid_json="ours")
    moved = []

    replace = type(folder).replace

    def killed(path, target):
        if moved:
            raise SystemExit
        moved.append(target)
        replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "replace", killed)
        patch.setattr("stair.files.remove", lambda path: None)  # nobody cleans up after a kill
        with pytest.raises(SystemExit):
            save(folder, weights="2", valid_json="ours")
    assert not (folder / "valid.json").exists()
    save(folder, weights="3", valid_json="ours")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"weights": "3", "valid.json": "ours"}


def test_a_linked_folder_stays_a_link(tmp_path):
    save(tmp_path / "real", weights="1", valid_json="ours")
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", weights="2", valid_json="ours")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "weights").read_text() == "2"


def test_one_holder_of_a_lock_at_a_time_and_no_file_of_it_is_left(tmp_path):
    with lock(tmp_path / "lock"):
        with pytest.raises(FileError) as caught, lock(tmp_path / "lock"):
            pass
        assert caught.value.path == tmp_path / "lock"
    assert not list(tmp_path.iterdir())


def test_a_waiting_lock_excludes_every_other_thread(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(50):
            with lock(tmp_path / "lock", wait=True):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 400
    assert max(most) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_what_is_no_json_object_is_refused_with_its_path(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FileError) as caught:
        read_json(tmp_path / "a.json")
    assert caught.value.path == tmp_path / "a.json"


def test_json_and_checksums_are_those_of_the_content(tmp_path):
    write_json(tmp_path / "a", {"b": "ä", "a": [1, None]})
    write_json(tmp_path / "b", {"a": [1, None], "b": "ä"})
    assert read_json(tmp_path / "a") == {"a": [1, None], "b": "ä"}
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    (tmp_path / "c").write_bytes(b"abc")
    assert sha256(tmp_path / "c") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
