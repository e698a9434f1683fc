"""Who may import whom, and how large a module, function or kernel may grow: read from the sources, nothing imported."""

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "flash_attn").rglob("*.py"), ROOT / "flash_attn_2_cuda.py"])


class Rule(NamedTuple):
    """What the modules below a name may import."""

    ours: tuple[str, ...]  # modules of flash_attn, each with everything below it; errors is open to all
    others: tuple[str, ...] = ("torch",)  # outside the standard library


# The first row that a module's name begins with is its rule.
RULES = {
    "flash_attn_2_cuda": Rule(("dispatch", "torch_ops", "problem", "problem_kvcache")),
    "bert_padding": Rule((), ("torch", "einops")),
    "errors": Rule((), ()),
    "hardware": Rule(()),
    "reference": Rule(()),
    "merge": Rule(()),
    "sinks": Rule(()),
    "backward.reference_impl": Rule(()),
    "tiling": Rule(()),
    "problem_kvcache": Rule(("problem", "tiling")),
    "problem": Rule(("tiling",)),
    "launch": Rule(("problem", "hardware", "launch"), ()),
    "kernels.algebra": Rule(("kernels.algebra",), ("triton",)),
    "kernels.portable": Rule(("kernels.algebra", "kernels.portable"), ("triton",)),
    "kernels.hopper": Rule(("kernels.algebra", "kernels.hopper"), ("triton",)),
    "kernels": Rule((), ()),
    "backends.base": Rule(("problem", "hardware")),
    "backends.launcher": Rule(("hardware",), ("torch", "triton")),
    "backends.tensor_maps": Rule((), ("torch", "triton")),
    "backends.fixed_arguments": Rule(("backends.base", "random_bits", "problem", "launch")),
    "backends.dropout_scores": Rule(
        (
            "backends.base",
            "backends.fixed_arguments",
            "backends.launcher",
            "problem",
            "launch",
            "kernels.algebra",
            "kernels.portable",
        ),
    ),
    "backends.portable": Rule(
        (
            "backends.base",
            "backends.dropout_scores",
            "backends.fixed_arguments",
            "backends.launcher",
            "backends.tensor_maps",
            "problem",
            "hardware",
            "launch",
            "backends.portable_cache",
            "kernels.algebra",
            "kernels.portable",
        ),
        ("torch", "triton"),
    ),
    "backends.portable_cache": Rule(
        (
            "backends.base",
            "backends.fixed_arguments",
            "backends.launcher",
            "backends.portable",
            "problem",
            "hardware",
            "launch",
            "kernels.algebra",
            "kernels.portable",
        ),
    ),
    "backends.cache_append": Rule(("backends.base",)),
    "backends.hopper_backward": Rule(
        (
            "backends.base",
            "backends.fixed_arguments",
            "backends.launcher",
            "backends.tensor_maps",
            "problem",
            "hardware",
            "launch",
            "kernels.algebra",
            "kernels.hopper",
        ),
        ("torch", "triton"),
    ),
    "backends.hopper": Rule(
        (
            "backends.base",
            "backends.dropout_scores",
            "backends.fixed_arguments",
            "backends.launcher",
            "backends.tensor_maps",
            "backends.hopper_backward",
            "backends.portable",
            "backends.portable_cache",
            "problem",
            "hardware",
            "launch",
            "kernels.algebra",
            "kernels.hopper",
        ),
        ("torch", "triton"),
    ),
    "random_bits": Rule(()),
    "backends.spans": Rule(("backends.base", "problem", "merge")),
    "backends.cpu": Rule(
        ("backends.base", "backends.cache_append", "backends.spans", "problem", "hardware", "random_bits")
    ),
    "backends.reference": Rule(
        (
            "backends.base",
            "backends.cache_append",
            "backends.spans",
            "problem",
            "hardware",
            "random_bits",
            "reference",
            "backward.reference_impl",
        )
    ),
    "backends.flaggems": Rule(("backends.base", "problem", "hardware"), ("torch", "flag_gems")),
    "flash_attn_flaggems_backend": Rule(("backends", "torch_ops")),
    "backends": Rule(("backends", "problem", "hardware")),
    "dispatch": Rule(("backends", "problem", "problem_kvcache", "hardware", "launch")),
    "torch_ops": Rule(("dispatch", "problem")),
    "backward.flaggems_backward": Rule(("backward.call", "backends", "dispatch")),
    "backward": Rule(("backward", "problem", "dispatch", "torch_ops", "sinks")),
    "kvcache.cache_manager": Rule(("kvcache", "problem", "problem_kvcache", "backward", "layers"), ("torch", "numpy")),
    "kvcache.page_table": Rule(("kvcache",), ("numpy",)),
    "kvcache.prefix": Rule(("kvcache",), ("numpy",)),
    "kvcache.allocator": Rule((), ("numpy",)),
    "kvcache.strategies": Rule(("kvcache",), ("numpy",)),
    "kvcache.hf_cache": Rule(("kvcache",), ("torch", "transformers")),
    "kvcache": Rule(("kvcache", "problem", "problem_kvcache", "dispatch", "torch_ops", "launch")),
    "distributed": Rule(("distributed", "problem", "backward", "torch_ops")),
    "layers": Rule(("layers", "ops", "backward", "backends")),
    "ops.triton.rotary": Rule(
        ("torch_ops", "dispatch", "backends", "hardware", "launch", "kernels.algebra", "kernels.portable"),
    ),
    "ops.triton.cross_entropy": Rule(("utils.distributed",)),
    "ops.triton.layer_norm": Rule(("ops.normalization",)),
    "ops.normalization": Rule(()),
    "ops.triton.mlp": Rule(("ops", "utils")),
    "ops.triton.linear": Rule(("ops",)),
    "ops.triton.k_activations": Rule(("ops.activations",)),
    "ops.activations": Rule(()),
    "ops.layer_norm": Rule(("ops",)),
    "ops.rms_norm": Rule(("ops",)),
    "ops.fused_dense": Rule(("ops", "utils.distributed")),
    "ops": Rule((), ()),
    "losses": Rule(("ops",)),
    "integrations.transformers": Rule(("flash_attn_interface", "bert_padding"), ("torch", "transformers")),
    "integrations": Rule((), ()),
    "modules": Rule(
        ("flash_attn_interface", "layers", "modules", "ops", "utils"),
        ("torch", "einops"),
    ),
    "models.config": Rule((), ("torch", "transformers")),
    "models.state_dict": Rule(("models.config",)),
    "models.llama": Rule(("models.config", "models.state_dict"), ("torch", "transformers", "sentencepiece")),
    "models": Rule(("bert_padding", "layers", "losses", "models", "modules", "ops", "utils")),
    "utils.pretrained": Rule((), ("torch", "transformers", "safetensors")),
    "utils.testing": Rule(("bert_padding", "reference")),
    "utils": Rule(("utils", "bert_padding"), ("torch", "einops")),
    "flash_attn_triton": Rule(()),
    "flash_attn_interface": Rule(("flash_attn_2_cuda", "problem", "backward", "torch_ops", "kvcache", "sinks")),
    "diagnostics": Rule(("",), ("torch", "triton", "einops")),
    "__main__": Rule(("",), ("torch", "triton", "einops")),
    "": Rule(("flash_attn_interface", "merge"), ()),
}
LAZY_ONLY = {
    "backends": ("backends.portable", "backends.hopper", "backends.cpu", "backends.flaggems", "backends.reference"),
    "backends.launcher": ("triton",),
    "backends.tensor_maps": ("triton",),
    "backends.dropout_scores": ("triton", "kernels"),
    "backends.portable": ("triton", "kernels", "backends.portable_cache"),
    "backends.portable_cache": ("triton", "kernels"),
    "backends.hopper": (
        "triton",
        "kernels",
        "backends.hopper_backward",
        "backends.portable",
        "backends.portable_cache",
    ),
    "backends.hopper_backward": ("triton", "kernels"),
    "ops.triton.rotary": ("triton", "kernels", "backends.portable"),
    "backends.flaggems": ("flag_gems",),
    "models.config": ("transformers",),
    "models.llama": ("transformers", "sentencepiece"),
    "utils.pretrained": ("transformers", "safetensors"),
    "integrations.transformers": ("transformers",),
}

