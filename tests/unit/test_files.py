import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from ecavg.common.errors import UsageError
from ecavg.common.files import MAX_TEXT_BYTES, error_number, is_full, link, read_text


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


IN_WORDS = "Error while serializing: I/O error: {} (os error {})"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_used_up_quota_are_known_in_every_form(number: int) -> None:
    text = IN_WORDS.format(os.strerror(number), number)
    for error in (OSError(number, "no room"), SafetensorError(text), OSError(f"cannot write x: {text}")):
        assert error_number(error) == number
        assert is_full(error)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_for_another_reason_is_not_full(number: int) -> None:
    for error in (OSError(number, "no"), SafetensorError(IN_WORDS.format(os.strerror(number), number))):
        assert error_number(error) == number
        assert not is_full(error)


def test_the_number_of_the_error_counts_more_than_its_text() -> None:
    assert not is_full(OSError(errno.EACCES, "after (os error 28)"))
    assert error_number(ValueError("28")) is None


@pytest.mark.parametrize(
    ("encoding", "prefix"), [("utf-8", b""), ("utf-8-sig", b""), ("utf-16", b""), ("utf-16-be", b"\xfe\xff")]
)
def test_small_text_file_is_read_in_the_encodings_that_editors_write(
    encoding: str, prefix: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_bytes(prefix + " Käse\r\n".encode(encoding))
    assert read_text(file, "token file") == " Käse\r\n"


def make_large(file: Path) -> None:
    file.write_bytes(b"x" * (MAX_TEXT_BYTES + 1))


def make_loop(file: Path) -> None:
    file.symlink_to(file)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: file.write_bytes("Käse".encode("latin-1")), "is not UTF-8 text: save it as UTF-8"),
        (lambda file: file.write_bytes(b"\xff\xfex"), "is not UTF-8 text: save it as UTF-8"),
        (lambda file: file.mkdir(), "Is a directory"),
        (lambda file: file.symlink_to("/dev/zero"), "has more than 64 KiB: name the right file"),
        (make_large, "has more than 64 KiB: name the right file"),
        (make_loop, "Too many levels of symbolic links"),
        (lambda file: None, "No such file or directory"),
    ],
)  # fmt: skip
def test_text_file_that_cannot_be_read_is_named(make, message: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    make(file)
    with pytest.raises(UsageError, match=message) as error:
        read_text(file, "token file")
    assert f"token file {file}" in str(error.value)


def test_pipe_is_read_to_its_end_and_one_that_nobody_writes_to_is_empty(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "named")
    assert read_text(tmp_path / "named", "token file") == ""
    reading, writing = os.pipe()
    os.write(writing, b"token\n")
    os.close(writing)
    assert read_text(Path(f"/dev/fd/{reading}"), "token file") == "token\n"
    os.close(reading)
