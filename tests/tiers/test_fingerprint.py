"""The fingerprint of a model whose weights are files."""

from __future__ import annotations

import pytest

from pagedkv.tiers import fingerprint_of_files


def test_files_and_settings_make_it_and_places_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr("pagedkv.tiers.fingerprint._PIECE_BYTES", 3)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    files[0].write_bytes(b"weights of a model")
    files[1].write_bytes(b"others")
    first = fingerprint_of_files(files, {"dtype": "float32", "odd": {1}})
    assert first == fingerprint_of_files(files[::-1], {"odd": {1}, "dtype": "float32"}) and len(first) == 32
    moved = tmp_path / "moved"
    moved.mkdir()
    assert (
        fingerprint_of_files([file.rename(moved / file.name) for file in files], {"dtype": "float32", "odd": {1}})
        == first
    )
    files = sorted(moved.iterdir())
    others = {
        first,
        fingerprint_of_files(files, {"dtype": "bfloat16", "odd": {1}}),
        fingerprint_of_files(files[:1], {}),
    }
    files[0].write_bytes(b"weights of a model!"), files[1].write_bytes(b"thers")
    others.add(fingerprint_of_files(files, {"dtype": "float32", "odd": {1}}))
    assert len(others) == 4


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(OSError, match="none"):
        fingerprint_of_files([tmp_path / "none"], {})