MODULE_LINES, FUNCTION_LINES, KERNEL_LINES, ALGEBRA_LINES, PARAMETERS = 400, 60, 80, 20, 14
UPSTREAM_SIGNATURES = (
    "flash_attn_interface.",
    "flash_attn_flaggems_backend.",
    "torch_ops.",
    "flash_attn_2_cuda.",
    "backward.",
    "kvcache.",
    "layers.",
    "losses.",
    "models.",
    "modules.",
    "ops.",
    "utils.",
    "flash_attn_triton.",
    "integrations.",
)

# What may be larger: a name or pattern of names -> (how large, why).
EXCEPTIONS: dict[str, tuple[int, str]] = {
    "parameters of kernels.portable.*": (
        34,
        "Triton compiles once per value of an integer inside a tuple, so lengths stay arguments; so do tile sizes",
    ),
    "parameters of kernels.hopper.*": (
        35,
        "constexprs reach the partitions of a kernel only as arguments of their own, and so do all of its barriers",
    ),
    "lines of kernels.hopper.forward.attend_overlapped": (86, "one schedule, whose order is its meaning"),
    "lines of kernels.hopper.backward_*.accumulate*": (71, "one schedule, whose order is its meaning"),
    "lines of flash_attn_interface.flash_attn_varlen_func": (65, "one line an argument, with and without sinks"),
    "parameters of problem.describe": (20, "the arguments of all public functions, checked in one place"),
    "parameters of dispatch.*ward": (25, "the arguments of upstream's operators, dense and packed"),
    "lines of module flash_attn_interface": (530, "upstream's seven functions, each with its whole documentation"),
    "lines of kvcache.cache_manager.PagedKVCache.attend": (75, "one line an argument"),
}


