"""Rules of the tree that no linter knows, checked by reading the source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "src" / "outlast"
MODULES = sorted(path for room in (LIBRARY, ROOT / "launcher", ROOT / "jobs") for path in room.rglob("*.py"))
MOST_LINES, MOST_WORDS = 400, 20
SLURM_NAMES = re.compile(r"\b(SLURM|SLURMD|SBATCH|SQUEUE|SRUN|SACCT|SCANCEL)_")
SLURM_COMMANDS = re.compile(r"(sbatch|srun|squeue|scontrol|scancel|sacct|sacctmgr|sinfo)( -.*)?", re.DOTALL)
CHOICE = "srun"
"""A value of `parallel.launch`: what the user chooses, not a command that is run."""

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def at(path: Path, line: int, what: str) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {what}"


def strings(tree: ast.Module) -> Iterator[ast.Constant]:
    """All strings but those that stand alone, which are docstrings."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of the docstrings of all public names: modules, classes, functions, constants and fields."""

    def visit(owner: Documented) -> Iterator[tuple[int, str]]:
        previous: ast.stmt | None = None
        for node in owner.body:
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                if previous is None or is_public(previous):
                    yield node.lineno, node.value.value
            elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and is_public(node):
                yield from visit(node)
            previous = node

    return visit(tree)


def is_public(node: ast.stmt) -> bool:
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return not name.startswith("_") or name == "__call__"
        case ast.Assign(targets=[target]) | ast.AnnAssign(target=target):
            return not ast.unparse(target).rpartition(".")[2].startswith("_")
    return False


def test_slurm_is_known_in_one_room() -> None:
    found = []
    for path in LIBRARY.rglob("*.py"):
        if path.is_relative_to(LIBRARY / "slurm"):
            continue
        for node in strings(ast.parse(path.read_text())):
            command = SLURM_COMMANDS.fullmatch(str(node.value)) and node.value != CHOICE
            if SLURM_NAMES.search(str(node.value)) or command:
                found.append(at(path, node.lineno, repr(node.value)))
    assert not found, "\n".join(found)


def test_a_room_says_what_it_is_and_imports_nothing() -> None:
    found = []
    for path in MODULES:
        if path.name == "__init__.py" and path.parent != LIBRARY:
            body = ast.parse(path.read_text()).body
            if len(body) != 1 or not isinstance(body[0], ast.Expr):
                found.append(at(path, 1, "wanted: one docstring and nothing else"))
    assert not found, "\n".join(found)


def test_one_function_deletes() -> None:
    names = {"rmtree", "unlink", "rmdir", "removedirs"}
    found = []
    for path in MODULES:
        if path == LIBRARY / "deletion.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            named = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            of_os = isinstance(node, ast.Attribute) and ast.unparse(node) == "os.remove"
            if of_os or named & names or (isinstance(node, ast.Attribute) and node.attr in names):
                found.append(at(path, node.lineno, f"{ast.unparse(node)}: outlast.deletion.delete follows no link"))
    assert not found, "\n".join(found)


def test_nothing_from_the_network_is_unpickled() -> None:
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", "")
            if re.search("_object(_list)?$", name) and re.search("gather|broadcast|scatter|send|recv", name):
                found.append(at(path, node.lineno, f"{name}: torch pickles what it sends so"))
    assert not found, "\n".join(found)


def test_no_module_is_too_long() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in MODULES}
    found = [at(path, lines, f"{lines} lines") for path, lines in lengths.items() if lines > MOST_LINES]
    assert not found, "\n".join(found)


def test_what_happens_on_sigusr1_is_read_in_four_short_modules() -> None:
    story = ast.get_docstring(ast.parse((LIBRARY / "preemption" / "__init__.py").read_text())) or ""
    modules = [LIBRARY / ("" if "/" in name else "preemption") / f"{name}.py" for name in re.findall("`(.+?)`", story)]
    assert len(modules) == 4
    assert sum(len(path.read_text().splitlines()) for path in modules) <= 650


def test_docstrings_begin_with_a_short_sentence() -> None:
    found = []
    for path in sorted(LIBRARY.rglob("*.py")):
        for line, text in docstrings(ast.parse(path.read_text())):
            first = re.split(r"(?<=[.!?])\s|\n\s*\n", text.strip())[0]
            words = len(first.split())
            if words > MOST_WORDS:
                found.append(at(path, line, f"{words} words: {' '.join(first.split())}"))
    assert not found, "\n".join(found)
