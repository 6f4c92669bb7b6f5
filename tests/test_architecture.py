"""The house rules, read from the source: who may import whom, how long things may be, how much may be said twice.

Each rule is a function from a tree to a list of complaints. Each is tested twice: the package has none, and a small
tree that breaks the rule is caught.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "tether"

# A room may import rooms of a lower rank and itself. Rooms of one rank do not know each other.
RANKS = {
    **dict.fromkeys(("types", "errors", "files", "redact", "progress"), 0),
    "compat": 1,
    **dict.fromkeys(("models", "data"), 2),
    "compute": 3,
    "scoring": 4,
    **dict.fromkeys(("reference", "objectives"), 5),
    **dict.fromkeys(("rollout", "rewards", "report"), 6),
    "training": 7,
    **dict.fromkeys(("evaluate", "plan", "trl"), 8),
    "config": 9,
    "cli": 10,
    "__main__": 11,
}
# Rooms that may import only what is named here and the standard library.
CLOSED = {"errors": set(), "types": {"jaxtyping", "torch"}, "objectives": {"jaxtyping", "torch", "tether.types"}}

# The one room that may touch private names of libraries.
PRIVATE_ROOM = "compat"
# Underscored and documented all the same.
DOCUMENTED = {"_asdict", "_fields", "_replace", "_exit"}  # of named tuples; `os._exit`

# Where a package is imported by another name than it is installed by; pydantic pins its core.
DISTRIBUTIONS = {"lingua": "lingua_language_detector", "yaml": "pyyaml", "pydantic_core": "pydantic"}

# A page on a new objective is held to the contract of all; a script writes the golden numbers of cases that tests have.
TESTS_THAT_ARE_READ = {
    "objectives/test_docs.py": {"test_contract.py"},
    "parity/make_golden.py": {"test_grpo.py", "test_objectives.py", "test_trl.py"},
}

FUNCTION_LINES = 60
CLASS_LINES = 400
FILE_LINES = 400
ROOM_FILES = 12
REPEATED_WINDOW = 6
REPEATED_SHARE = 0.02
FILE_BYTES = 2**20

# Written in two parts, so that this file does not contain what it looks for.
ADDRESSES = re.compile(
    "|".join(
        re.escape(first + second)
        for first, second in (
            ("pypi", ".org"),
            ("python", "hosted"),
            ("registry.npm", "js"),
            ("download.py", "torch.org"),
            ("deb.", "debian.org"),
            ("/opt", "/pypi"),
            ("/opt", "/wheels"),
        )
    )
    + r"|(?<![\w.}>-])/(?:work|root|home/\w+)/\w"
)


@pytest.fixture(autouse=True, scope="module")
def _forget_trees() -> Iterator[None]:
    """Half a million objects would be walked through by each collection of garbage in the tests that follow."""
    yield
    _parsed.cache_clear()


def parse(folder: Path) -> dict[str, ast.Module]:
    """Dotted module name to syntax tree, for every file of a package folder; `__init__` stands for its folder."""
    trees = {}
    for path in sorted(folder.rglob("*.py")):
        parts = (folder.name, *path.relative_to(folder).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = _parsed(path, path.stat().st_mtime_ns)
    return trees


@cache
def _parsed(path: Path, _changed: int) -> ast.Module:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    tree.path = path  # type: ignore[attr-defined]
    return tree


def is_type_checking(node: ast.AST) -> bool:
    """Whether a node is `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree: ast.Module, module: str, *, typing: bool = True, lazy: bool = True) -> Iterator[tuple[int, str, str]]:
    """`(line, module, name)` of each import; `name` is empty for `import module`. Relative ones are made absolute.

    `typing` includes those under `TYPE_CHECKING`, `lazy` those inside functions.
    """
    is_package = tree.path.name == "__init__.py"  # type: ignore[attr-defined]
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        if (is_type_checking(node) and not typing) or (isinstance(node, ast.FunctionDef) and not lazy):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                base = module.split(".")
                base = base[: len(base) - node.level + is_package]
                source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, source, alias.name) for alias in node.names)
        stack.extend(ast.iter_child_nodes(node))


def room_of(module: str) -> str:
    """The room a module of the package is in; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def wrong_imports(folder: Path) -> list[str]:
    """Imports that point upwards or sideways, or into a room that is closed to them."""
    trees, complaints = parse(folder), []
    package = folder.name
    for module, tree in trees.items():
        room = room_of(module)
        if not room:
            eager = imports(tree, module, typing=False, lazy=False)
            complaints += [
                f"{module}:{line} imports {source} when the package is imported; import it on first use"
                for line, source, _ in eager
                if source.split(".")[0] not in sys.stdlib_module_names
            ]
            continue
        if room not in RANKS:
            complaints.append(f"{module}: room {room!r} has no rank")
            continue
        for line, source, name in imports(tree, module):
            full = f"{source}.{name}" if source == package and name else source
            target = room_of(full) if full.split(".")[0] == package else None
            # `from tether import __version__` and the like: a name of the package, no room.
            rank = RANKS.get(target, -1) if target is not None else -1
            if target != room and rank >= RANKS[room]:
                complaints.append(f"{module}:{line} imports {full}: {room} may not know {target}")
            outside = full.split(".")[0] not in sys.stdlib_module_names and target != room
            known = full.split(".")[0] if target is None else f"tether.{target}"
            if outside and room in CLOSED and known not in CLOSED[room]:
                complaints.append(f"{module}:{line} imports {full}: {room} is closed to it")
    return complaints


def import_cycles(folder: Path) -> list[str]:
    """Circles among modules, imports inside functions and for the type checker alone included.

    The package itself, which imports for the type checker what it gives out on first use, is left out.
    """
    trees = parse(folder)
    graph: dict[str, set[str]] = {}
    for module, tree in trees.items():
        targets = set()
        for _, source, name in imports(tree, module):
            targets.add(f"{source}.{name}" if f"{source}.{name}" in trees else source)
        graph[module] = (targets & trees.keys()) - {folder.name}
    cycles, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            cycles.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, [*path, module])
            done.add(module)

    for module in graph.keys() - {folder.name}:
        visit(module, [])
    return cycles


def over_budget(folder: Path) -> list[str]:
    """Functions that are too long, and classes and files with too many lines of code (no docstrings, no comments)."""
    complaints = []
    for module, tree in parse(folder).items():
        numbers = [number for number, _ in code_lines(tree)]
        if len(numbers) > FILE_LINES:
            complaints.append(f"{module}: {len(numbers)} lines, at most {FILE_LINES}")
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            end = node.end_lineno or node.lineno
            is_class = isinstance(node, ast.ClassDef)
            length = sum(node.lineno <= number <= end for number in numbers) if is_class else end - node.lineno + 1
            budget = CLASS_LINES if is_class else FUNCTION_LINES
            if length > budget:
                complaints.append(f"{module}:{node.lineno} {node.name}: {length} lines, at most {budget}")
    return complaints


def crowded_rooms(folder: Path) -> list[str]:
    """Folders with too many files for one look; `__init__` says what is inside and does not count."""
    files = defaultdict(list)
    for path in folder.rglob("*.py"):
        files[path.parent].append(path)
    return [
        f"{room.relative_to(folder.parent)}: {len(found)} files, at most {ROOM_FILES}; give it rooms of its own"
        for room, paths in files.items()
        if len(found := [path for path in paths if path.name != "__init__.py"]) > ROOM_FILES
    ]


def trainer_classes(folder: Path) -> list[str]:
    """Classes that derive from a class of transformers whose name ends in `Trainer`."""
    found = []
    for module, tree in parse(folder).items():
        foreign = {name for _, source, name in imports(tree, module) if source.split(".")[0] == "transformers"}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
                found += [f"{module}.{node.name}" for base in bases & foreign if base.endswith("Trainer")]
    return found


def asked_kinds(folder: Path) -> list[str]:
    """`isinstance` on a kind of reference outside its room: what differs between kinds is a method of theirs."""
    trees = parse(folder)
    kinds = {
        node.name
        for module, tree in trees.items()
        if room_of(module) == "reference"
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Reference") for base in node.bases)
    }
    complaints = []
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and is_name(node.func, "isinstance", "issubclass"):
                asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)} & kinds
                if asked and room_of(module) != "reference":
                    complaints.append(f"{module}:{node.lineno} asks for {', '.join(sorted(asked))}")
    return complaints


def code_lines(tree: ast.Module) -> list[tuple[int, str]]:
    """`(line number, text)` of what is neither blank, comment, import, docstring nor bare punctuation."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_import or (is_docstring and isinstance(node.value.value, str)):
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    text = tree.path.read_text(encoding="utf-8").splitlines()  # type: ignore[attr-defined]
    stripped = ((number, " ".join(line.split())) for number, line in enumerate(text, 1) if number not in skipped)
    return [(number, line) for number, line in stripped if re.search(r"\w", line) and not line.startswith("#")]


def repeated_lines(folder: Path) -> tuple[float, list[str]]:
    """The share of code lines that lie in a run of `REPEATED_WINDOW` lines found in two places, and those places."""
    sources = {module: code_lines(tree) for module, tree in parse(folder).items()}
    windows: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for module, lines in sources.items():
        for start in range(len(lines) - REPEATED_WINDOW + 1):
            windows[tuple(text for _, text in lines[start : start + REPEATED_WINDOW])].append((module, start))
    repeated, places = set(), []
    for found in windows.values():
        first = found[0]
        apart = [place for place in found[1:] if place[0] != first[0] or place[1] - first[1] >= REPEATED_WINDOW]
        if apart:
            places.append(" = ".join(f"{module}:{sources[module][start][0]}" for module, start in [first, *apart]))
            for module, start in [first, *apart]:
                repeated.update((module, start + offset) for offset in range(REPEATED_WINDOW))
    total = sum(map(len, sources.values()))
    return len(repeated) / max(total, 1), places


def is_private(name: str) -> bool:
    """Whether a name says that it is nobody else's."""
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def members(tree: ast.Module) -> set[str]:
    """Private names that classes of a module define: methods, fields, and what a method sets on `self`."""
    found: set[str] = set()
    for node in (inner for kind in ast.walk(tree) if isinstance(kind, ast.ClassDef) for inner in ast.walk(kind)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_name(node.value, "self"):
            found.add(node.attr)
    return set(filter(is_private, found))


def is_name(node: ast.AST, *names: str) -> bool:
    """Whether a node is one of some plain names."""
    return isinstance(node, ast.Name) and node.id in names


def private_uses(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """`(line, private name, whether it is of this object or class)` of each attribute used, `getattr` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            holder, name = node.value, node.attr
        elif isinstance(node, ast.Call) and is_name(node.func, "getattr", "hasattr", "setattr", "delattr"):
            holder, value = node.args[0], node.args[1]
            name = value.value if isinstance(value, ast.Constant) else ""
        else:
            continue
        if is_private(name):
            yield node.lineno, name, is_name(holder, "self", "cls")


def foreign_privates(folder: Path) -> list[str]:
    """Private names of libraries that are used outside `PRIVATE_ROOM`.

    A class of the package may use its own and those of the classes it derives from in the package; others may use those
    of classes in their own file.
    """
    trees, complaints = parse(folder), []
    own = set().union(*map(members, trees.values()))
    for module, tree in trees.items():
        if room_of(module) == PRIVATE_ROOM:
            continue
        here = members(tree)
        complaints += [
            f"{module}:{line} uses {name}"
            for line, name, of_itself in private_uses(tree)
            if name not in (own if of_itself else here)
        ]
        complaints += [
            f"{module}:{line} imports {source}.{name}".rstrip(".")
            for line, source, name in imports(tree, module)
            if source.split(".")[0] != folder.name and any(map(is_private, [*source.split("."), name]))
        ]
    return complaints


# What the left column of CONTRIBUTING's table of words stands for, as patterns; "there is no number" is good English.
WORDS = {
    "came": r"\b(?:else|argument|what|was) came[;,.:]|\} came\b|[\"']came[ ,]|\bcame (?:too|without|together)",
    "is no JSON": r"(?<!here )\bis no (?:JSON|YAML|number|text|folder|file|adapter|tokenizer|split|option)\b",
    "otherwise than": r"\botherwise than\b",
    "needs it not": r"\bneeds? it not\b",
    "without a word": r"\bwithout a word\b",
    "and its kin": r"\bits kin\b",
    "means of the reference": r"\breference_means\b|\b(?:forced|every|two) means\b|\bmeans of (?:a|the) reference\b",
    "to judge": r"\b(?:def |\.|_)judge\(",
    "processor": r"\b(?:CPU|machine) processors?\b|\bprocessor (?:time|cores?|seconds)\b",
}


def unwanted_words(folder: Path) -> list[str]:
    """Lines of the package with words of the left column of CONTRIBUTING's table."""
    return [
        f"{path.relative_to(folder.parent)}:{number} says {word!r}: {line.strip()}"
        for path in sorted(folder.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for word, pattern in WORDS.items()
        if re.search(pattern, line)
    ]


def tracked_files(folder: Path) -> list[Path]:
    """What git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    if found.returncode:
        pytest.skip("not a git checkout")
    names = found.stdout.decode().split("\0")
    return [folder / name for name in sorted(set(names)) if name and (folder / name).is_file()]


def unfit_files(folder: Path) -> list[str]:
    """Tracked files that are too large, or that name a package registry or a path of one machine."""
    complaints = []
    for path in tracked_files(folder):
        if path.stat().st_size > FILE_BYTES:
            complaints.append(f"{path.relative_to(folder)}: {path.stat().st_size} bytes, at most {FILE_BYTES}")
            continue
        for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").splitlines(), 1):
            if match := ADDRESSES.search(line):
                complaints.append(f"{path.relative_to(folder)}:{number} names {match.group()!r}")
    return complaints


def undeclared_imports(folder: Path, pyproject: str) -> list[str]:
    """Packages that are imported, and that pyproject.toml names neither as a dependency nor in an extra."""
    project = tomllib.loads(pyproject)["project"]
    extras = project.get("optional-dependencies", {}).values()
    named = [line for lines in [project["dependencies"], *extras] for line in lines]
    known = {re.split(r"[^\w.-]", name, maxsplit=1)[0].lower().replace("-", "_") for name in named}
    return [
        f"{module}:{line} imports {source}"
        for module, tree in parse(folder).items()
        for line, source, _ in sorted(imports(tree, module))
        if (top := source.split(".")[0]) not in sys.stdlib_module_names | {folder.name}
        and DISTRIBUTIONS.get(top, top).lower() not in known
    ]


def numbers_of_the_environment(folder: Path) -> list[str]:
    """Places that make a number of a variable of the environment at once: anyone can set it to anything."""
    return [
        f"{module}:{node.lineno} reads {ast.unparse(node)}"
        for module, tree in parse(folder).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("int", "float")
        and re.search(r"\benviron\b|\bgetenv\b", ast.unparse(node))
    ]


def imported_tests(folder: Path) -> list[str]:
    """Test modules that another file imports: what two of them need is in `tests/support/`."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.py"))}
    existing, complaints = {one.name for one in trees}, []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = [alias.name for alias in node.names]
            source = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            parts = {part for name in (*names, *source) for part in name.split(".")}
            found = {f"{part}.py" for part in parts if part.startswith("test_")} & existing
            place = path.relative_to(folder).as_posix()
            if found - TESTS_THAT_ARE_READ.get(place, set()):
                complaints.append(f"{place}:{node.lineno} imports {', '.join(sorted(found))}")
    return complaints


def wrong_map(page: str, package: Path) -> list[str]:
    """Folders of the package that its map does not name, and files and folders that the map names and are not there."""
    folders = {path.relative_to(package) for path in package.rglob("*") if path.is_dir() and path.name != "__pycache__"}
    named = re.findall(r"`([\w./]+(?:\.py|/))`", page)
    known = {one.name for one in folders}
    missing = [one for one in sorted(folders) if not {f"{one.name}/", f"{one}/"} & {*named}]
    places = {one for one in named for root in (package, package.parents[1]) if (root / one).exists()}
    gone = [one for one in named if one.rstrip("/") not in known and one not in places]
    return [*(f"{one.name}/ is not named" for one in missing), *(f"{one} is not there" for one in gone)]


def plant(folder: Path, **files: str) -> Path:
    """A package `tether` under `folder`; keys are paths with `__` for `/`."""
    package = folder / "tether"
    for name, text in files.items():
        path = package / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


def test_imports_point_downwards() -> None:
    assert wrong_imports(PACKAGE) == []


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("scoring__score", "from tether.training.trainer import Trainer"),
        ("scoring__score", "def late():\n    import tether.reference"),
        ("scoring__score", "from tether import cli"),
        ("scoring__score", "from ..reference import guard"),
        ("reference__guard", "from tether.objectives import sigmoid"),
        ("objectives__pairwise", "import transformers"),
        ("objectives__pairwise", "from tether.scoring import score"),
        ("types", "import numpy"),
        ("errors", "import torch"),
        ("attic__box", "x = 1"),
    ],
)
def test_an_import_upwards_is_caught(tmp_path: Path, place: str, text: str) -> None:
    assert len(wrong_imports(plant(tmp_path, **{place: text}))) >= 1


def test_an_eager_import_of_the_package_is_caught(tmp_path: Path) -> None:
    (tmp_path / "tether").mkdir()
    (tmp_path / "tether" / "__init__.py").write_text("from tether.training import DPOTrainer\n")
    assert len(wrong_imports(tmp_path / "tether")) == 1
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tether.training import DPOTrainer\n"
    (tmp_path / "tether" / "__init__.py").write_text(lazy + "def __getattr__(name):\n    import tether.training\n")
    assert wrong_imports(tmp_path / "tether") == []


def test_no_import_cycles() -> None:
    assert import_cycles(PACKAGE) == []


def test_an_import_cycle_is_caught(tmp_path: Path) -> None:
    circle = plant(
        tmp_path, data__a="from tether.data import b", data__b="from . import c", data__c="from tether.data.a import x"
    )
    assert len(import_cycles(circle)) == 1
    assert import_cycles(plant(tmp_path / "line", data__a="from tether.data import b", data__b="")) == []


def test_what_is_imported_is_declared() -> None:
    assert undeclared_imports(PACKAGE, (ROOT / "pyproject.toml").read_text(encoding="utf-8")) == []


def test_an_undeclared_import_is_caught(tmp_path: Path) -> None:
    package = plant(
        tmp_path, data__a="import yaml, json\nfrom tether import types\nimport vaderSentiment.x", data__b=""
    )
    declared = '[project]\ndependencies = ["PyYAML>=6"]\noptional-dependencies.demo = ["vaderSentiment==3"]\n'
    assert undeclared_imports(package, declared) == []
    assert undeclared_imports(package, "[project]\ndependencies = ['yaml']\n") == [
        "tether.data.a:1 imports yaml",
        "tether.data.a:3 imports vaderSentiment.x",
    ]


def test_functions_classes_and_files_stay_within_budget() -> None:
    assert over_budget(PACKAGE) == []


def test_what_is_over_budget_is_caught(tmp_path: Path) -> None:
    function = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
    assert len(over_budget(plant(tmp_path / "function", models__a=function))) == 1
    assert len(over_budget(plant(tmp_path / "file", models__a="x = 1\n" * (FILE_LINES + 1)))) == 1
    assert len(over_budget(plant(tmp_path / "class", models__a="class A:\n" + "    x = 1\n" * CLASS_LINES))) == 2
    assert over_budget(plant(tmp_path / "fits", models__a="def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1))) == []


def test_a_room_is_seen_at_one_look() -> None:
    assert crowded_rooms(PACKAGE) == []


def test_a_crowded_room_is_caught(tmp_path: Path) -> None:
    files = {f"data__rows__f{number}": "" for number in range(ROOM_FILES)} | {"data__rows____init__": ""}
    assert crowded_rooms(plant(tmp_path, **files)) == []
    assert len(crowded_rooms(plant(tmp_path, data__rows__more=""))) == 1


def test_one_class_is_a_trainer_of_transformers() -> None:
    assert trainer_classes(PACKAGE) == ["tether.training.trainer.TetherTrainer"]


def test_a_second_trainer_is_caught(tmp_path: Path) -> None:
    text = "import transformers\nfrom transformers import {0}\nclass A({0}): ...\nclass B(A): ...\n"
    assert trainer_classes(plant(tmp_path / "one", training__a=text.format("Trainer"))) == ["tether.training.a.A"]
    assert trainer_classes(plant(tmp_path / "two", training__a=text.format("Seq2SeqTrainer"))) == [
        "tether.training.a.A"
    ]
    assert trainer_classes(plant(tmp_path / "none", training__a=text.format("TrainerCallback"))) == []


def test_numbers_of_the_environment_are_checked() -> None:
    assert numbers_of_the_environment(PACKAGE) == []


def test_a_number_of_the_environment_is_caught(tmp_path: Path) -> None:
    text = "import os\nint(os.environ.get('RANK', '0'))\nfloat(os.getenv('X') or 1)\nint(os.cpu_count())\n"
    assert len(numbers_of_the_environment(plant(tmp_path, training__a=text))) == 2


def test_no_kind_of_reference_is_asked_for() -> None:
    assert asked_kinds(PACKAGE) == []


def test_a_question_for_a_kind_of_reference_is_caught(tmp_path: Path) -> None:
    kind = "class Reference: ...\nclass Copy(Reference): ...\ndef f(x):\n    return isinstance(x, Copy)\n"
    asks = "def f(x):\n    return isinstance(x, (int, Copy))\n"
    assert len(asked_kinds(plant(tmp_path, reference__a=kind, training__b=asks))) == 1
    assert asked_kinds(plant(tmp_path / "fine", reference__a=kind, training__b="isinstance(1, int)")) == []


def test_little_is_said_twice() -> None:
    share, places = repeated_lines(PACKAGE)
    assert share <= REPEATED_SHARE, f"{share:.1%} of the code is found in two places: {places}"


def test_what_is_said_twice_is_caught(tmp_path: Path) -> None:
    body = "".join(f"x{number} = {number}  \n" for number in range(REPEATED_WINDOW))
    share, places = repeated_lines(plant(tmp_path / "twice", models__a=body, data__b="# copied\n\n" + body))
    assert (share, len(places)) == (1.0, 1)
    shorter = "\n".join(body.splitlines()[:-1])
    assert repeated_lines(plant(tmp_path / "short", models__a=shorter, data__b=shorter)) == (0.0, [])


def test_private_names_of_libraries_are_used_in_one_room() -> None:
    assert foreign_privates(PACKAGE) == []


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x._hidden",
        "def f(x):\n    x._hidden = 1",
        "class A(Base):\n    def f(self):\n        return self._inherited()",
        "def f(x):\n    return getattr(x, '_hidden', None)",
        "from torch._dynamo import config",
        "def late():\n    from torch.nn.modules.dropout import _DropoutNd",
        "import torch._inductor",
    ],
)
def test_a_private_name_of_a_library_is_caught(tmp_path: Path, text: str) -> None:
    package = plant(tmp_path, models__a=text)
    assert len(foreign_privates(package)) == 1
    assert foreign_privates(plant(tmp_path / "room", compat__a=text)) == []


def test_private_names_of_the_package_may_be_used(tmp_path: Path) -> None:
    own = "class A:\n    _kept: int\n    def _half(self):\n        self._set, x = 1, 2\n"
    uses = "def f(a):\n    return a._kept, a._half(), a._set, getattr(a, '_set'), a.__class__, a._asdict()\n"
    derived = "class B(A):\n    def f(self):\n        return self._half()\n"
    assert foreign_privates(plant(tmp_path / "one", models__a=own + uses)) == []
    assert foreign_privates(plant(tmp_path / "two", models__a=own, models__b=derived)) == []
    assert len(foreign_privates(plant(tmp_path / "other", models__a=own, models__b=uses))) == 4


def test_words_are_those_of_the_table() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("| not | but |")[1].split("\n\n")[0]
    assert [row.split("`")[1] for row in table.splitlines()[2:]] == [*WORDS]
    assert unwanted_words(PACKAGE) == []


