"""One training run or one memory curve in a process of its own, so that its peak memory is its own. JSON on stdout.

Run by train_gpt.py: `measure.py train flash 45` or `measure.py memory plain`.
"""

import json
import resource
import sys
import warnings

import torch

import gpt
from progress import Progress

CURVES = {  # sequence lengths to try: plain attention holds several (heads, length, length) tensors
    ("cpu", "flash"): (512, 1024, 2048, 4096, 8192),
    ("cpu", "plain"): (512, 1024, 2048, 4096),
    ("cuda", "flash"): (1024, 2048, 4096, 8192, 16384, 32768),
    ("cuda", "plain"): (1024, 2048, 4096, 8192, 16384),
}
PROMPT = "def read_"


def main() -> None:
    """Prints one JSON object; progress goes to stderr."""
    warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")  # the backward's thread is new to the GPU
    task, name, *seconds = sys.argv[1:]
    setting = gpt.setting_for(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(json.dumps(train(name, setting, *map(float, seconds)) if task == "train" else memory_curve(name, setting)))


def train(name: str, setting: gpt.Setting, seconds: float) -> dict:
    """Losses, speed and peak memory of training with one attention, and text from the trained model."""
    warm_up(name, setting)
    before = start_peak(setting.device)
    with Progress(f"{name:5s} attention", setting.steps) as progress:
        result = gpt.train(gpt.ATTENTIONS[name], setting, seconds, progress)
    report = {
        "device": describe_device(setting),
        "losses": result.losses,
        "tokens_per_second": result.tokens_per_second,
        "peak_bytes": peak(setting.device) - before,
    }
    if name == "flash":
        report["text"] = gpt.sample(result.model, gpt.ATTENTIONS[name], setting, PROMPT, length=320)
    return report


def memory_curve(name: str, setting: gpt.Setting) -> list[tuple[int, int]]:
    """(sequence length, peak bytes) of one forward and backward, inputs and gradients included.

    The lengths grow, since the peak of a process never falls.
    """
    warm_up(name, setting)
    before = start_peak(setting.device)
    curve: list[tuple[int, int]] = []
    for length in CURVES[setting.device.type, name]:
        try:
            attend_once(name, setting, length)
        except torch.OutOfMemoryError:
            break
        curve.append((length, peak(setting.device) - before))
    return curve


def warm_up(name: str, setting: gpt.Setting) -> None:
    """Loads and compiles what a first call loads and compiles, which is no attention's memory."""
    attend_once(name, setting, 128)


def attend_once(name: str, setting: gpt.Setting, length: int) -> None:
    """Forward and backward over one document."""
    batch = gpt.pack([[0] * (length + 1)], setting.device)
    shape = (length, setting.heads, setting.headdim)
    q, k, v = (torch.randn(shape, device=setting.device, dtype=setting.dtype, requires_grad=True) for _ in range(3))
    out = gpt.ATTENTIONS[name](q, k, v, batch)
    out.backward(torch.ones_like(out))


def start_peak(device: torch.device) -> int:
    """Bytes in use now; `peak` is counted from here."""
    if device.type != "cuda":
        return peak(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak(device: torch.device) -> int:
    """The most bytes in use so far: of the GPU's allocator, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_device(setting: gpt.Setting) -> str:
    """The machine, the type of numbers and the size of the model."""
    if setting.device.type == "cuda":
        machine = torch.cuda.get_device_name(setting.device)
    else:
        machine = f"CPU, {torch.get_num_threads()} threads"
    parameters = sum(p.numel() for p in gpt.GPT(setting).parameters())
    dtype = str(setting.dtype).removeprefix("torch.")
    return f"{machine}; {dtype}; {parameters / 1e6:.1f} M parameters; {setting.tokens_per_batch} tokens a step"


if __name__ == "__main__":
    main()
