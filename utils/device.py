"""Which device a run uses: Ascend NPU, CUDA or CPU, and all that differs between them.

Nothing else in this package names a device or a backend, but for the table in device_peaks. `import torch_npu` happens here alone, and only where the
package is installed. Import this module before transformers, which would import torch_npu too: a torch_npu that finds
no CANN ends the process here, in one line.
"""

import functools
import logging
import os
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy

from utils import cann, device_peaks, garbage_collection, host_memory
from utils.errors import UsageError, leave, one_line

logger = logging.getLogger(__name__)

# What torch_npu and CANN read when they start, so it is set before torch_npu is imported. What the user exports wins.
NPU_VARIABLES = {
    # A second thread hands operators to the device while Python goes on. 1 is torch_npu's own default, written down
    # because 2 is often recommended: torch_npu 2.13 calls 2 "pure-inference only" (set_task_queue_enable), and it
    # needs more memory.
    "TASK_QUEUE_ENABLE": "1",
    # Seconds in which all ranks must reach their first collective operation, 120 to 7200. HCCL's default of 120 is soon
    # over: the first rank reads the text while the others wait. torch_npu itself asks for 300 or more.
    "HCCL_CONNECT_TIMEOUT": "1200",
    # A float16 overflow gives inf, as IEEE 754 has it, and not 65504: the loss scale lives by seeing it. The default of
    # Atlas A2 and A3, written down because older releases of CANN had 0. See shows_overflow.
    "INF_NAN_MODE_ENABLE": "1",
}

# How each kind of device names itself in results ("1p-NPU"), and the variable that hides all but some of its devices.
NAMES = {"npu": "NPU", "cuda": "GPU", "cpu": "CPU", "mps": "MPS", "xpu": "XPU"}
VISIBLE_DEVICES = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}


def _select_device(argv: list[str]) -> None:
    """Makes the device that --device_id names, there or in the config file, the only one that this process sees.

    Before torch and transformers are imported: they count devices, and CANN and CUDA read these variables once. What
    cannot be is left for check_device_id to tell.
    """
    words = "\0".join([*argv, cann.config_text(argv)])
    named = re.search(r"\bdevice[_-]id[\"']?\s*[=:\0]\s*[\"']?(\d+)", words)
    if named is None or process_count() > 1:
        return
    for variable in VISIBLE_DEVICES.values():
        numbers = os.environ[variable].split(",") if variable in os.environ else None
        if numbers is None or int(named[1]) < len(numbers):
            os.environ[variable] = numbers[int(named[1])] if numbers else named[1]


def process_count() -> int:
    """The number of processes that a launcher such as torchrun says it has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_process_count() -> int:
    """How many of these share this host; all of them where the launcher tells no other number."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", process_count()))


torch_npu: Any = None
_select_device(sys.argv[1:])
host_memory.ask_for_huge_pages()
_uses_npu = cann.prepare_import(sys.argv[1:], NPU_VARIABLES)
try:
    with garbage_collection.paused():
        import torch  # which imports torch_npu by itself, unless TORCH_DEVICE_BACKEND_AUTOLOAD=0

        if _uses_npu:
            import torch_npu  # type: ignore[no-redef]
except Exception as error:  # ImportError, RuntimeError and, of torch_npu, bare Exception
    if not _uses_npu:
        raise
    leave(UsageError(cann.explain(error)))

# What processes on devices of a kind exchange gradients by.
BACKENDS = {"npu": "hccl", "cuda": "nccl", "xpu": "xccl"}


def accelerator() -> str | None:
    """ "npu", "cuda" or another accelerator that torch can use here; None on a machine with a CPU alone."""
    if torch_npu is not None and torch_npu.npu.is_available():
        return "npu"
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None else None


def missing_npu() -> str | None:
    """Why a machine with torch_npu trains on its CPU, in one line; None if it has an NPU, or no torch_npu."""
    if torch_npu is None or accelerator() is not None:
        return None
    visible = os.environ.get(VISIBLE_DEVICES["npu"])
    hidden = f" ({VISIBLE_DEVICES['npu']} is {visible})" if visible is not None else ""
    return (
        f"torch_npu is installed but finds no NPU{hidden}: python -m utils.doctor tells why; add --use_cpu to train on "
        "the CPU"
    )


