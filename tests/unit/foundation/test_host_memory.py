"""Test the memory limits of a host, with made-up `/proc` and `/sys`."""

from __future__ import annotations

from pathlib import Path

from foundation.host_memory import available_bytes, total_bytes

GIB = 2**30


def host(root: Path, cgroup: str, files: dict[str, object]) -> Path:
    """Write the files of a host with 64 GiB of memory, of which 40 are available."""
    written = {
        "proc/meminfo": f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {40 << 20} kB\n",
        "proc/self/cgroup": cgroup,
    }
    for name, content in (written | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def test_without_cgroups_the_machine_counts(tmp_path):
    root = host(tmp_path, "0::/user", {})
    assert total_bytes(root) == 64 * GIB
    assert available_bytes(root) == 40 * GIB


def test_the_tightest_cgroup_counts_and_its_page_cache_is_available(tmp_path):
    outer, inner = "sys/fs/cgroup/job", "sys/fs/cgroup/job/step"
    limits = {
        f"{outer}/memory.max": 16 * GIB,
        f"{outer}/memory.current": 12 * GIB,
        f"{outer}/memory.stat": f"anon 1\ninactive_file {5 * GIB}",
        f"{inner}/memory.max": "max",
        f"{inner}/memory.current": 12 * GIB,
        f"{inner}/memory.stat": "anon 1",
    }
    root = host(tmp_path, "0::/job/step", limits)
    assert total_bytes(root) == 16 * GIB
    assert available_bytes(root) == (16 - 12 + 5) * GIB


def test_the_cgroup_of_a_container_is_mounted_as_the_root(tmp_path):
    mount = "sys/fs/cgroup/memory"
    limits = {
        f"{mount}/memory.limit_in_bytes": 8 * GIB,
        f"{mount}/memory.usage_in_bytes": 9 * GIB,  # the limit was lowered after it was used
        f"{mount}/memory.stat": "total_inactive_file 0",
    }
    root = host(tmp_path, "4:cpu:/pod/x\n3:cpuacct,memory:/pod/x", limits)
    assert total_bytes(root) == 8 * GIB
    assert available_bytes(root) == 0


def test_the_largest_number_of_version_1_is_no_limit(tmp_path):
    mount = "sys/fs/cgroup/memory"
    limits = {
        f"{mount}/memory.limit_in_bytes": 0x7FFFFFFFFFFFF000,
        f"{mount}/memory.usage_in_bytes": 9 * GIB,
        f"{mount}/memory.stat": "total_inactive_file 0",
    }
    assert available_bytes(host(tmp_path, "3:memory:/", limits)) == 40 * GIB


def test_a_system_without_these_files_reports_nothing(tmp_path):
    assert available_bytes(tmp_path) is None and total_bytes(tmp_path) is None


def test_this_host_has_memory():
    assert 0 < (available_bytes() or 1) <= (total_bytes() or 2)
