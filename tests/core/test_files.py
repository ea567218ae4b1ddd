"""Atomic writes, checksums, space and explained errors."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
from xxhash import xxh3_128

from core import files
from core.arrays import NpzFile, read_npy
from core.errors import UserError
from core.specs import Codes
from core.weights import hub
from data.decode import UnreadablePicture, decode_rgb
from data.sources import open_source
from data.token_files import JsonLines
from evaluation import references
from tests.conftest import ROOT
from tokenizer.continuous.stats import load_stats


def test_write_replaces_whole_file_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "a b é.txt"
    for data in ("first ü", b"\x00\xff"):
        files.write_atomic(target, data)
        assert target.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    files.write_atomic(target, "old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="a.txt: the disk is full"):
        files.write_atomic(target, "new")
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENOENT])
def test_errors_name_the_path_and_say_what_to_do(number):
    sentence = "^some/where: .*(Free|Delete|Raise|Choose|Check)"
    with pytest.raises(UserError, match=sentence), files.explain_os_errors("some/where"):
        raise OSError(number, "reason")


def test_unknown_errors_pass_unchanged():
    with pytest.raises(OSError, match="reason"), files.explain_os_errors("some/where"):
        raise OSError(errno.EPIPE, "reason")


def test_json_is_sorted_exact_and_readable(tmp_path):
    value = {"b": 0.1 + 0.2, "a": [1, None, True, "ü"], "c": 2**60}
    files.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert files.read_json(tmp_path / "x.json") == value == json.loads(text)
    assert text.index('"a"') < text.index('"b"') and "ü" in text and text.endswith("\n")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[" * 200_000])
def test_bad_json_names_the_file(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match="x.json: not valid JSON"):
        files.read_json(tmp_path / "x.json")


def test_sha256_of_more_than_one_piece(tmp_path):
    data = os.urandom(1 << 20) + b"rest"
    (tmp_path / "x").write_bytes(data)
    assert files.sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_digests_by_pieces(tmp_path):
    """By hand: of the pieces' digests, whatever the order in which they are computed."""
    data = {"empty": b"", "short": b"x", "long": os.urandom((1 << 20) * 3 + 17)}
    for name, content in data.items():
        (tmp_path / name).write_bytes(content)
    for piece in (1 << 20, 1 << 21, 1000):
        by_hand = [
            xxh3_128(b"".join(xxh3_128(c[i : i + piece]).digest() for i in range(0, len(c), piece))).hexdigest()
            for c in data.values()
        ]
        assert list(files.digests([tmp_path / name for name in data], piece)) == by_hand
    with pytest.raises(FileNotFoundError, match="gone"):
        list(files.digests([tmp_path / "gone"]))


def test_space_and_human_bytes(tmp_path):
    files.require_space(tmp_path, 1)
    with pytest.raises(UserError, match=r"1\.0 EiB|1024\.0 PiB are needed"):
        files.require_space(tmp_path, 1 << 60)
    assert [files.human_bytes(n) for n in (0, 1023, 1536, 5 << 30)] == ["0 bytes", "1023 bytes", "1.5 KiB", "5.0 GiB"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git-LFS pointer"),
        (b"\n<!DOCTYPE html><p>Sign in", "a web page"),
    ],
)
def test_what_a_download_left_is_named_in_every_kind_of_file(tmp_path, content, what):
    def reading(read, name, error=UserError):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(error, match=f"{re.escape(name)}: {what}"):
            read(tmp_path / name)

    reading(read_npy, "x.npy")
    reading(NpzFile, "x.npz")
    reading(hub.load_tensors, "x.pt")
    reading(hub.load_tensors, "x.safetensors")
    reading(load_stats, "stats.safetensors")
    reading(references.load, "reference.safetensors")
    reading(files.read_json, "x.json")
    reading(lambda path: JsonLines(path, Codes(4, 1, 8, 2), 1), "tokens.jsonl")
    reading(lambda path: open_source(f"wds://{path}"), "shard.tar")
    reading(lambda path: open_source(f"list://{path}"), "list.txt")
    reading(lambda path: decode_rgb(path.read_bytes(), path.name), "x.jpg", UnreadablePicture)


@pytest.mark.parametrize("home", [None, "/somewhere"])
def test_homes_of_nobody(monkeypatch, home):
    """Accounts of containers have no home, and ~name may be a mistake: the path is then told as it was written."""
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    assert str(files.expanded("~/x")) == ("~/x" if home is None else "/somewhere/x")
    assert str(files.expanded("~nobody-here/x")) == "~nobody-here/x"


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/nowhere/disk")
    for place, sentence in (("file/runs", "a file, and"), ("link/runs", "a link to /nowhere/disk, which is not there")):
        with pytest.raises(UserError, match=f"{tmp_path / place.partition('/')[0]}: {sentence}"):
            files.require_place(tmp_path / place)
    files.require_place(tmp_path / "new" / "runs")
    assert files.existing_part(tmp_path / "new" / "runs") == tmp_path


@pytest.mark.parametrize("write", ["Path({path!r}).mkdir(exist_ok=True)", "os.rename({folder!r}, {path!r})"])
def test_a_link_to_nowhere_is_one_sentence(tmp_path, write):
    """Whatever a program wants to make there: the disk of a cluster is not mounted."""
    (tmp_path / "link").symlink_to("/nowhere/disk")
    (tmp_path / "folder").mkdir()
    does = write.format(path=str(tmp_path / "link"), folder=str(tmp_path / "folder"))
    code = f"import os; from pathlib import Path; from core import cli; cli.run(lambda _: {does})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"{tmp_path / 'link'}: a link to /nowhere/disk, which is not there" in done.stderr
    (tmp_path / "link").unlink()
    (tmp_path / "link").touch()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    if "mkdir" in write:
        assert done.returncode == 2 and f"{tmp_path / 'link'}: a file is in its place" in done.stderr


def test_a_folder_that_cannot_be_deleted_is_one_sentence(tmp_path, monkeypatch):
    def refused(path):
        raise OSError(errno.EROFS, "Read-only file system", os.fspath(path))

    files.clear_folder(tmp_path / "none", lambda _: True)
    monkeypatch.setattr(files.shutil, "rmtree", refused)
    with pytest.raises(UserError, match=f"{tmp_path}: the file system is read-only"):
        files.clear_folder(tmp_path, lambda _: True)
