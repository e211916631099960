from uenvd.config import Limits
from uenvd.fuse.bounds import data_limit_bytes, most_bytes

MB = 1 << 20


def test_more_workers_and_a_larger_cache_count_more() -> None:
    assert data_limit_bytes(64 * MB) == 320 * MB
    assert most_bytes(2, 64 * MB) == 2 * 320 * MB + 64 * MB + 64 * MB
    assert most_bytes(3, 64 * MB) - most_bytes(2, 64 * MB) == data_limit_bytes(64 * MB)
    assert most_bytes(2, 65 * MB) > most_bytes(2, 64 * MB)


def test_threads_need_room_for_their_stacks() -> None:
    assert data_limit_bytes(0, threads=True) >= 40 * 8 * MB, (
        "as many as trio has, with stacks of the usual size"
    )
    assert most_bytes(2, 0, threads=True) == data_limit_bytes(0, threads=True)


def test_the_usual_limits_fit_each_other() -> None:
    assert Limits.files * most_bytes(2, 64 * MB) <= Limits.memory_bytes
