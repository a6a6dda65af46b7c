"""What the NVIDIA driver says of a GPU: clocks, power, link, throttling. Empty answers without nvidia-ml-py."""

from __future__ import annotations

from typing import Any


class Clocks:
    """NVML of one GPU, by its index among the visible ones; only read, never set."""

    def __init__(self, index: int) -> None:
        self._nvml, self._handle = _open(index)

    def throttled(self) -> bool:
        """Slowed down by heat, by the hardware or by a power brake; a power cap is how the card always runs."""
        if self._nvml is None:
            return False
        nvml = self._nvml
        slowdown = (
            nvml.nvmlClocksThrottleReasonHwSlowdown
            | nvml.nvmlClocksThrottleReasonSwThermalSlowdown
            | nvml.nvmlClocksThrottleReasonHwThermalSlowdown
            | nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
        )
        reasons = _ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, self._handle)
        return bool(reasons is not None and reasons & slowdown)

    def conditions(self) -> dict[str, Any]:
        """Driver, and right now: clocks in MHz, power in W, temperature, PCIe generation and width."""
        if self._nvml is None:
            return {}
        nvml, handle = self._nvml, self._handle
        milliwatts = _ask(nvml.nvmlDeviceGetPowerUsage, handle)
        limit = _ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        return {
            "sm_mhz": _ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": _ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
            "power_w": None if milliwatts is None else milliwatts / 1000,
            "power_limit_w": None if limit is None else limit / 1000,
            "temperature_c": _ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            "pcie_gen": _ask(nvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
            "pcie_width": _ask(nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        }

    def driver(self) -> str | None:
        return None if self._nvml is None else str(_ask(self._nvml.nvmlSystemGetDriverVersion))


def _open(index: int) -> tuple[Any, Any]:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(_physical(index))
    except Exception:  # not installed, no driver, or a container without the library: conditions will say `not read`
        return None, None


def _physical(index: int) -> int:
    """NVML counts every GPU of the machine, torch those in CUDA_VISIBLE_DEVICES."""
    import os

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    numbers = [part for part in visible.split(",") if part.strip().isdigit()]
    return int(numbers[index]) if index < len(numbers) else index


def _ask(question: Any, *arguments: Any) -> Any:
    """NVML's answer, None where this card or driver does not give one."""
    try:
        answer = question(*arguments)
    except Exception:  # every NVML error is of one class that exists only when the library does
        return None
    return answer.decode() if isinstance(answer, bytes) else answer
