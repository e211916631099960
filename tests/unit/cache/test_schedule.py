import random

from uenvd.cache.ranges import Ranges
from uenvd.cache.schedule import (
    ALONE_PIECES,
    CUT_BYTES,
    MIN_PIECE_BYTES,
    URGENT_PIECE_BYTES,
    Schedule,
    Task,
)

MB = 1 << 20


def schedule(
    size: int = 1000 * MB,
    piece: int = 16 * MB,
    connections: int = 4,
    *held: tuple[int, int],
    fill: bool = True,
) -> Schedule:
    return Schedule(size, Ranges(held), piece_bytes=piece, connections=connections, fill=fill)


def bring(plan: Schedule, task: Task, count: int | None = None) -> None:
    """Receive ``count`` bytes of a task (all), and end it then."""
    end = task.end if count is None else min(task.end, task.at + count)
    plan.written(task.at, end)
    task.at = end
    plan.give_back(task)


def test_pieces_in_order_and_small_ones_at_the_end() -> None:
    plan = schedule()
    tasks = []
    while (task := plan.take()) is not None:
        tasks.append((task.at, task.end))
        bring(plan, task)
    assert plan.complete
    assert [first for first, _ in tasks[1:]] == [end for _, end in tasks[:-1]]
    sizes = [end - first for first, end in tasks]
    assert sizes[:5] == [4 * MB, 8 * MB, 12 * MB, 16 * MB, 16 * MB]
    assert sizes[-2] == MIN_PIECE_BYTES and sizes[4:] == sorted(sizes[4:], reverse=True)


def test_all_end_at_about_the_same_moment() -> None:
    plan = schedule(200 * MB)
    busy: list[Task] = []
    while not plan.complete:
        while len(busy) < 4 and (task := plan.take()) is not None:
            busy.append(task)
        left_bytes = plan.size_bytes - plan.held.total_bytes
        assert len(busy) == 4 or left_bytes <= MIN_PIECE_BYTES, "all are at work until the end"
        for task in list(busy):
            plan.written(task.at, min(task.end, task.at + MB))
            task.at = min(task.end, task.at + MB)
            if task.at == task.end:
                busy.remove(task)
                plan.give_back(task)


def test_what_is_held_or_on_its_way_is_not_asked_for() -> None:
    plan = schedule(100 * MB, 16 * MB, 2, (10 * MB, 20 * MB))
    one, two, three, four = plan.take(), plan.take(), plan.take(), plan.take()
    assert one and two and three and four
    assert (one.at, one.end) == (0, 8 * MB)
    assert (two.at, two.end) == (8 * MB, 10 * MB)
    assert three.at == 20 * MB and four.at == three.end
    bring(plan, three, 3 * MB)
    again = plan.take()
    assert again and (again.at, again.end) == (23 * MB, four.at)


def test_a_demand_goes_first_and_in_small_pieces() -> None:
    plan = schedule(fill=False)
    assert plan.take() is None and not plan.urgent
    plan.demand(500 * MB, 510 * MB)
    assert plan.urgent
    first = plan.take(urgent_only=True)
    second = plan.take()
    assert first and second and first.urgent
    assert (first.at, first.end) == (500 * MB, 500 * MB + URGENT_PIECE_BYTES)
    assert second.at == first.end
    bring(plan, first)
    bring(plan, second)
    third = plan.take(urgent_only=True)
    assert third and third.end == 510 * MB
    bring(plan, third)
    assert plan.take() is None and not plan.urgent
    plan.demand(500 * MB, 501 * MB)
    assert not plan.urgent, "it is here"
    plan.fill = True
    task = plan.take()
    assert task and task.at == 0


