"""The devices on which bfloat16 is faster than float32."""

import pytest
import torch

from gbci_fast.fast import devices

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("amx", "avx512", "intel", "expected"),
    [
        (True, True, True, True),
        (False, True, True, False),
        (False, True, False, True),
        (False, False, False, False),
    ],
)
def test_bfloat16_units_of_a_cpu(monkeypatch, amx, avx512, intel, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(devices, "_is_intel", lambda: intel)
    assert devices.has_bfloat16_units(CPU) is expected


def test_the_operating_system_names_the_vendor(monkeypatch, tmp_path):
    devices._is_intel.cache_clear()
    monkeypatch.setattr(devices, "Path", lambda _: tmp_path / "missing")
    for name, expected in (("Intel64 Family 6 Model 143 Stepping 8, GenuineIntel", True), ("AuthenticAMD", False)):
        monkeypatch.setattr(devices.platform, "processor", lambda name=name: name)
        assert devices._is_intel() is expected
        devices._is_intel.cache_clear()
    file = tmp_path / "cpuinfo"
    file.write_text("vendor_id\t: GenuineIntel\n")
    monkeypatch.setattr(devices, "Path", lambda _: file)
    assert devices._is_intel()
    devices._is_intel.cache_clear()
