"""devices.yaml: what is in it, what is not, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgestill.pipeline.errors import UsageError
from edgestill.pipeline.profile.devices import (
    EmulatedDevice,
    SshDevice,
    device_named,
    known_devices,
    read_devices,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "devices.yaml"
    path.write_text(text)
    return path


def test_this_machine_is_always_there_and_emulations_where_a_sysroot_is(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    bare = {"XDG_CONFIG_HOME": str(tmp_path)}

    assert list(known_devices(tmp_path, bare)) == ["local"]
    found = known_devices(tmp_path, {**bare, "EDGESTILL_ARM_SYSROOT": str(tmp_path)})
    assert list(found) == ["local", "a72-emulated", "a76-emulated"]


def test_the_working_folder_s_file_counts_before_the_user_s(tmp_path: Path) -> None:
    home = tmp_path / "config/edgestill"
    home.mkdir(parents=True)
    write(home, "devices: {mine: {kind: ssh, host: mine}}")
    here = tmp_path / "here"
    here.mkdir()
    environment = {"XDG_CONFIG_HOME": str(tmp_path / "config")}

    assert list(known_devices(here, environment)) == ["local", "mine"]
    write(here, "devices: {ours: {kind: ssh, host: ours}}")
    assert list(known_devices(here, environment)) == ["local", "ours"]


def test_paths_are_those_of_the_file_s_folder(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "devices:\n  a: {kind: emulated, sysroot: arm, cpu: cortex-a72}\n"
        "  b: {kind: ssh, host: b, ssh_config: cfg, port: 2222}\n",
    )

    found = read_devices(path)

    assert found["a"] == EmulatedDevice(kind="emulated", sysroot=tmp_path / "arm", cpu="pi4")
    assert isinstance(found["b"], SshDevice)
    assert found["b"].ssh_config == tmp_path / "cfg"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("devices: {a: {kind: ssh, host: a, password: x}}", "secrets have no place here"),
        ("devices: {a: {kind: ssh, host: a, hst: x}}", "hst: unknown key"),
        ("devices: {a: {kind: ssh, host: -oProxyCommand=x}}", "expected an alias of ~/.ssh/config"),
        ("devices: {a: {host: a}}", "expected kind: ssh, emulated or local"),
        ("devices: {a: {kind: emulated, sysroot: x, cpu: m1}}", "'pi4', 'pi5' or 'avx2', got 'm1'"),
        ("devices: {local: {kind: ssh, host: a}}", "is this machine; give the device another"),
        ("devices: [", "is not YAML"),
        ("- a", "cannot be used"),
        ("", "cannot be used"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_devices(write(tmp_path, text))


def test_an_unknown_device_lists_the_known_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("EDGESTILL_ARM_SYSROOT", raising=False)

    with pytest.raises(UsageError, match="device 'pi5': expected one of local; there is no"):
        device_named("pi5", tmp_path)
