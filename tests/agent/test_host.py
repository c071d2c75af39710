"""What is in use on the whole machine."""

from __future__ import annotations

import os
import time

from madang.agent.host import HostMeter


def test_memory_in_use_lies_between_nothing_and_all() -> None:
    load = HostMeter().load()
    assert load.cpus == os.cpu_count()
    assert 0 < load.mem_bytes < load.mem_total_bytes
    held = b"x" * (256 << 20)
    assert HostMeter().load().mem_total_bytes == load.mem_total_bytes
    del held


def test_a_busy_core_is_seen_though_no_session_runs() -> None:
    meter = HostMeter()
    used = time.process_time()
    while time.process_time() - used < 0.3:
        pass
    load = meter.load()
    assert 0.3 < load.cpu <= load.cpus


def test_two_looks_at_one_instant_are_no_error() -> None:
    meter = HostMeter()
    for _ in range(100):
        load = meter.load()
        assert 0 <= load.cpu <= load.cpus
