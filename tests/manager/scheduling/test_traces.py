"""The benches of the planner on small made-up traces, which are right by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from madang.manager.scheduling.types import Policy

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _bench_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


def test_a_small_openb_trace_fills_its_machines(tmp_path: Path) -> None:
    import openb

    nodes = tmp_path / "nodes.csv"
    nodes.write_text(
        "sn,cpu_milli,memory_mib,gpu,model\n"
        "a,32000,65536,2,T4\nb,32000,65536,2,G2\nc,32000,65536,0,\n"
    )
    pods = tmp_path / "pods.csv"
    pods.write_text(
        "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\n"
        "x,4000,1024,1,500,\ny,4000,1024,1,1000,G2\nz,1000,1024,0,0,\n"
    )
    rooms, tasks = openb.read_rooms(nodes), openb.read_tasks(pods)
    assert [room.devices for room in rooms] == [(1000, 1000)] * 2  # machines with devices only
    assert [task.demand for task in tasks] == [500, 1000, 0]
    assert tasks[1].models == {"G2"}
    policy = Policy(placement="fragments", typical=openb.mix(tasks))
    found = [openb.allocation(rooms, tasks, policy, seed) for seed in range(5)]
    assert all(50 <= one <= 100 and one % 12.5 == 0 for one in found)
    assert found == [openb.allocation(rooms, tasks, policy, seed) for seed in range(5)]


def test_a_small_philly_trace_is_worked_through(tmp_path: Path) -> None:
    import philly

    path = tmp_path / "jobs.csv"
    path.write_text(
        "t,duration,num_gpus,vc\n0,3600,8,a\n0,7200,16,b\n1,600,4,a\n2,36000,8,a\n3,60,1,b\n"
    )
    jobs = philly.read_jobs(path)
    policy = Policy(reserve_after_s=0.0, reserve_at_most=1)
    found = philly.replay(jobs, policy, machines=2)
    assert len(found.completions_h) == len(jobs)
    # The job of 8 starts at once; the one of 16 waits for it, those that end before pass.
    assert sorted(round(hours, 1) for hours in found.completions_h) == [0.0, 0.2, 1.0, 3.0, 13.0]


def test_without_the_traces_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import traces

    monkeypatch.delenv(traces.FOLDER, raising=False)
    with pytest.raises(traces.TracesMissing, match="set MADANG_BENCH_TRACES to a folder"):
        next(traces.fgd("default"))
    monkeypatch.setenv(traces.FOLDER, "/nonexistent")
    with pytest.raises(traces.TracesMissing, match="says where it comes from"):
        next(traces.philly_rows("fifo"))
