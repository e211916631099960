from uenvd.cache.pace import HOLD_S, Pace

STEP_S = 0.01


def drive(
    pace: Pace, seconds: float, rate_of: dict[int, float], start_s: float = 0.0, *, waiting: float = 0.9
) -> tuple[float, int]:
    """Receive for a while at the rate that so many connections have; return (the time now, how often it went back to one).

    ``waiting``: which part of the time goes by until bytes are there.
    """
    now, backs = start_s, 0
    while now < start_s + seconds:
        now += STEP_S
        before = pace.allowed
        pace.gained(int(rate_of[before] * STEP_S), now, waiting * STEP_S, before)
        backs += pace.allowed < before
    return now, backs


def test_connections_that_are_limited_each_are_all_used() -> None:
    pace = Pace(4)
    assert pace.allowed == 1
    _, backs = drive(pace, 1.0, {1: 200e6, 4: 800e6})
    assert pace.allowed == 4 and backs == 0


def test_the_full_width_is_reached_soon() -> None:
    pace = Pace(4)
    drive(pace, 0.1, {1: 200e6, 4: 800e6})
    assert pace.allowed == 4


def test_a_connection_that_keeps_this_side_busy_stays_alone_until_it_waits() -> None:
    pace = Pace(4)
    now, backs = drive(pace, 3 * HOLD_S, {1: 900e6}, waiting=0.2)
    assert pace.allowed == 1 and backs == 0
    drive(pace, HOLD_S + 0.6, {1: 200e6, 4: 800e6}, now)
    assert pace.allowed == 4


def test_a_limited_processor_or_line_gets_one_and_is_tried_again_later() -> None:
    pace = Pace(4)
    now, backs = drive(pace, 0.6, {1: 900e6, 4: 750e6})
    assert pace.allowed == 1 and backs == 1
    now, _ = drive(pace, HOLD_S + 0.6, {1: 100e6, 4: 400e6}, now)
    assert pace.allowed == 4


def test_one_is_not_timed_beside_others_that_end_their_pieces() -> None:
    pace = Pace(4)
    now, backs = drive(pace, 0.6, {1: 100e6, 4: 100e6})
    assert pace.allowed == 1 and backs == 1
    for _ in range(int(2 * HOLD_S / STEP_S)):
        now += STEP_S
        pace.gained(int(25e6 * STEP_S), now, STEP_S, 2)
    _, backs = drive(pace, 0.6, {1: 100e6, 4: 100e6}, now)
    assert pace.allowed == 1 and backs == 1, (
        "a quarter of the line for one of them would make four look worthwhile"
    )


def test_only_where_one_does_all_that_this_side_can_it_asks_for_more_at_once() -> None:
    busy, waiting = Pace(4), Pace(4)
    drive(busy, 0.6, {1: 900e6}, waiting=0.1)
    drive(waiting, 0.6, {1: 100e6, 4: 100e6})
    assert busy.allowed == waiting.allowed == 1
    assert busy.alone and not waiting.alone, "others are tried again, and would cut it short"


def test_a_slow_link_is_decided_too() -> None:
    pace = Pace(4)
    drive(pace, 6.0, {1: 100e3, 4: 400e3})
    assert pace.allowed == 4


def test_a_place_that_asks_for_less_gets_less_and_slowly_more() -> None:
    pace = Pace(4)
    drive(pace, 1.0, {1: 200e6, 4: 800e6})
    pace.refused()
    assert pace.allowed == 2
    pace.refused()
    pace.refused()
    assert pace.allowed == 1
    for _ in range(3):
        pace.served()
    assert pace.allowed == 4


def test_one_connection_is_one() -> None:
    pace = Pace(1)
    drive(pace, 1.0, {1: 1e6})
    pace.refused()
    pace.served()
    assert pace.allowed == 1