def test_a_connection_that_would_reach_the_demand_late_gives_it_up() -> None:
    plan = schedule()
    task = plan.take()
    assert task
    plan.demand(task.at + 2 * MB, task.at + 3 * MB)
    assert task.end == 2 * MB
    urgent = plan.take()
    assert urgent and (urgent.at, urgent.end, urgent.urgent) == (2 * MB, 3 * MB, True)
    following = plan.take()
    assert following and following.at == 3 * MB
    near = plan.take()
    assert near
    end = near.end
    plan.demand(near.at + CUT_BYTES, near.at + CUT_BYTES + 1)
    assert near.end == end, "it comes in a moment"
    assert plan.take(urgent_only=True) is None and plan.urgent


def test_wrong_bytes_are_asked_for_again() -> None:
    plan = schedule(10 * MB)
    task = plan.take()
    assert task
    bring(plan, task)
    plan.discard(MB, 2 * MB)
    again = plan.take()
    assert not plan.complete and again and (again.at, again.end) == (MB, 2 * MB)


def test_every_byte_comes_once_whatever_happens() -> None:
    for seed in range(50):
        chance = random.Random(seed)
        size = chance.randrange(1, 300) * MB + chance.randrange(MB)
        plan = schedule(size, 16 * MB, 4)
        running: list[Task] = []
        brought = 0
        for _ in range(5000):
            if plan.complete:
                break
            if chance.random() < 0.1:
                first = chance.randrange(size)
                plan.demand(first, min(size, first + chance.randrange(5 * MB)))
            if len(running) < 6 and (task := plan.take(urgent_only=chance.random() < 0.2)):
                running.append(task)
            elif running:
                task = chance.choice(running)
                count = min(chance.randrange(1, 8 * MB), task.end - task.at)
                plan.written(task.at, task.at + count)
                task.at += count
                brought += count
                if task.at >= task.end or chance.random() < 0.2:
                    plan.give_back(task)
                    running.remove(task)
        assert plan.complete and brought == size


def test_who_is_there_for_demands_takes_no_hints() -> None:
    plan = schedule()
    plan.hint(40 * MB, 41 * MB)
    assert plan.take(urgent_only=True) is None
    hinted = plan.take()
    assert hinted is not None and (hinted.at, hinted.urgent) == (40 * MB, False)


def test_a_hint_comes_after_demands_and_before_the_rest_also_without_filling() -> None:
    plan = Schedule(64 * MB, Ranges(), piece_bytes=16 * MB, connections=4, fill=False)
    assert plan.take() is None
    plan.hint(40 * MB, 41 * MB)
    plan.demand(50 * MB, 51 * MB)
    tasks = [plan.take(), plan.take(), plan.take()]
    assert [(task.at, task.urgent) for task in tasks if task] == [(50 * MB, True), (40 * MB, False)]


def test_demands_beside_each_other_are_all_fetched_at_once() -> None:
    plan = Schedule(64 * MB, Ranges(), piece_bytes=16 * MB, connections=4, fill=False)
    plan.demand(10 * MB, 11 * MB)
    plan.demand(20 * MB, 21 * MB)
    first, second = plan.take(urgent_only=True), plan.take(urgent_only=True)
    assert first and second
    assert (first.at, second.at) == (10 * MB, 20 * MB)


def test_a_connection_that_brings_a_demand_anyway_does_not_give_way_to_it() -> None:
    plan = Schedule(64 * MB, Ranges(), piece_bytes=16 * MB, connections=4)
    task = plan.take()
    assert task
    plan.demand(CUT_BYTES // 2, CUT_BYTES)
    assert task.hurry_until == CUT_BYTES


def test_one_connection_alone_asks_for_more_and_shares_it_when_others_come() -> None:
    plan = schedule()
    task = plan.take(alone=True)
    assert task and (task.at, task.end) == (0, ALONE_PIECES * 16 * MB)
    task.at += 3 * MB
    plan.written(0, 3 * MB)
    plan.cut_to_pieces()
    assert task.end == 19 * MB
    second = plan.take()
    assert second and (second.at, second.end) == (19 * MB, 27 * MB)
