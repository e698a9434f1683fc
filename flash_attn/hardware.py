"""What a call runs on, as a value; the only place that queries devices."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Hardware(NamedTuple):
    """A device as the launch configuration sees it."""

    kind: str  # "cuda", "hip", "cpu", or the torch device type of another vendor
    arch: str  # "sm_90", "gfx942", "" where there is none
    num_sms: int
    shared_memory: int  # bytes one program may use


_UNGUARDED = contextlib.nullcontext()
CPU = Hardware("cpu", "", 1, 0)


def of(device: torch.device) -> Hardware:
    """The hardware behind a torch device."""
    if device.type == "cpu":
        return CPU
    return _query(device.type, device.index if device.index is not None else _current_index(device.type))


def _current_index(device_type: str) -> int:
    return getattr(torch, device_type).current_device()


@functools.cache
def _query(device_type: str, index: int) -> Hardware:
    if device_type != "cuda":
        return Hardware(device_type, "", 1, 0)
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Hardware("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count, 65536)
    shared = getattr(properties, "shared_memory_per_block_optin", 101376)
    return Hardware("cuda", f"sm_{properties.major}{properties.minor}", properties.multi_processor_count, shared)


def device_guard(device: torch.device) -> Any:
    """A context in which the device is current; nothing where it already is."""
    return _UNGUARDED if device.type != "cuda" or is_current(device) else torch.cuda.device(device)


def is_current(device: torch.device) -> bool:
    """Whether kernels are launched on this CUDA device."""
    return device.index == torch._C._cuda_getDevice()


def raw_stream_getter(device: torch.device) -> Callable[[], int] | None:
    """A function that gives the device's current stream as Triton's launchers take it, None where that is unknown."""
    if device.type != "cuda":
        return None
    return functools.partial(torch._C._cuda_getCurrentRawStream, device.index)


def current_stream(device: torch.device) -> int:
    """The handle of the CUDA device's current stream."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream records a CUDA graph."""
    return torch.cuda.is_current_stream_capturing()
