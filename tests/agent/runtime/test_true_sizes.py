"""What programs believe their machine to be, in a session of one processor and 512 MiB."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from madang.agent import files
from madang.agent.runtime.native import NativeRuntime
from madang.kit.clock import SystemClock
from madang.testing.sessions import Launcher, Sessions, numpy_image, open_launcher, spec
from madang.testing.sessions import sessions as open_sessions
from madang.wire.size import MIB

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="processor sets need root here")

MEM = 512 * MIB


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with open_launcher() as started:
        yield started


@pytest.fixture
async def sessions(launcher: Launcher) -> AsyncIterator[Sessions]:
    runtime = NativeRuntime(launcher.socket, str(launcher.state), SystemClock())
    async with open_sessions(runtime, launcher) as found:
        yield found


async def text(sessions: Sessions, *argv: str, **more: Any) -> str:
    done = await sessions.run(*argv, **({"mem_bytes": MEM} | more))
    assert done.code == 0, (done.ended.text, done.err)
    return done.out.decode()


def needs(program: str) -> str:
    """Where the host has *program* within what sessions see; else skip."""
    path = shutil.which(program, path="/usr/local/bin:/usr/bin:/bin")
    if path is None:
        pytest.skip(f"this machine has no {program}")
    return path


async def test_the_shell_s_tools_tell_the_size(sessions: Sessions) -> None:
    script = (
        "nproc; env -u OMP_NUM_THREADS nproc; nproc --all; getconf _NPROCESSORS_ONLN; "
        "grep -c ^processor /proc/cpuinfo; grep -c '^cpu[0-9]' /proc/stat; "
        "awk '/MemTotal/ {print $2}' /proc/meminfo; free -k | awk '/Mem:/ {print $2}'"
    )
    told = (await text(sessions, "/bin/sh", "-c", script)).split()

    assert told[:2] == ["1", "1"]
    assert told[3:6] == ["1", "1", "1"]
    assert told[6:] in ([str(MEM // 1024)] * 2, [str(MEM // 1024)])


async def test_python_tells_the_size(sessions: Sessions) -> None:
    code = (
        "import json, multiprocessing, os, concurrent.futures as f\n"
        "print(json.dumps([os.cpu_count(), len(os.sched_getaffinity(0)),\n"
        "    multiprocessing.cpu_count(), os.sysconf('SC_NPROCESSORS_ONLN'),\n"
        "    f.ThreadPoolExecutor()._max_workers]))"
    )
    told = json.loads(await text(sessions, "/usr/bin/python3", "-I", "-c", code))
    assert told == [1, 1, 1, 1, 5]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="this machine has one processor")
async def test_two_processors_are_two(sessions: Sessions) -> None:
    told = await text(sessions, "/bin/sh", "-c", "nproc; getconf _NPROCESSORS_ONLN", cpu=1.5)
    assert told.split() == ["2", "2"]


async def test_numbers_of_processors_agree_with_the_kernel(sessions: Sessions) -> None:
    """A runtime that matches cpuinfo with its affinity mask finds what it looks for."""
    code = (
        "import os, re\n"
        "mine = os.sched_getaffinity(0)\n"
        "info = open('/proc/cpuinfo').read()\n"
        "told = {int(n) for n in re.findall(r'processor\\s*: (\\d+)', info)}\n"
        "possible = open('/sys/devices/system/cpu/possible').read().strip().split('-')\n"
        "assert mine == told, (mine, told)\n"
        "assert max(mine) == int(possible[-1])"
    )
    await text(sessions, "/usr/bin/python3", "-I", "-S", "-c", code)


@pytest.mark.parametrize("cpu", [1, 2])
async def test_lscpu_and_joblib_count_physical_cores(sessions: Sessions, cpu: int) -> None:
    """joblib and scikit-learn start as many workers as ``lscpu --parse=core`` has lines."""
    if cpu > (os.cpu_count() or 1):
        pytest.skip("this machine has one processor")
    lscpu = needs("lscpu")
    told = await text(sessions, lscpu, "--parse=core", cpu=cpu)
    cores = {line for line in told.splitlines() if not line.startswith("#")}
    code = (
        "import glob\n"
        "paths = glob.glob('/sys/devices/system/cpu/cpu*/topology/thread_siblings_list')\n"
        "print(len({open(path).read() for path in paths}))"
    )
    seen = await text(sessions, "/usr/bin/python3", "-I", "-S", "-c", code, cpu=cpu)

    assert all(core.isdecimal() for core in cores)
    assert len(cores) == int(seen) <= cpu


@pytest.mark.parametrize("variables", ["kept", "removed"])
async def test_openblas_starts_as_many_threads_as_there_are_processors(
    sessions: Sessions, launcher: Launcher, variables: str
) -> None:
    try:
        image = numpy_image(launcher.state)
    except LookupError as exc:
        pytest.skip(str(exc))
    code = (
        "import os\n"
        f"if {variables == 'removed'}:\n"
        "    for name in list(os.environ):\n"
        "        if name.endswith('_THREADS'): del os.environ[name]\n"
        "import numpy\n"
        "a = numpy.ones((512, 512), numpy.float32)\n"
        "(a @ a).sum()\n"
        "print(len(os.listdir('/proc/self/task')))"
    )
    told = await text(sessions, "/usr/bin/python3", "-c", code, image=image)
    assert told.strip() == "1"


async def test_java_sees_its_processor_and_memory(sessions: Sessions) -> None:
    java = needs("java")
    done = await sessions.run(java, "-XshowSettings:system", "-version", mem_bytes=MEM)

    told = (done.out + done.err).decode()
    assert "Effective CPU Count: 1\n" in told
    assert "Memory Limit: 512.00M" in told


async def test_node_sees_its_processor_and_memory(sessions: Sessions) -> None:
    node = needs("node")
    code = (
        "const os = require('os'); console.log(JSON.stringify([os.cpus().length, os.totalmem()]))"
    )
    told = json.loads(await text(sessions, node, "-e", code))
    assert told == [1, MEM]

    parallel = await text(sessions, node, "-p", "require('os').availableParallelism?.() ?? 1")
    assert parallel.strip() == "1"


OPENMP = """
#include <omp.h>
#include <stdio.h>
#include <unistd.h>
#include <sys/sysinfo.h>
int main(void) {
    int threads = 0;
    #pragma omp parallel reduction(+:threads)
    threads += 1;
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    printf("%d %d %d %ld\\n", threads, omp_get_num_procs(), get_nprocs(), online);
    return 0;
}
"""


async def test_openmp_and_c_programs_see_their_processor(sessions: Sessions) -> None:
    gcc = needs("gcc")
    build = f"{gcc} -fopenmp -O1 -o omp omp.c && ./omp && env -u OMP_NUM_THREADS ./omp"
    asked = spec("/bin/sh", "-c", build, mem_bytes=MEM)
    kernel = await sessions.prepare(asked)

    async def source() -> AsyncIterator[bytes]:
        yield OPENMP.encode()

    await files.write_file(await sessions.runtime.files(kernel), "omp.c", source())
    await sessions.runtime.start(kernel, asked)
    done = await sessions.outcome(kernel)

    assert done.out.split() == [b"1"] * 8, done.err


async def test_the_session_sees_its_own_control_group(sessions: Sessions) -> None:
    script = (
        "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null "
        "|| cat /sys/fs/cgroup/memory.max; cat /proc/self/cgroup"
    )
    limit, *groups = (await text(sessions, "/bin/sh", "-c", script)).split("\n")

    assert limit == str(MEM)
    assert all(re.fullmatch(r"\d+:[^:]*:/.*", line) for line in groups if line)
