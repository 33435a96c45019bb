import unicodedata
from pathlib import Path

import pytest

from ecavg.cloud_server.classes import Classes
from ecavg.common.errors import InvalidError, Reason
from tests.unit.world import world

PETS = ("cat", "dog", "fish")


def test_the_first_names_stand() -> None:
    named = Classes().agree("edge-1", PETS, 3)
    assert named == Classes(PETS, "edge-1")
    assert named.agree("edge-2", PETS, 3) == named


async def test_names_stand_once_another_agent_has_joined(tmp_path: Path) -> None:
    run = {"dataset": "pets", "num_classes": 3, "image_shape": [1, 8, 8]}
    async with world(tmp_path, min_agents=2, run=run) as here:
        await here.desk.join("edge-1", PETS)
        await here.desk.join("edge-1", ("cat", "fish", "puppy"))
        await here.desk.join("edge-2", ("cat", "fish", "puppy"))
        # The labels of edge-2 have a meaning by these names.
        with pytest.raises(InvalidError) as refused:
            await here.desk.join("edge-1", PETS)
        assert refused.value.reason is Reason.CLASS_NAMES


def test_an_agent_without_class_folders_changes_nothing() -> None:
    assert Classes().agree("edge-1", (), 3) == Classes()
    assert Classes(PETS, "edge-1").agree("edge-2", (), 3) == Classes(PETS, "edge-1")


def test_an_agent_need_not_have_every_class_that_is_named() -> None:
    assert Classes(PETS).agree("edge-2", ("dog",), 3) == Classes(PETS)


def test_other_classes_are_refused_with_both_lists() -> None:
    with pytest.raises(InvalidError) as refused:
        Classes(PETS, "edge-1").agree("edge-2", ("Dog", "cat", "fish"), 3)
    assert refused.value.reason is Reason.CLASS_NAMES
    assert "not Dog; here are Dog, cat, fish, the run has cat, dog, fish: rename" in str(refused.value)


@pytest.mark.parametrize("names", [("cat", "dog"), (*PETS, "emu")])
def test_as_long_as_nobody_has_named_them_all_classes_must_be_there(names: tuple[str, ...]) -> None:
    with pytest.raises(InvalidError, match=rf"there are {len(names)} class folders here .*the run has 3"):
        Classes().agree("edge-1", names, 3)


def test_the_same_name_in_another_normal_form_is_the_same() -> None:
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert Classes((composed, "bar")).agree("mac", ("bar", decomposed), 2).names == (composed, "bar")
    with pytest.raises(InvalidError, match="the same name twice"):
        Classes().agree("linux", (composed, decomposed), 2)


@pytest.mark.parametrize("name", ["", "two\nlines", "\x1b[2J", "long" * 200])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidError, match="class_names: should") as refused:
        Classes().agree("edge-1", ("cat", name), 2)
    assert refused.value.reason is Reason.MALFORMED_REQUEST


def test_long_lists_are_cut_short() -> None:
    names = tuple(f"class-{number}" for number in range(10_000))
    with pytest.raises(InvalidError) as refused:
        Classes(names).agree("edge-1", ("strange",), 10_000)
    assert len(str(refused.value)) < 500
