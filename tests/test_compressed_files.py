"""A compressed file gives all of its content or an error."""

import os

import fsspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import compressed_files

CONTENT = b"".join(b"%d\n" % i for i in range(3000))
SKIPPABLE = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"  # a frame without content, as pzstd writes


def read(file) -> bytes:
    with compressed_files.open_decompressed(str(file)) as stream:
        return stream.read()


@pytest.mark.parametrize("read_size", [1, 7, 1 << 17])
def test_all_frames_of_a_zst_are_read(read_size, tmp_path, monkeypatch):
    monkeypatch.setattr(compressed_files, "READ_SIZE", read_size)
    frames = [zstandard.compress(CONTENT), SKIPPABLE, zstandard.compress(b""), zstandard.compress(b"end")]
    (tmp_path / "a.zst").write_bytes(b"".join(frames))
    assert read(tmp_path / "a.zst") == CONTENT + b"end"
    with fsspec.open(str(tmp_path / "a.zst"), "rb", compression="zstd") as stream:
        assert stream.read() == CONTENT + b"end"


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, len(zstandard.compress(CONTENT)) - 1))
def test_a_zst_that_was_cut_is_an_error(length, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "cut.zst"
    file.write_bytes(zstandard.compress(CONTENT)[:length])
    with pytest.raises(EOFError):
        read(file)


def test_noise_is_an_error(tmp_path):
    for name in ("a.gz", "a.zst"):
        (tmp_path / name).write_bytes(b"neither of them")
        with pytest.raises(compressed_files.DAMAGED):
            read(tmp_path / name)


def test_a_copy_is_made_once_for_each_state_of_a_file(tmp_path):
    file, folder = tmp_path / "a.txt.zst", tmp_path / "copies"
    file.write_bytes(zstandard.compress(b"one"))
    first = compressed_files.decompressed_copy(str(file), str(folder))
    assert open(first, "rb").read() == b"one"
    os.utime(first, (1, 1))
    assert compressed_files.decompressed_copy(str(file), str(folder)) == first
    assert os.stat(first).st_mtime == 1  # not written again
    file.write_bytes(zstandard.compress(b"other"))
    second = compressed_files.decompressed_copy(str(file), str(folder))
    assert open(second, "rb").read() == b"other"
    assert compressed_files.decompressed_copy(second, str(folder)) == second


def test_nothing_is_left_of_a_copy_that_failed(tmp_path):
    (tmp_path / "a.zst").write_bytes(zstandard.compress(CONTENT)[:-5])
    with pytest.raises(EOFError):
        compressed_files.decompressed_copy(str(tmp_path / "a.zst"), str(tmp_path / "copies"))
    assert list((tmp_path / "copies").iterdir()) == []
