import errno
import os
from pathlib import Path

import pytest

from common.files import link


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_text("new")
    return path


def no_links(number: int) -> object:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_link_replaces_what_was_there_and_stays_when_its_source_is_replaced(source: Path) -> None:
    target = source.with_name("target")
    target.write_text("old")
    for _ in range(2):  # the second after a crash: it is there already
        link(source, target)
        assert target.read_text() == "new"
        assert target.samefile(source)
    other = source.with_name("other")
    other.write_text("newer")
    other.replace(source)
    assert target.read_text() == "new"
    assert set(source.parent.iterdir()) == {source, target}


def test_where_the_disk_has_no_links_it_is_a_copy(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_links(errno.EPERM))
    target = source.with_name("target")
    for _ in range(2):
        link(source, target)
        assert target.read_text() == "new"
        assert not target.samefile(source)
    assert set(source.parent.iterdir()) == {source, target}


def test_any_other_trouble_is_told_and_changes_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_links(errno.ENOSPC))
    target = source.with_name("target")
    target.write_text("old")
    with pytest.raises(OSError, match="No space left"):
        link(source, target)
    assert target.read_text() == "old"
    assert set(source.parent.iterdir()) == {source, target}
