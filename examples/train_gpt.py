"""Trains one small GPT twice from the same seed, with flash_attn_varlen_func and with plain attention, and compares.

The text is Python's standard library, documents packed end to end without padding. Prints the loss curves' largest
difference, tokens/s and peak memory of both, saves demo/train_gpt.png, and lets the trained model write.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PLOT = HERE.parent / "demo" / "train_gpt.png"
SECONDS = 35  # for each attention; a slow machine takes fewer steps
LABELS = {
    "flash": "flash_attn_varlen_func, all documents in one call",
    "plain": "plain PyTorch, softmax(QK^T)V document by document",
}


def main() -> None:
    """The whole demonstration."""
    flash, plain = (measure("train", name, str(SECONDS)) for name in LABELS)
    curves = {name: measure("memory", name) for name in LABELS}
    common = min(len(flash["losses"]), len(plain["losses"]))
    print(f"\n{flash['device']}")
    for name, result in (("flash", flash), ("plain", plain)):
        losses, speed, size = result["losses"], result["tokens_per_second"], result["peak_bytes"] / 2**20
        print(
            f"  {LABELS[name]:52s} {len(losses):4d} steps, loss after {common} {losses[common - 1]:.3f},"
            f" {speed:,.0f} tokens/s, peak memory {size:,.0f} MiB"
        )
    print_agreement(flash["losses"], plain["losses"])
    print_memory(curves)
    save_plot(flash, plain, curves)
    print(f"\nThe model trained with flash_attn writes:\n\n{flash['text']}")


def measure(*arguments: str) -> dict:
    """The report of measure.py from a process of its own. This one imports no torch: a child's peak begins at ours."""
    command = [sys.executable, str(HERE / "measure.py"), *arguments]
    # Threads that wait by spinning would stall this on a machine whose cores have other work too.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def print_agreement(flash: list[float], plain: list[float]) -> None:
    """How far apart the loss curves are, over the steps that both took."""
    differences = [abs(a - b) for a, b in zip(flash, plain, strict=False)]
    largest = max(range(len(differences)), key=differences.__getitem__)
    print(
        f"Loss curves: largest difference {differences[largest]:.1e}, at step {largest + 1} of {len(differences)}"
        f" (loss there {flash[largest]:.3f}); first step {differences[0]:.1e}"
    )


def print_memory(curves: dict) -> None:
    """Peak memory against sequence length, side by side."""
    plain = dict(curves["plain"])
    print("Peak memory of one attention, forward and backward:")
    for length, flash_bytes in curves["flash"]:
        beside = f"{plain[length] / 2**20:8,.0f} MiB" if length in plain else "not tried"
        print(f"  {length:6d} tokens: flash {flash_bytes / 2**20:8,.0f} MiB, plain {beside}")


def save_plot(flash: dict, plain: dict, curves: dict) -> None:
    """Loss curves on the left, memory on the right."""
    try:
        import matplotlib
    except ImportError:
        print("No plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name, result, style in (("flash", flash, "-"), ("plain", plain, "--")):
        loss_axes.plot(result["losses"], style, label=LABELS[name], linewidth=1.5)
        lengths, sizes = zip(*curves[name], strict=True)
        memory_axes.plot(lengths, [size / 2**20 for size in sizes], style + "o", label=LABELS[name])
    loss_axes.set(xlabel="step", ylabel="loss (nats per character)", title="Same seed, same batches")
    memory_axes.set(xlabel="sequence length", ylabel="peak memory (MiB)", title="One attention, forward and backward")
    memory_axes.set_xscale("log", base=2)
    memory_axes.set_yscale("log", base=2)
    for axes in (loss_axes, memory_axes):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(flash["device"], fontsize=9)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=130)
    print(f"Plot: {PLOT.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
