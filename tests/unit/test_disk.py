"""Quota tools are stood in for by scripts that print what the real ones print: kernels under test have no quotas."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.storage import file_system as disk
from outlast.storage.file_system import Limit

KIB = 1024
QUOTA = """Disk quotas for user jo (uid 1000):
     Filesystem   blocks   quota   limit   grace   files   quota   limit   grace
      /dev/sdb1  812000*  900000 1000000       0     120       0       0       0
"""
LFS = """     /lustre/a-very-long-name-of-a-mount-point
                [812000]  900000 1000000       -     120       0       0       -
"""
XFS = "/dev/sdb1                812000     900000    1000000   00 [--------] /scratch\n"
NONE = """Disk quotas for user root (uid 0): none
"""
UNLIMITED = "      /dev/sdb1   812000       0       0       0     120       0       0       0\n"


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a command on the path, the only one there, that notes its arguments and runs a shell script."""
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))

    def make(name: str, script: str) -> Path:
        noted = tmp_path / f"{name}.arguments"
        (tools / name).write_text(f'#!/bin/sh\necho "$@" >> {noted}\n{script}\n')
        (tools / name).chmod(0o755)
        return noted

    return make


def shown(text: str) -> str:
    return f"/bin/cat <<'END'\n{text}END"


def on(monkeypatch: pytest.MonkeyPatch, fstype: str) -> None:
    monkeypatch.setattr(disk, "_mount", lambda place: ("/scratch", fstype))


def test_free_space_is_the_kernels(tmp_path: Path) -> None:
    """A file system of a known size, if this may mount one; else the numbers of the one that is there."""
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=8m", "none", str(tmp_path)]
    mounted = mount is not None and subprocess.run([mount, *options], capture_output=True).returncode == 0
    try:
        if mounted:
            assert disk.free_space(tmp_path / "not" / "yet") == Limit("free space", 8 << 20, 8 << 20)
            (tmp_path / "file").write_bytes(bytes(1 << 20))
            assert disk.free_space(tmp_path) == Limit("free space", 7 << 20, 8 << 20)
            assert disk._mount(tmp_path / ".") == (str(tmp_path), "tmpfs")
        else:
            total = shutil.disk_usage(tmp_path).total
            assert disk.free_space(tmp_path / "not" / "yet").total_bytes == total
    finally:
        if mounted:
            subprocess.run(["umount", str(tmp_path)], check=True)


def test_what_is_there_of_a_path(tmp_path: Path) -> None:
    assert disk.existing(tmp_path / "a" / "b") == tmp_path
    assert disk.existing(tmp_path) == tmp_path


def test_without_tools_there_are_no_quotas(tmp_path: Path, tool: object) -> None:
    assert disk.quotas(tmp_path) == []


def test_quota(tmp_path: Path, tool: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "ext4")
    tool("lsattr", shown(f"1001 --------------e----P-- {tmp_path}\n"))
    noted = tool("quota", shown(QUOTA) + "\nexit 1")  # as it does when a limit is exceeded
    expected = (188_000 * KIB, 1_000_000 * KIB)
    assert disk.quotas(tmp_path) == [Limit(f"{kind} quota", *expected) for kind in ("user", "group", "project")]
    fixed = "-w -p -v --filesystem=/scratch"
    asked = [f"{fixed} -u {os.geteuid()}", f"{fixed} -g {os.getegid()}", f"{fixed} -P 1001"]
    assert noted.read_text().splitlines() == asked


def test_the_group_of_a_setgid_directory_counts(
    tmp_path: Path, tool: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives a directory to another group")
    on(monkeypatch, "ext4")
    noted = tool("quota", shown(NONE))
    place = tmp_path / "shared"
    place.mkdir()
    os.chown(place, 0, 4321)
    place.chmod(0o2775)
    assert disk.quotas(place) == []
    assert "-g 4321" in noted.read_text()


def test_lustre(tmp_path: Path, tool: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "lustre")
    project = f'if [ "$1" = project ]; then echo "  1001 P {tmp_path}"; exit; fi\n'
    noted = tool("lfs", project + shown(LFS))
    assert disk.quotas(tmp_path)[2] == Limit("project quota", 188_000 * KIB, 1_000_000 * KIB)
    assert f"quota -q -p 1001 {tmp_path}" in noted.read_text().splitlines()


def test_xfs_without_the_quota_command(
    tmp_path: Path, tool: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, "xfs")
    noted = tool("xfs_quota", shown(XFS))
    assert disk.quotas(tmp_path)[0] == Limit("user quota", 188_000 * KIB, 1_000_000 * KIB)
    assert f"quota -u -N -b -v {os.geteuid()} /scratch" in noted.read_text()


def test_a_soft_limit_alone_counts_and_what_is_over_it_is_nothing_left(
    tmp_path: Path, tool: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, "ext4")
    tool("quota", shown("/dev/sdb1 812000* 700000 0 1700000000 120 0 0 0\n"))
    assert disk.quotas(tmp_path)[0] == Limit("user quota", 0, 700_000 * KIB)


@pytest.mark.parametrize("text", [NONE, UNLIMITED, "", "quota: error while getting quota from server: 3 4\n"])
def test_no_limit_is_none(
    text: str, tmp_path: Path, tool: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, "ext4")
    tool("quota", shown(text))
    assert disk.quotas(tmp_path) == []


def test_a_tool_that_hangs_or_prints_rubbish_tells_nothing(
    tmp_path: Path, tool: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, "ext4")
    monkeypatch.setattr(disk, "TIMEOUT_S", 0.2)
    tool("quota", "exec /bin/sleep 60")
    assert disk.quotas(tmp_path) == []
    tool("quota", r"printf '\377\376\000'")
    assert disk.quotas(tmp_path) == []
