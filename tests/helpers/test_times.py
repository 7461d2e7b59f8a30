"""tests/times.py reads what pytest writes."""

from tests.times import table

BEFORE = """
============================= slowest durations ==============================
297.32s setup    tests/zero3/test_nvme.py::test_a[1-fp32]
2.20s call     tests/zero3/test_nvme.py::test_a[1-fp32]
0.50s call     tests/unit/test_noise.py::test_b

(7 durations < 0.005s hidden.  Use -vv to show these durations.)
1 failed, 15 deselected in 325.64s (0:05:25)
"""
AFTER = "1.25s call     tests/unit/test_noise.py::test_b\n0.25s teardown tests/unit/test_noise.py::test_b\n"


def test_seconds_by_file_of_two_logs():
    rows = [line.split() for line in table([BEFORE, AFTER]).splitlines()]
    assert rows == [
        ["tests/unit/test_noise.py", "0.5", "1.5"],
        ["tests/zero3/test_nvme.py", "299.5", "0.0"],
        ["all", "300.0", "1.5"],
    ]
