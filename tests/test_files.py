"""Outputs are whole or absent, and nothing that should stay is replaced."""

import os

import pytest

from relufy.errors import UserError
from relufy.files import refuse_occupied, replacing


def test_a_file_and_an_empty_folder_are_replaced(tmp_path):
    (tmp_path / "file").write_text("old")
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "file").read_text() == "new"
    (tmp_path / "folder").mkdir()
    with replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "inside").touch()
    assert (tmp_path / "folder" / "inside").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_an_error_leaves_all_as_it_was(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_link_to_an_empty_folder_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with replacing(tmp_path / "link") as temporary:
        temporary.mkdir()
        (temporary / "inside").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "inside").exists()


def test_what_is_no_file_is_never_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="neither a file nor a folder"), replacing(pipe):
        pass
    assert pipe.is_fifo()


@pytest.mark.parametrize("by_folder", [True, False])
def test_a_folder_takes_no_files_place_nor_the_other_way(tmp_path, by_folder):
    target = tmp_path / "target"
    target.touch() if by_folder else target.mkdir()
    with pytest.raises(UserError, match=r"is a f.*the output is a f"):
        refuse_occupied(target, by_folder=by_folder)
    with pytest.raises(UserError, match="the output is"), replacing(target) as temporary:
        temporary.mkdir() if by_folder else temporary.touch()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