def configure(on: torch.device, jit_compile: bool = False, internal_format: bool = False) -> None:
    """Settings of the chosen device, once, before it computes. There are some for NPUs only.

    jit_compile: operators are compiled anew for each new shape, which is the default on the Atlas training series.
        Otherwise the compiled ones that come with CANN are taken: the last batch of an epoch, or lines of differing
        lengths, then cost no minutes. Needs CANN's package of operators (kernels or ops).
    internal_format: tensors may be kept in a padded, reordered layout of the device's own, the default of some
        releases on Atlas A2. Otherwise each lies in memory as torch has it, which combined gradients and float32
        masters build on: their tensors are views of one flat buffer.
    """
    if on.type != "npu":
        return

    def set_compile_mode() -> None:
        torch_npu.npu.set_compile_mode(jit_compile=jit_compile)

    def set_internal_format() -> None:
        torch_npu.npu.config.allow_internal_format = internal_format

    for setting in (set_compile_mode, set_internal_format):
        try:
            setting()
        except AttributeError as missing:
            logger.debug("%s: this torch_npu has no such setting (%s)", setting.__name__, missing)


def backend(on: torch.device) -> str:
    """What processes exchange tensors of this device by: hccl, nccl or gloo."""
    return BACKENDS.get(on.type, "gloo")


def shows_overflow(on: torch.device) -> bool:
    """Whether a float16 overflow gives inf. Ascend's Atlas training series (910A) gives 65504 instead, so that a loss
    scale cannot see it there; A2 and A3 give inf unless INF_NAN_MODE_ENABLE=0."""
    if on.type != "npu":
        return True
    try:
        return torch_npu.npu.utils.is_support_inf_nan()
    except AttributeError:  # a torch_npu of before
        return True


def seed_all(seed: int) -> None:
    """Seeds Python, NumPy and torch on every device: the draws are those after transformers.set_seed."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)  # of the CPU, and by manual_seed_all of CUDA and of torch_npu's devices


def check_device_id(device_id: int) -> None:
    """Raises ValueError for a --device_id that names no device, or under a launcher, which gives each rank its own."""
    if device_id < 0:
        raise ValueError(f"--device_id {device_id}: devices are numbered from 0")
    if process_count() > 1:
        raise ValueError(f"--device_id {device_id}: torchrun gives each process its own device; leave the flag out")
    if accelerator() is None and (torch_npu is not None or torch.version.cuda is not None):
        raise ValueError(f"--device_id {device_id}: there is no such device; add --use_cpu to train on the CPU")


def check_free(on: torch.device) -> None:
    """Raises UsageError if the device cannot compute, as when other processes hold all its memory."""
    try:
        torch.ones(1, device=on).add_(1).item()
    except RuntimeError as error:
        raise UsageError(
            f"{on} cannot be used: {one_line(error)[:200]}; end what runs on it (npu-smi info, nvidia-smi), or choose "
            "another device by --device_id, or add --use_cpu",
            of_one_rank=True,
        ) from error


def display_name(device: torch.device, processes: int) -> str:
    """The device as results tables name it: "1p-CPU", "8p-NPU"."""
    return f"{processes}p-{NAMES.get(device.type, device.type.upper())}"


def half_slowdown(device: torch.device, dtype: torch.dtype) -> float:
    """How many times longer a matrix product takes in `dtype` than in float32, measured in about 0.2 s; on a CPU only.

    Processor flags do not tell: a CPU may list avx512_bf16 and still run at a hundredth of its float32 speed, for want
    of a kernel that uses it. Accelerators are taken to be built for half precision: 1.0.
    """
    if device.type != "cpu" or dtype == torch.float32:
        return 1.0
    ones = torch.ones(256, 256)
    return _least_seconds(ones.to(dtype), 3) / _least_seconds(ones, 50)


def fused_adamw_obeys_grad_scale(device: torch.device) -> bool:
    """Whether torch._fused_adamw_ uses its `grad_scale`: torch_npu's kernel accepts the argument and ignores it."""
    return device.type in ("cpu", "cuda")


class DeferredNumber:
    """A number on its way from the device: launched now, read later, when nobody has to wait for it any more."""

    def __init__(self, tensor: torch.Tensor):
        self._host, self._event = tensor, None
        if tensor.device.type != "cpu":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.Event(tensor.device)
            self._event.record()

    def get(self) -> float:
        """The number. Waits for what was launched before it, not for what came after."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.item()


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that was launched. Nothing to wait for on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def mark(on: torch.device):
    """A moment in the work that the device has been given. The host does not wait for it."""
    event_type = None if on.type == "cpu" else getattr(_module(on), "Event", None)
    if event_type is None:
        return time.perf_counter()
    event = event_type(enable_timing=True)
    event.record()
    return event


def seconds_between(start, end) -> float:
    """The device's time between two marks, both of which it has passed: synchronize before, or read one of its values."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def peak_flops(on: torch.device, dtype: torch.dtype) -> tuple[float, bool]:
    """(FLOP/s of matrix products in `dtype` at most, whether that was measured), for one device.

    From device_peaks, or for a CPU and for what is not listed there measured in less than a second, once.
    """
    stated = device_peaks.stated_tflops(describe(on), _unit(on, dtype))
    return (stated * 1e12, False) if stated is not None else (_measure_flops(on, dtype), True)


