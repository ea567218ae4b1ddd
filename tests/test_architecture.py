"""The shape of the code: who imports whom, nothing twice, every file introduced."""

from __future__ import annotations

import ast
import hashlib
import re
from functools import lru_cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("core", "data", "evaluation", "tokenizer", "generator")
ALLOWED = {"core": {"core"}, **{name: {"core", name} for name in PACKAGES[1:]}}
ALLOWED["evaluation"] |= {"data"}
ALLOWED["run"] = {*PACKAGES, "run"}
OPTIONAL = {
    "wandb",
    "tensorboard",
    "datasets",
    "webdataset",
    "transformers",
    "huggingface_hub",
    "accelerate",
    "trackio",
}
LONGEST_FILE = 700
SHORTEST_COPY = 6  # lines: shorter bodies may well be equal by chance

FILES = sorted(p for name in (*PACKAGES, "run", "scripts", "tests") for p in (ROOT / name).rglob("*.py"))
SOURCES = [p for p in FILES if p.relative_to(ROOT).parts[0] in ALLOWED]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@lru_cache(None)
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(node: ast.AST) -> list[tuple[str, int]]:
    """(top-level package, line) of every import below `node`."""
    found = []
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found += [(alias.name.split(".")[0], child.lineno) for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            found.append((child.module.split(".")[0] if child.module and not child.level else ".", child.lineno))
        elif isinstance(child, ast.Call) and ast.unparse(child.func) in ("importlib.import_module", "__import__"):
            name = child.args[0].value if child.args and isinstance(child.args[0], ast.Constant) else "."
            found.append((name.split(".")[0], child.lineno))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_packages_do_not_know_each_other(path):
    package = path.relative_to(ROOT).parts[0]
    ours = {*PACKAGES, "run", "scripts", "tests", "."}
    wrong = [
        f"line {line}: {name}" for name, line in imports(tree(path)) if name in ours and name not in ALLOWED[package]
    ]
    assert not wrong, f"{name_of(path)} imports what {package} must not see: {wrong}"


def test_registries_stay_at_home():
    """What a package registers lives in it."""
    from run.load import REGISTRIES

    for registry in REGISTRIES.values():
        for entry in registry.entries.values():
            assert entry.split(".")[0].split(":")[0] in PACKAGES, entry


def module_level(module: ast.Module) -> ast.Module:
    """Without the bodies of functions: what runs on import."""

    def visit(nodes: list[ast.stmt]) -> list[ast.stmt]:
        kept = []
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            if isinstance(node, ast.ClassDef):
                kept += visit(node.body)
            else:
                kept.append(node)
        return kept

    return ast.Module(visit(module.body), [])


@pytest.mark.parametrize("path", [p for p in FILES if "tests" not in p.relative_to(ROOT).parts], ids=name_of)
def test_optional_libraries_are_imported_late(path):
    eager = [f"line {line}: {name}" for name, line in imports(module_level(tree(path))) if name in OPTIONAL]
    assert not eager, f"{name_of(path)}: {eager}"


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "core")], ids=name_of)
def test_core_knows_no_system(path):
    """No branch on what is being trained: names of tokenizers, generators and the like stay in their registries."""
    from run.load import REGISTRIES

    systems = {name for registry in REGISTRIES.values() for name in registry.entries} - {""}
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.Compare, ast.Match)):
            words = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
            assert not words & systems, f"{name_of(path)} line {getattr(node, 'lineno', '?')}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_introduced_and_short(path):
    text = path.read_text(encoding="utf-8")
    if text.strip():
        assert ast.get_docstring(tree(path)), f"{name_of(path)} does not say what it is"
    lines = text.splitlines()
    assert len(lines) <= LONGEST_FILE, f"{name_of(path)} has {len(lines)} lines"


def test_no_body_is_written_twice():
    """Functions and methods with equal bodies, names and docstrings aside."""
    seen: dict[str, str] = {}
    copies = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if not body or body[-1].end_lineno - body[0].lineno + 1 <= SHORTEST_COPY:
                continue
            text = "\n".join(ast.dump(statement) for statement in body)
            digest = hashlib.sha256(text.encode()).hexdigest()
            here = f"{name_of(path)}:{node.lineno} {node.name}"
            if digest in seen:
                copies.append(f"{seen[digest]} = {here}")
            seen[digest] = here
    assert not copies, "\n".join(copies)


def test_no_paths_of_one_machine():
    for path in [*FILES, *(ROOT / "configs").rglob("*.yaml"), *ROOT.glob("*.sh"), *(ROOT / "scripts").glob("*.sh")]:
        if path == Path(__file__).resolve():
            continue
        text = path.read_text(encoding="utf-8")
        for place in (f"/{name}/" for name in ("home", "root", "work", "opt")):
            assert place not in text, f"{name_of(path)} contains {place}"


# ---------------------------------------------------------------------------------------------------------------------
# docs/architecture.md
# ---------------------------------------------------------------------------------------------------------------------
ROOMS = {"nn": "core/nn/", "train": "core/train/", "weights": "core/weights/"}
ROOMS |= {name: f"{name}/" for name in ("core", *ALLOWED, "scripts") if name not in ROOMS}


def room_of(module: str) -> str | None:
    place = module.replace(".", "/") + "/"
    return next((room for room, folder in ROOMS.items() if place.startswith(folder)), None)


def imported_modules(module: ast.Module) -> set[str]:
    """Dotted names of our modules that are imported anywhere in a file."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = ROOT.joinpath(*node.module.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                names.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return names


def reachable(arrows: set[tuple[str, str]], start: str) -> set[str]:
    seen, waiting = set(), [start]
    while waiting:
        for source, target in arrows:
            if source == waiting[0] and target not in seen:
                seen.add(target)
                waiting.append(target)
        waiting.pop(0)
    return seen


def test_the_picture_of_the_house_is_true():
    """Its solid arrows are the imports between rooms, those left out that follow from others; and none runs in a circle."""
    real = set()
    for path in FILES:
        here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if here is not None:
            real |= {
                (here, room_of(name)) for name in imported_modules(tree(path)) if room_of(name) not in (None, here)
            }
    assert not [room for room in ROOMS if room in reachable(real, room)], "rooms import each other in a circle"
    needed = {
        (a, b) for a, b in real if not any(b in reachable(real, middle) for source, middle in real if source == a)
    }
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = set(re.findall(r"^ +(\w+) --> (\w+)$", text, re.MULTILINE))
    assert drawn == needed, f"drawn but not needed: {drawn - needed}; not drawn: {needed - drawn}"
