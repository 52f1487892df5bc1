"""devices.yaml: the machines that a model can be measured on, by name.

    devices:
      pi5: {kind: ssh, host: pi5}                        # as in ~/.ssh/config, or user@address
      pi4: {kind: ssh, host: pi@10.0.0.4, python: ~/venv/bin/python}
      cam: {kind: ssh, host: cam, perf_test: /opt/ort/onnxruntime_perf_test}   # without Python
      a72: {kind: emulated, sysroot: arm/, cpu: pi4}     # made by scripts/arm_sysroot

Read from the working folder, else from the user's configuration folder. `local`, this machine, is
there without it, and so are `a72-emulated` and `a76-emulated` where $EDGESTILL_ARM_SYSROOT names a
sysroot. The file holds names only: how to log in is OpenSSH's to know, and secrets have no place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from ..errors import UsageError
from ..report import LOCAL
from ..spec import Spec

FILE = "devices.yaml"
SYSROOT_VARIABLE = "EDGESTILL_ARM_SYSROOT"
BY_ITSELF = {"a72-emulated": "pi4", "a76-emulated": "pi5"}
CPUS = {"pi4": "pi4", "cortex-a72": "pi4", "pi5": "pi5", "cortex-a76": "pi5", "avx2": "avx2"}
SECRETS = ("password", "passphrase", "key", "identity", "token", "secret")

DeviceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class LocalDevice(Spec):
    """This machine."""

    kind: Literal["local"] = "local"


class SshDevice(Spec):
    """A board that the system's OpenSSH reaches.

    `host` is an alias of ~/.ssh/config or user@address. `perf_test`: onnxruntime's own program on a
    board without Python. `ssh_config`: read instead of ~/.ssh/config.
    """

    kind: Literal["ssh"]
    host: Annotated[str, Field(pattern=r"^[^\s-][^\s]*$")]  # a dash would begin an option of ssh
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    python: Annotated[str, Field(min_length=1)] = "python3"
    perf_test: Annotated[str, Field(min_length=1)] | None = None
    ssh_config: Path | None = None


class EmulatedDevice(Spec):
    """A CPU that qemu stands in for: numbers and crashes are real, times are not latency."""

    kind: Literal["emulated"]
    sysroot: Path
    cpu: Literal["pi4", "pi5", "avx2"]

    @field_validator("cpu", mode="before")
    @classmethod
    def _by_core(cls, value: object) -> object:
        return CPUS.get(value, value) if isinstance(value, str) else value


Device = Annotated[LocalDevice | SshDevice | EmulatedDevice, Field(discriminator="kind")]


class DevicesFile(Spec):
    """devices.yaml."""

    devices: dict[DeviceName, Device]


def known_devices(
    folder: Path, environment: Mapping[str, str] | None = None, *, file: Path | None = None
) -> dict[str, LocalDevice | SshDevice | EmulatedDevice]:
    """Every device by name, `local` first.

    Args:
        folder: where the user works.
        environment: None: this process's.
        file: the one that counts; None: that of the folder, else the user's.

    Raises:
        UsageError: the file cannot be read, or is not what it should be.
    """
    environment = os.environ if environment is None else environment
    found: dict[str, LocalDevice | SshDevice | EmulatedDevice] = {LOCAL: LocalDevice()}
    sysroot = environment.get(SYSROOT_VARIABLE)
    if sysroot and Path(sysroot, "run").is_file():
        for name, cpu in BY_ITSELF.items():
            found[name] = EmulatedDevice.model_validate(
                {"kind": "emulated", "sysroot": Path(sysroot).resolve(), "cpu": cpu}
            )
    path = file or devices_file(folder, environment)
    if path is not None:
        found |= read_devices(path)
    return found


def device_named(
    name: str, folder: Path, *, file: Path | None = None
) -> LocalDevice | SshDevice | EmulatedDevice:
    """As `known_devices`. Raises: UsageError: there is none."""
    known = known_devices(folder, file=file)
    if name not in known:
        path = file or devices_file(folder, os.environ)
        where = f"{path} has none of that name" if path else f"there is no {FILE} here"
        raise UsageError(
            f"device {name!r}: expected one of {', '.join(known)}; {where}: write it there, e.g. "
            f"devices: {{{name}: {{kind: ssh, host: {name}}}}}"
        )
    return known[name]


def devices_file(folder: Path, environment: Mapping[str, str]) -> Path | None:
    """The one that counts: of the working folder, else of the user."""
    home = environment.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    candidates = (folder / FILE, Path(home) / "edgestill" / FILE)
    return next((path for path in candidates if path.exists()), None)


def read_devices(path: Path) -> dict[str, LocalDevice | SshDevice | EmulatedDevice]:
    """The file's own devices, paths made absolute.

    Raises:
        UsageError: see `known_devices`.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    try:
        found = DevicesFile.model_validate(content)
    except ValidationError as error:
        problems = "".join(f"\n  {_problem(one)}" for one in error.errors())
        raise UsageError(f"{path}: cannot be used:{problems}") from error
    if LOCAL in found.devices and not isinstance(found.devices[LOCAL], LocalDevice):
        raise UsageError(f"{path}: devices.{LOCAL}: is this machine; give the device another name")
    return {name: _absolute(one, path.parent) for name, one in found.devices.items()}


def _problem(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"]) or "the file"
    last = str(error["loc"][-1]) if error["loc"] else ""
    if any(word in last.lower() for word in SECRETS):
        return (
            f"{place}: secrets have no place here; log in with a key that ssh-agent or "
            "~/.ssh/config knows, and name the host only"
        )
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key"
    if error["type"] == "union_tag_not_found":
        return f"{place}: expected kind: ssh, emulated or local"
    if last == "host":
        return (
            f"{place}: expected an alias of ~/.ssh/config or user@address, got {error['input']!r}"
        )
    return f"{place}: {error['msg']}, got {error['input']!r}"


def _absolute(
    device: LocalDevice | SshDevice | EmulatedDevice, folder: Path
) -> LocalDevice | SshDevice | EmulatedDevice:
    base = folder.resolve()
    if isinstance(device, EmulatedDevice):
        return device.model_copy(update={"sysroot": base / device.sysroot.expanduser()})
    if isinstance(device, SshDevice) and device.ssh_config is not None:
        return device.model_copy(update={"ssh_config": base / device.ssh_config.expanduser()})
    return device