def _unit(on: torch.device, dtype: torch.dtype) -> str:
    """By which of device_peaks' units the device multiplies matrices of this type."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if on.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"


@functools.cache
def _measure_flops(on: torch.device, dtype: torch.dtype) -> float:
    best, size, seconds = 0.0, 256, 0.0
    while seconds < 0.01 and size <= 8192:  # float32 products of 256 take less on any machine
        matrix = torch.ones(size, size, dtype=dtype, device=on)
        seconds = _least_seconds(matrix, 4)
        for pause in (0.02, 0.1, 0.2):
            as_fast_as_before = 2 * size**3 / seconds >= 0.8 * best > 0
            if seconds < 0.01 or as_fast_as_before or dtype != torch.float32:
                break
            time.sleep(pause)  # the cores may have been busy just then
            seconds = min(seconds, _least_seconds(matrix, 2))
        best = max(best, 2 * size**3 / seconds)
        size *= 2
    return best


def _least_seconds(matrix: torch.Tensor, repeats: int) -> float:
    """Of a product with itself. Busy cores only ever slow it down, so the least of many is the true time."""
    times = []
    for _ in range(repeats):
        synchronize(matrix.device)
        start = time.perf_counter()
        matrix @ matrix
        synchronize(matrix.device)
        times.append(time.perf_counter() - start)
    return min(times)


def memory(on: torch.device) -> dict[str, int]:
    """Bytes: `peak`, what tensors took at most since the start or reset_peak_memory; `free` and `total` of the device.

    On a CPU `peak` is the most that the process has had resident, which no reset lowers.
    """
    if on.type == "cpu":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return {"peak": peak_memory(on), "free": _available_bytes(default=total), "total": total}
    free, total = _module(on).mem_get_info(on)
    return {"peak": peak_memory(on), "free": free, "total": total}


def peak_memory(on: torch.device) -> int:
    """`peak` of memory() alone, which asks the device nothing."""
    return _peak_resident_bytes() if on.type == "cpu" else _module(on).max_memory_allocated(on)


def _peak_resident_bytes() -> int:
    """What the process has had resident at most."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource  # not on Windows; on Linux its figure is at least that of the process which started this one

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _available_bytes(default: int) -> int:
    """What the host could still give to a process, caches that it would drop included."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return default


def reset_peak_memory(on: torch.device) -> None:
    """From here on `peak` is counted anew. Nothing on a CPU."""
    if on.type != "cpu":
        _module(on).reset_peak_memory_stats(on)


def empty_cache(on: torch.device) -> None:
    """Gives the device's unused memory back, for other processes. Nothing on a CPU."""
    if on.type != "cpu":
        _module(on).empty_cache()


def profiler(on: torch.device, folder: Path):
    """A profiler to start and stop: torch_npu's, which writes its files to `folder`, or else PyTorch's own."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on.type == "npu":
        try:
            from torch_npu import profiler as npu
        except ImportError:  # PyTorch's sees the host's side
            return torch.profiler.profile(activities=activities)
        return npu.profile(
            activities=[npu.ProfilerActivity.CPU, npu.ProfilerActivity.NPU],
            on_trace_ready=npu.tensorboard_trace_handler(str(folder)),
            # Level 1 is the least that counts operators.
            experimental_config=npu._ExperimentalConfig(profiler_level=npu.ProfilerLevel.Level1),
        )
    if on.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def describe(on: torch.device) -> str:
    """The device's own name: "Ascend910B3", "NVIDIA H100 80GB HBM3", "CPU"."""
    return "CPU" if on.type == "cpu" else _module(on).get_device_name(on)


def count() -> int:
    """The number of devices that this process may use; 1 for a CPU."""
    kind = accelerator()
    return 1 if kind is None else _module(torch.device(kind)).device_count()


def _module(on: torch.device):
    """torch.npu, torch.cuda or another module of that form."""
    return torch.get_device_module(on)


def demo_flags() -> str:
    """The precision flags that suit this machine: O2 in float16, unless its CPU lacks units for that."""
    on = torch.device(accelerator() or "cpu")
    if on.type == "cpu" and not _lists_float16_units():
        return ""
    return "" if half_slowdown(on, torch.float16) > 3 else "--fp16 --fp16_opt_level O2"


def _lists_float16_units() -> bool:
    """Whether the processor lists units for float16. Without them a measurement could only be wrong, on busy cores."""
    try:
        with open("/proc/cpuinfo") as file:
            listed = set(file.read().split())
    except OSError:
        return True
    return bool(listed & {"avx512_fp16", "amx_fp16", "asimdhp"})


if __name__ == "__main__":
    print(demo_flags())