class Import(NamedTuple):
    target: str  # "torch.nn", or without its first part when it is ours: "backends.base"
    ours: bool
    at_top: bool
    line: int


def module_name(path: Path) -> str:
    """Dotted name without the leading `flash_attn`: "" is the package itself."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts[1:] if parts[0] == "flash_attn" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports_of(name: str) -> Iterator[Import]:
    """Every import statement of a module, wherever it stands, except those for type checkers alone."""
    tree = ast.parse(MODULES[name].read_text())
    top = {id(node) for node in tree.body}
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for target in targets(node, name):
            first, _, rest = target.partition(".")
            ours = first in ("flash_attn", "flash_attn_2_cuda")
            yield Import(rest if first == "flash_attn" else target, ours, id(node) in top, node.lineno)


def targets(node: ast.Import | ast.ImportFrom, importer: str) -> list[str]:
    """The modules an import statement names; `from package import module` names the module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, f"{importer}: relative imports are not used here (line {node.lineno})"
    base = node.module or ""
    inside = base.removeprefix("flash_attn").lstrip(".")
    if base.split(".")[0] != "flash_attn":
        return [base]
    return [f"{base}.{alias.name}" if f"{inside}.{alias.name}".lstrip(".") in MODULES else base for alias in node.names]


def below(name: str, prefix: str) -> bool:
    """Whether a dotted name is the prefix or lies below it; everything lies below ""."""
    return prefix == "" or name == prefix or name.startswith(prefix + ".")


def rule_for(name: str) -> Rule:
    return next(rule for prefix, rule in RULES.items() if below(name, prefix) and (prefix or not name))


def is_standard(target: str) -> bool:
    return target.split(".")[0] in sys.stdlib_module_names


def complaint(name: str, found: Import, rule: Rule) -> str | None:
    where = f"flash_attn.{name}, line {found.line}: imports {found.target or 'flash_attn'}"
    if found.ours:
        allowed = (*rule.ours, "errors")
        if not any(below(found.target, prefix) for prefix in allowed):
            return f"{where}, may import {allowed} of ours"
    elif not is_standard(found.target) and found.target.split(".")[0] not in rule.others:
        return f"{where}, may import {rule.others} of others"
    if found.at_top and any(below(found.target, prefix) for prefix in LAZY_ONLY.get(name, ())):
        return f"{where} at its top; only inside a function"
    return None


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_only_what_its_layer_may(name):
    rule = rule_for(name)
    complaints = [text for found in imports_of(name) if (text := complaint(name, found, rule))]
    assert not complaints, "\n".join(complaints)


def test_sizes_stay_within_budget():
    over = [f"{name}: {size}, budget {budget}" for name, size, budget in measured() if size > allowed(name, budget)]
    assert not over, "\n".join(over)


@pytest.mark.parametrize("pattern", EXCEPTIONS)
def test_every_exception_is_still_needed(pattern):
    assert any(fnmatch(name, pattern) and size > budget for name, size, budget in measured())


def allowed(name: str, budget: int) -> int:
    return max([budget, *(larger for pattern, (larger, _) in EXCEPTIONS.items() if fnmatch(name, pattern))])


def measured() -> Iterator[tuple[str, int, int]]:
    """(what, its size, its budget) for each module and function."""
    for name, path in MODULES.items():
        text = path.read_text()
        yield f"lines of module {name}", len(text.splitlines()), MODULE_LINES
        yield from measured_functions(name, ast.parse(text), "")


def measured_functions(module: str, node: ast.AST, owner: str) -> Iterator[tuple[str, int, int]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from measured_functions(module, child, f"{owner}{child.name}.")
        elif isinstance(child, ast.FunctionDef):
            function = f"{module}.{owner}{child.name}"
            yield f"lines of {function}", code_lines(child), line_budget(module, child)
            if not function.startswith(UPSTREAM_SIGNATURES):
                yield f"parameters of {function}", parameters(child), PARAMETERS


def line_budget(module: str, function: ast.FunctionDef) -> int:
    if function.name.endswith("_kernel"):
        return KERNEL_LINES
    return ALGEBRA_LINES if below(module, "kernels.algebra") else FUNCTION_LINES


def code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function from its name on, without its docstring."""
    total = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        total -= (first.end_lineno or 0) - first.lineno + 1
    return total


def parameters(function: ast.FunctionDef) -> int:
    arguments = function.args
    return len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
