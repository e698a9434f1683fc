"""Compiles real launches for a GPU that is not there, and reads what the compiler made of them.

with compiling_for("sm_90", cache_dir) as launches:
    kernel[grid](*arguments)
assert launches[0].report.spill_bytes == 0
"""

import contextlib
import io
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_attn.hardware import Hardware

KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """A GPU as Triton's compiler and as the launch configuration see it."""

    target: GPUTarget
    hardware: Hardware
    shared_memory: int  # bytes one program may use


def _cuda(capability: int, num_sms: int, shared_memory: int) -> Architecture:
    hardware = Hardware("cuda", f"sm_{capability}", num_sms, shared_memory)
    return Architecture(GPUTarget("cuda", capability, 32), hardware, shared_memory)


def _hip(name: str, num_sms: int, warp_size: int, shared_memory: int = 64 * KIB) -> Architecture:
    """The package asks HIP devices for no limit and assumes 64 KiB."""
    return Architecture(GPUTarget("hip", name, warp_size), Hardware("hip", name, num_sms, 64 * KIB), shared_memory)


ARCHITECTURES = {
    "sm_80": _cuda(80, 108, 163 * KIB),
    "sm_86": _cuda(86, 84, 99 * KIB),
    "sm_89": _cuda(89, 128, 99 * KIB),
    "sm_90": _cuda(90, 132, 227 * KIB),
    "sm_100": _cuda(100, 148, 227 * KIB),
    "sm_120": _cuda(120, 170, 99 * KIB),
    "gfx90a": _hip("gfx90a", 104, 64),
    "gfx942": _hip("gfx942", 304, 64),
    "gfx950": _hip("gfx950", 256, 64, 160 * KIB),
    "gfx1100": _hip("gfx1100", 96, 32),
}


@dataclass(frozen=True)
class Report:
    """What one binary costs and which instructions it holds."""

    registers: int  # per thread; on HIP vector registers
    spill_bytes: int  # per thread
    shared_memory: int  # bytes of a program
    wgmma: int
    mma: int  # mma.sync
    tcgen05: int  # Blackwell's mma
    mfma: int  # CDNA's mfma or RDNA's wmma
    cp_async: int
    tma: int
    warnings: tuple[str, ...]  # ptxas C75xx: wgmma serialised and its like


@dataclass(frozen=True)
class Launch:
    """One launch that was compiled instead of run."""

    kernel: str
    compiled: Any
    report: Report
    descriptors: int  # tensor descriptors among its arguments

    @property
    def short_of_buffers(self) -> list[str]:
        """What is wrong with its tiles of 16-bit numbers, which are pipelined alike; a wgmma may still read one when the next
        copy begins."""
        pattern = r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+xb?f16"
        counts = re.findall(pattern, self.compiled.asm["ttgir"]) if self.report.wgmma else []
        words = f"gives its tiles {counts} buffers: a copy may overwrite what a product still reads"
        return [words] if len(set(counts)) > 1 else []


class StubDriver(DriverBase):
    """Answers what Triton asks of a driver before it launches. It is its own device: none shares binaries with another."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__()
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs on a stub driver")

    def get_current_device(self) -> "StubDriver":
        return self

    def set_current_device(self, device: Any) -> None: ...

    def get_current_stream(self, device: Any = None) -> int:
        return 0


class ThreadLog(threading.local):
    """What each thread writes to standard output."""

    def __init__(self) -> None:
        self.text = io.StringIO()

    def write(self, text: str) -> int:
        return self.text.write(text)

    def flush(self) -> None: ...


# of this process, by what they were made of: few kernels depend on every feature of a call
_compiled: dict[tuple[Any, ...], tuple[Any, Report]] = {}


@contextlib.contextmanager
def compiling_for(architecture: str, cache_dir: str) -> Iterator[list[Launch]]:
    """Inside, every launch of a Triton or Gluon kernel is compiled for the architecture and recorded, not run."""
    stub = StubDriver(ARCHITECTURES[architecture].target)
    launches: list[Launch] = []
    reports: dict[int, Report] = {}  # by the compiled kernel
    kernels: set[JITFunction] = set()
    run, compile_one, log = JITFunction.run, triton.compiler.compile, ThreadLog()

    def compile_and_report(source: Any, target: GPUTarget, options: dict[str, Any], **environment: Any) -> Any:
        made_of = source.hash(), target, tuple(sorted(options.items()))
        if made_of not in _compiled:
            log.text = io.StringIO()
            compiled = compile_one(source, target=target, options=options, **environment)
            _compiled[made_of] = compiled, _report(compiled, log.text.getvalue())
        compiled, reports[id(compiled)] = _compiled[made_of]
        return compiled

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.add(kernel)
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        if not warmup:
            compiled = compiled.result() if isinstance(compiled, triton.FutureKernel) else compiled
            descriptors = sum(isinstance(argument, TensorDescriptor) for argument in arguments)
            launches.append(Launch(kernel.__name__, compiled, reports[id(compiled)], descriptors))
        return compiled

    previous = driver._active
    driver.set_active(stub)
    try:
        with knobs.cache.scope(), knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
            knobs.cache.dir = cache_dir
            knobs.compilation.always_compile = True
            knobs.nvidia.dump_ptxas_log = True
            with (
                mock.patch.object(JITFunction, "run", record),
                mock.patch.object(triton.compiler, "compile", compile_and_report),
            ):
                yield launches
    finally:
        driver._active = previous
        for kernel in kernels:
            kernel.device_caches.pop(stub, None)
            kernel.compile = compile_one


def _report(compiled: Any, log: str) -> Report:
    return _cuda_report(compiled, log) if "ptx" in compiled.asm else _hip_report(compiled)


def _cuda_report(compiled: Any, log: str) -> Report:
    ptx = compiled.asm["ptx"]
    return Report(
        registers=_largest(r"Used (\d+) registers", log),
        spill_bytes=_largest(r"(\d+) bytes spill stores", log),
        shared_memory=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
        tcgen05=ptx.count("tcgen05.mma"),
        mfma=0,
        cp_async=len(re.findall(r"cp\.async\.c[ag]", ptx)),
        tma=ptx.count("cp.async.bulk.tensor"),
        warnings=tuple(line.strip() for line in log.splitlines() if re.search(r"C75\d\d", line)),
    )


def _hip_report(compiled: Any) -> Report:
    assembly = compiled.asm["amdgcn"]
    # spilled registers are 4 bytes per lane; scratch also holds what was indexed dynamically
    spilled = 4 * (
        _largest(r"\.vgpr_spill_count:\s*(\d+)", assembly) + _largest(r"\.sgpr_spill_count:\s*(\d+)", assembly)
    )
    return Report(
        registers=_largest(r"\.vgpr_count:\s*(\d+)", assembly),
        spill_bytes=max(spilled, _largest(r"\.private_segment_fixed_size:\s*(\d+)", assembly)),
        shared_memory=compiled.metadata.shared,
        wgmma=0,
        mma=0,
        tcgen05=0,
        mfma=len(re.findall(r"^\s*v_(?:mfma|smfmac|wmma)_", assembly, re.MULTILINE)),
        cp_async=0,
        tma=0,
        warnings=(),
    )


def _largest(pattern: str, text: str) -> int:
    """The largest number the pattern captures; 0 where it finds none."""
    return max(map(int, re.findall(pattern, text)), default=0)
