"""The support table of docs/support.md: who computes what, where, as the backends themselves say.

`python tools/support_table.py` rewrites the table between the markers; `--check` only says whether it is up to date.
"""

import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flash_attn.backends import choose_backend, choose_backward_backend, hopper  # noqa: E402 - of this checkout
from flash_attn.errors import UnsupportedProblem  # noqa: E402
from flash_attn.hardware import CPU, Hardware  # noqa: E402
from flash_attn.problem import AttentionProblem  # noqa: E402

DOCUMENT = ROOT / "docs" / "support.md"
BEGIN = "<!-- begin generated: python tools/support_table.py -->"
END = "<!-- end generated -->"

HARDWARE = {
    "Hopper (sm_90)": Hardware("cuda", "sm_90", 132, 232448),
    "other NVIDIA": Hardware("cuda", "sm_80", 108, 166912),
    "AMD": Hardware("hip", "gfx942", 304, 65536),
    "CPU": CPU,
}
LARGE = AttentionProblem("dense", "bfloat16", 4, 4096, 4096, 16, 16, 128, aligned=True)
BACKWARD = {"dense", "varlen"}  # layouts that have gradients
ROWS: dict[str, AttentionProblem] = {
    "dense, fp16 or bf16": LARGE,
    "small: less than 2^31 queries x keys x heads x head dim": LARGE._replace(batch_size=1, seqlen_q=128, seqlen_k=128),
    "packed (`varlen`)": LARGE._replace(layout="varlen"),
    "causal, window": LARGE._replace(window=(1000, 0)),
    "grouped heads": LARGE._replace(nheads_k=2),
    "ALiBi, softcap": LARGE._replace(alibi=True, softcap=True),
    "sinks (`s_aux`)": LARGE._replace(sinks=True),
    "dropout": LARGE._replace(dropout=True),
    "gradient through `softmax_lse`": LARGE._replace(lse_gradient=True),
    "`deterministic=True`": LARGE._replace(deterministic=True),
    "fp32": LARGE._replace(dtype="float32"),
    "fp64": LARGE._replace(dtype="float64"),
    "head dim 256": LARGE._replace(headdim=256),
    "head dim 59, or rows not 16 bytes apart": LARGE._replace(headdim=59, aligned=False),
    "`block_table` of `flash_attn_varlen_func`": LARGE._replace(layout="paged", page_size=256),
    "`flash_attn_with_kvcache`, a token": LARGE._replace(layout="cache", seqlen_q=1),
    "`flash_attn_with_kvcache`, a token, pages": LARGE._replace(layout="paged_cache", seqlen_q=1, page_size=16),
    "`flash_attn_with_kvcache`, a prompt": LARGE._replace(layout="cache"),
    "`flash_attn_with_kvcache`, a prompt, pages of a multiple of 16": LARGE._replace(
        layout="paged_cache", page_size=16
    ),
    "`flash_attn_with_kvcache`, a prompt, other pages": LARGE._replace(layout="paged_cache", page_size=8),
}


def cell(problem: AttentionProblem, hardware: Hardware) -> str:
    """Who computes the forward, and the gradients where that is another."""
    backward_alone = problem.lse_gradient or problem.deterministic
    try:
        forward = choose_backend(problem._replace(lse_gradient=False), hardware, None).name
        if problem.layout not in BACKWARD:
            return f"`{forward}`, forward"
        backward = choose_backward_backend(problem, hardware, None).name
    except UnsupportedProblem:
        return "no"
    if backward_alone or forward == backward:
        return f"`{backward}`"
    return f"`{forward}`, gradients `{backward}`"


def table() -> str:
    """Markdown; a Gluon that the Hopper kernels know is taken for granted."""
    with mock.patch.object(hopper, "_release", lambda: hopper.GLUON_RELEASES[0]):
        rows = [[name, *(cell(problem, hardware) for hardware in HARDWARE.values())] for name, problem in ROWS.items()]
    lines = [["", *HARDWARE], ["---"] * (1 + len(HARDWARE)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def updated(text: str) -> str:
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> int:
    text = DOCUMENT.read_text()
    if "--check" in sys.argv[1:]:
        return int(updated(text) != text)
    DOCUMENT.write_text(updated(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
