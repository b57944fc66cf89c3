"""The house rules: imports run downwards, each folder is reached as lasp.<folder>, and files stay readable."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "parallel", "integrations", "launch")
#: What the files of a folder may import of the library; lasp/ itself is what stands in none of the folders.
ALLOWED = {
    "kernels": {"kernels"},
    "parallel": {"kernels", "parallel"},
    "lasp": {"kernels", "parallel", "lasp"},
    "integrations": {"kernels", "parallel", "lasp", "integrations"},
    "launch": {"kernels", "parallel", "lasp", "integrations", "launch"},
}


def imports(file: Path) -> set[str]:
    """The modules that a file imports, in full."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(folder: str) -> list[Path]:
    # rglob does not follow the links inside lasp/, so each file is seen in one folder.
    return [f for f in sorted((ROOT / folder).rglob("*.py")) if not any(p.is_symlink() for p in f.parents)]


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_run_downwards(folder: str) -> None:
    assert files(folder)
    for file in files(folder):
        for module in imports(file):
            top, *rest = module.split(".")
            assert top not in FOLDERS, f"{file.relative_to(ROOT)} imports {module} by its bare name"
            if top == "lasp":
                owner = rest[0] if rest and rest[0] in FOLDERS else "lasp"
                assert owner in ALLOWED[folder] or module == "lasp", f"{file.relative_to(ROOT)} imports {module}"


def test_kernels_know_nothing_of_ranks() -> None:
    for file in files("kernels"):
        assert not {m for m in imports(file) if m.startswith("torch.distributed")}, file
        assert "distributed" not in file.read_text(), file


def test_the_links_make_one_package() -> None:
    for folder in FOLDERS:
        link = ROOT / "lasp" / folder
        assert link.is_symlink()
        assert link.readlink() == Path("..") / folder
        assert (ROOT / folder / "__init__.py").exists()


def test_files_stay_readable() -> None:
    for file in [f for folder in ALLOWED for f in files(folder)] + [ROOT / "pretrain.py"]:
        length = len(file.read_text().splitlines())
        assert length <= 500, f"{file.relative_to(ROOT)} has {length} lines: redraw it"


def test_importing_the_library_is_quiet_and_touches_no_device() -> None:
    code = "import lasp, lasp.ops, torch, sys; assert not torch.cuda.is_initialized(); print('triton' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
