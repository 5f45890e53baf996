"""The rules of the house that a machine can check: who imports whom, no dead options, nothing heavy at start."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Room -> the other rooms that it may import. Nobody imports tools.
MAY_IMPORT = {
    "runtime": set(),
    "imaging": set(),
    "configs": set(),
    "quickset": set(),
    "curation": {"runtime", "imaging"},
    "pretrain": {"runtime", "imaging"},
    "distill": {"pretrain", "runtime"},
    "evaluation": {"pretrain", "runtime", "imaging"},
    "tools": {"curation", "pretrain", "distill", "evaluation", "runtime", "imaging"},
}
# Inside pretrain: part -> the files and parts of pretrain that it may import.
PARTS = {"model": {"model"}, "loss": {"loss"}, "data": {"data"}}


@cache
def sources() -> dict[Path, ast.Module]:
    """Every Python file of the rooms, by path below the root."""
    files = [path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))]
    assert len(files) > 30
    return {path.relative_to(ROOT): ast.parse(path.read_text()) for path in files}


def imports(path: Path, tree: ast.Module) -> set[tuple[str, bool]]:
    """(full module name, whether written relative) of everything that a file imports, within functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, False) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            found |= {(f"{module}.{alias.name}", node.level > 0) for alias in node.names}
    return found


def test_rooms_import_only_whom_they_may():
    wrong = []
    for path, tree in sources().items():
        room = path.parts[0]
        for module, relative in imports(path, tree):
            target = module.split(".")[0]
            if relative and target != room:
                wrong.append(f"{path}: relative import leaves the room: {module}")
            elif not relative and target == room:
                wrong.append(f"{path}: absolute import inside its room: {module}")
            elif target in MAY_IMPORT and target != room and target not in MAY_IMPORT[room]:
                wrong.append(f"{path}: {room} may not import {module}")
    assert wrong == []


def test_model_loss_and_data_know_nothing_of_the_rest_of_pretrain():
    wrong = [
        f"{path}: {module}"
        for path, tree in sources().items()
        if path.parts[0] == "pretrain" and path.parts[1] in PARTS
        for module, _ in imports(path, tree)
        if module.startswith("pretrain.") and module.split(".")[1] not in PARTS[path.parts[1]]
    ]
    assert wrong == []


def test_no_wildcard_imports():
    assert [
        str(path) for path, tree in sources().items() for module, _ in imports(path, tree) if module[-1] == "*"
    ] == []


def test_no_package_below_tests():
    """One __init__.py below tests makes its folder shadow the room of the same name."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def config_fields() -> list:
    """(room, class, field) of every dataclass called ...Config."""
    return [
        pytest.param(path.parts[0], item.target.id, id=f"{path.parts[0]}.{node.name}.{item.target.id}")
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    ]


@cache
def attributes_read(room: str) -> set[str]:
    """Names read as attributes in a room, and in the rooms that may import it."""
    users = {room} | {other for other, allowed in MAY_IMPORT.items() if room in allowed}
    return {
        node.attr
        for path, tree in sources().items()
        if path.parts[0] in users
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


@pytest.mark.parametrize(("room", "field"), config_fields())
def test_every_option_is_read(room, field):
    assert field in attributes_read(room), f"nothing reads this option of {room}"


def test_no_path_of_a_developers_machine():
    """In any text file under version control: home folders, temporary folders and the like."""
    pattern = re.compile(r"(?<![\w.$~}/])/(?:work|root|tmp|home/\w+|Users/\w+)/")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    wrong = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".yaml", ".toml", ".html", ".css", ".csv", ".json", ".sh", ""}
            and path.is_file()
        ):
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                if pattern.search(line) and path != Path(__file__):
                    wrong.append(f"{name}:{number}: {line.strip()[:80]}")
    assert wrong == []


@pytest.mark.parametrize("module", ["tools.cli", "runtime.config", "runtime.files", "runtime.environment"])
def test_starting_imports_nothing_heavy(module):
    program = f"import {module}, sys; print(*sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "torchvision", "timm", "faiss", "numpy", "pyarrow", "pydantic", "matplotlib", "PIL", "submitit"}
    assert heavy & set(found.stdout.split()) == set()
