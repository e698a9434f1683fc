"""The documents tell the truth: their Python runs, their links and file names exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))) if path.exists()]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#:]+)(?:#[^)]*)?\)")
SOURCE_FILE = re.compile(r"`((?:flash_attn|flash_attn_2_cuda|benchmarks|tests|docs|tools|examples)/[\w./-]+\.\w+)`")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
TRANSLATIONS = {
    path: ROOT / ("" if path.name == "README.md" else "docs") / path.name for path in (ROOT / "docs/zh").glob("*.md")
}
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_blocks(path: Path) -> list[str]:
    """Every block fenced as python, padded so that line numbers in a traceback are those of the document."""
    text = path.read_text()
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in PYTHON_BLOCK.finditer(text)]


WITH_CODE = [path for path in DOCUMENTS if python_blocks(path)]


@pytest.mark.parametrize("path", WITH_CODE, ids=relative)
def test_python_blocks_run_on_the_cpu(path, monkeypatch):
    """The blocks of a document run in order and share their names, as a reader would type them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names = {"__name__": "__main__"}
    for block in python_blocks(path):
        if "import transformers" in block:
            pytest.importorskip("transformers", minversion="5", reason="needs transformers 5 or newer")
        exec(compile(block, str(path), "exec"), names)  # noqa: S102 - the documents are ours


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(path):
    missing = [link for link in LINK.findall(CODE.sub("", path.read_text())) if not (path.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_named_source_files_exist(path):
    missing = [name for name in SOURCE_FILE.findall(path.read_text()) if not (ROOT / name).exists()]
    assert not missing


def test_the_translations_are_those_asked_for():
    names = {"README.md", "flash_attention_backward_algorithm.md", "flaggems_backward_analysis.md"}
    assert {path.name for path in TRANSLATIONS} == names


@pytest.mark.parametrize("path", TRANSLATIONS, ids=relative)
def test_translations_have_the_code_the_numbers_and_the_sections_of_their_originals(path):
    """Fenced blocks word for word; as many headings and table rows; the same line references."""
    original, translation = TRANSLATIONS[path].read_text(), path.read_text()
    assert FENCED.findall(translation) == FENCED.findall(original)
    prose, translated = (FENCED.sub("", text) for text in (original, translation))
    for line in (r"^#+ ", r"^\|"):
        assert len(re.findall(line, translated, re.MULTILINE)) == len(re.findall(line, prose, re.MULTILINE))
    for quoted in (r"`[\w./]+\.py:\d+[-\d]*`", r"`:\d+[-\d]*`"):
        assert sorted(re.findall(quoted, translated)) == sorted(re.findall(quoted, prose))


def test_the_support_table_is_up_to_date():
    pytest.importorskip("triton", reason="the backends for GPUs refuse everything without it")
    command = [sys.executable, str(ROOT / "tools" / "support_table.py"), "--check"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0, "run python tools/support_table.py"
