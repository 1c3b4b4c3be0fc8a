"""New folders and files are whole under their names, or not there."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from molora.writing import WriteError, check_place, new_file, new_folder, scratch_folder, size


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "out", needs=10) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
        assert folder.parent == tmp_path / "deep"
    assert (tmp_path / "deep" / "out" / "sub" / "a").read_text() == "a"
    assert names(tmp_path / "deep") == ["out"]


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    with new_file(tmp_path / "x.gguf") as file:
        file.write_bytes(b"abc")
        assert names(tmp_path) == [file.name]
    assert (tmp_path / "x.gguf").read_bytes() == b"abc"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("make", [new_folder, new_file])
def test_an_error_inside_leaves_nothing_and_is_passed_on(make, error, tmp_path: Path) -> None:
    with pytest.raises(type(error)), make(tmp_path / "out") as path:  # noqa: PT012  # the block is what is tested
        (path / "a" if path.is_dir() else path).write_text("half")
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("make", [new_folder, new_file])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_nothing_is_overwritten(make, kind, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        out.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WriteError, match=r"exists.*nothing is overwritten"), make(out):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["out"]


def test_what_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="overwritten"), new_folder(tmp_path / "out") as folder:  # noqa: PT012  # so
        (folder / "a").write_text("a")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("theirs")
    assert names(tmp_path / "out") == ["theirs"]
    assert names(tmp_path) == ["out"]


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    with new_folder(tmp_path / "x**[y]") as folder:
        (folder / "a").write_text("a")
    assert names(tmp_path) == ["x**[y]"]


def test_a_scratch_folder_lies_beside_its_target_and_is_gone_afterwards(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "out") as scratch:
        assert scratch.parent == tmp_path
        (scratch / "a").write_text("a")
    assert names(tmp_path) == []


def test_what_the_same_run_is_writing_is_no_left_over(tmp_path: Path, caplog) -> None:
    with scratch_folder(tmp_path / "out"), new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
    assert caplog.text == ""
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
    assert names(tmp_path / "out") == ["a"]


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"about 1.0 TiB are needed and .* free"):
        check_place(tmp_path / "out", needs=2**40)
    assert names(tmp_path) == []


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="is no folder"):
        check_place(tmp_path / "file" / "out")


@pytest.mark.parametrize(("count", "text"), [(0, "0 bytes"), (2048, "2.0 KiB"), (5 * 2**30, "5.0 GiB")])
def test_sizes_are_readable(count: int, text: str) -> None:
    assert size(count) == text


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A small file system in memory; only root can mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_gets_full_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "size=1m"):
        with pytest.raises(WriteError, match="the disk is full"), new_folder(disk / "out") as folder:
            save_file({"weight": torch.zeros(2**20)}, folder / "model.safetensors")
        with pytest.raises(WriteError, match="the disk is full"), new_file(disk / "out") as file:
            file.write_bytes(bytes(2**22))
        assert names(disk) == []


def test_a_read_only_disk_is_said_before_anything_is_done(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "size=1m,ro"), pytest.raises(WriteError, match="is read-only"):
        check_place(disk / "out")


KILLED = """
import sys, time
from molora.writing import new_folder
with new_folder(sys.argv[1]) as folder:
    (folder / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_nothing_under_the_name_and_the_next_run_says_what_it_found(tmp_path, caplog) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    [left] = names(tmp_path)
    assert left.startswith(".out.partial-")
    with new_folder(out) as folder:
        (folder / "whole").write_text("whole")
    assert names(out) == ["whole"]
    assert f"{left} was left by a run that was interrupted" in caplog.text