def test_an_unwanted_word_is_caught(tmp_path: Path) -> None:
    lines = [
        "f'a {kind} came; pass another'",
        "'the line is no JSON'",
        "'otherwise than before'",
        "# needs it not",
        "# ends without a word",
        "# BART and its kin",
        "reference_means = 1",
        "def judge(x): ...",
        "# two processors of a CPU take processor time",
    ]
    assert len(unwanted_words(plant(tmp_path / "bad", data__a="\n".join(lines)))) == len(WORDS)
    fine = "# there is no file; rows as they came from disk; the processor of the model\n"
    assert unwanted_words(plant(tmp_path / "good", data__a=fine)) == []


def test_tracked_files_are_small_and_name_no_machine() -> None:
    assert unfit_files(ROOT) == []


def test_unfit_files_are_caught(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "large.bin").write_bytes(bytes(FILE_BYTES + 1))
    (tmp_path / "address.md").write_text("see https:" + "//py" + "pi.org/simple\n")
    (tmp_path / "path.py").write_text("folder = '/wor" + "k/main'\n")
    (tmp_path / "fine.md").write_text("a page in frame/work/ and on apache.org\n")
    names = [complaint.split(":")[0] for complaint in unfit_files(tmp_path)]
    assert names == ["address.md", "large.bin", "path.py"]


def test_what_two_test_modules_need_is_in_support() -> None:
    assert imported_tests(ROOT / "tests") == []


@pytest.mark.parametrize("text", ["import data.test_a", "from data.test_a import X", "from data import test_a"])
def test_an_imported_test_module_is_caught(tmp_path: Path, text: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test_a.py").write_text("X = 1\n")
    (tmp_path / "worker.py").write_text(text)
    assert len(imported_tests(tmp_path)) == 1
    (tmp_path / "worker.py").write_text("from data.samples import test_a_name\nimport test_elsewhere\n")
    assert imported_tests(tmp_path) == []


def test_the_map_names_every_room() -> None:
    assert wrong_map((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), PACKAGE) == []


def test_a_wrong_map_is_caught(tmp_path: Path) -> None:
    package = plant(tmp_path / "src", data__rows__schema="", models__load="")
    page = "`data/`: `rows/`, `data/rows/schema.py`; `models/`: `load`"
    assert wrong_map(page, package) == []
    assert wrong_map(page.replace("`models/`", "models"), package) == ["models/ is not named"]
    assert wrong_map(f"{page}, `models/spec.py`, `text/`", package) == [
        "models/spec.py is not there",
        "text/ is not there",
    ]
