from ecavg.cloud_server.door.instances import MAX_SEEN, Instances


def test_one_process_stays_however_often_it_comes() -> None:
    instances = Instances()
    assert all(instances.enter("a") for _ in range(5))


def test_restarted_agent_takes_the_place_of_the_process_before() -> None:
    instances = Instances()
    for number in range(3 * MAX_SEEN):
        assert instances.enter(f"{number}")


def test_of_two_processes_that_both_come_back_the_later_one_is_refused() -> None:
    instances = Instances()
    assert instances.enter("first")
    assert instances.enter("second")
    assert instances.enter("first")
    assert not instances.enter("second")
    assert instances.is_refused("second")
    assert instances.enter("first")
    assert not instances.enter("second")


def test_it_is_the_later_one_whichever_comes_back_last() -> None:
    instances = Instances()
    for name in ("first", "second", "first"):
        assert instances.enter(name)
    instances.leave("first")
    assert instances.enter("second")
    assert instances.enter("first")
    assert instances.is_refused("second")


def test_word_of_a_process_that_is_gone_proves_nothing() -> None:
    """Its Watch may come late, on a slow way; but then it does not stay open."""
    instances = Instances()
    for name in ("gone", "new", "gone"):
        assert instances.enter(name)
    instances.leave("gone")
    assert instances.enter("new")
    assert instances.enter("new")


def test_every_further_device_is_refused() -> None:
    instances = Instances()
    for name in ("first", "second", "first"):
        instances.enter(name)
    assert not instances.enter("second")
    assert instances.enter("third")
    assert instances.enter("first")
    assert not instances.enter("third")
