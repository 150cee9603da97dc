"""The layout is the architecture: imports run one way, lists are complete, and nothing untrusted is executed."""

import ast
import configparser
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import flags
import pytest
from tree import HEAVY, MODULES, ROOT, room

# Which room may import which others; those who assemble may import what they assemble.
MAY_IMPORT = {
    "aiollm": {"wire", "hub"},  # console.py and doctor.py
    "wire": set(),
    "grammar": {"wire"},
    "engine": {"wire"},
    "text": {"wire"},
    "hub": {"text", "wire"},
    "fleet": {"wire"},
    "api": {"engine", "grammar", "text", "wire"},
    "bench": set(),
    "offline": {"aiollm", "api", "engine", "hub", "text", "wire"},
    "workers": {"grammar", "wire", "kernels"},
    "kernels": set(),
}

ASSEMBLERS = {"aiollm", "aiollm.__main__", "aiollm.assembly"}

KERNEL_LIBRARIES = {"torch", "triton", "numpy"} | sys.stdlib_module_names

TOP_LEVEL = {
    "CHANGELOG.md", "LICENSE", "Makefile", "README.md", "aiollm", "constraints.txt", "kernels", "pyproject.toml",
    "setup.cfg", "tests", "tools", "workers",
}  # fmt: skip

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "multiprocessing"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.save", "os.system", "os.popen"}
FORBIDDEN_ARGUMENTS = {"shell", "allow_pickle"}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def here(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("name", sorted(set(MODULES) - ASSEMBLERS))
def test_imports_run_one_way(name: str) -> None:
    own = room(name)
    for imported in imports(MODULES[name]):
        assert imported.split(".")[0] not in ("workers", "kernels"), f"{name} imports {imported} by its bare name"
        if imported == "aiollm":  # its version
            assert own != "kernels", f"{name} imports {imported}"
        elif imported.startswith("aiollm."):
            other = room(imported)
            assert other == own or other in MAY_IMPORT[own], f"{name} must not import {imported}"
        elif own == "kernels":
            assert imported.split(".")[0] in KERNEL_LIBRARIES, f"{name} imports {imported}"
        elif own != "workers":
            assert imported.split(".")[0] not in HEAVY, f"{name} would load {imported} into the server"


def test_tests_and_tools_import_by_the_packages_name() -> None:
    for path in [*ROOT.glob("tests/**/*.py"), *python_tools()]:
        for imported in imports(path):
            assert imported.split(".")[0] not in ("workers", "kernels"), f"{here(path)} imports {imported}"


def test_package_files_import_nothing() -> None:
    """But for the names of aiollm's own that programs use; test_imports.py holds that they are not loaded unasked."""
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name != "aiollm":
            assert list(imports(path)) == [], here(path)


def test_setup_cfg_lists_exactly_the_packages_that_exist() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = setup["options"]["packages"].split()
    exist = [name for name, path in MODULES.items() if path.name == "__init__.py"]
    assert sorted(listed) == sorted(exist)
    bare = [here(path) for path in MODULES.values() if not (path.parent / "__init__.py").exists()]
    assert bare == [], "in a folder without __init__.py"


def test_every_operation_has_one_specification_and_every_implementation_its_parameters() -> None:
    (ops,) = (node for node in ast.walk(parse(ROOT / "kernels/ops.py")) if getattr(node, "name", "") == "Ops")
    fields = [ast.unparse(node.target) for node in ast.walk(ops) if isinstance(node, ast.AnnAssign)]
    assert fields
    specifications = functions("kernels/ref/*.py")
    others = functions("kernels/*.py") + functions("kernels/cpu/*.py")
    for field in fields:
        found = [parameters for name, parameters, _ in specifications if name == field]
        assert len(found) == 1, f"{field} has {len(found)} specifications in kernels/ref"
        for name, parameters, path in others:
            assert name != field or parameters == found[0], f"{path}: {name} has not the parameters of its reference"


def test_every_operation_has_a_test() -> None:
    modules = [path for folder in ("ref", "cpu") for path in (ROOT / "kernels" / folder).glob("[!_]*.py")]
    assert modules
    missing = [here(path) for path in modules if not (ROOT / f"tests/kernels/test_{path.stem}.py").is_file()]
    assert missing == [], "without a test in tests/kernels"


def test_tunable_kernels_list_their_candidates_and_the_cases_that_the_tuner_times() -> None:
    tunable = {}
    for path in sorted(ROOT.glob("kernels/*.py")):
        calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
        looked_up = {ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func) == "lookup"}
        if looked_up:
            tunable[path] = looked_up
    assert tunable
    for path, looked_up in tunable.items():
        assert looked_up == {repr(path.stem)}, f"{here(path)}: a lookup names the module whose candidates are tried"
        assigned = {ast.unparse(n.targets[0]) for n in parse(path).body if isinstance(n, ast.Assign)}
        assigned |= {ast.unparse(n.target) for n in parse(path).body if isinstance(n, ast.AnnAssign)}
        assert "CANDIDATES" in assigned, here(path)


def functions(pattern: str) -> list[tuple[str, list[str], str]]:
    """Name, parameters and file of the functions at the top level of files."""
    return [
        (node.name, [argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]], here(path))
        for path in sorted(ROOT.glob(pattern))
        for node in parse(path).body
        if isinstance(node, ast.FunctionDef)
    ]


def test_the_readme_maps_every_file() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    mapped = re.findall(r"^((?:aiollm|workers|kernels|tools)/\S+)  +\S", text, re.MULTILINE)
    exist = [here(path) for path in MODULES.values() if path.name != "__init__.py"]
    exist += [here(path) for path in (ROOT / "tools").iterdir() if path.is_file()]
    assert sorted(mapped) == sorted(exist)


def test_the_readme_lists_every_flag_as_it_is() -> None:
    text = flags.README.read_text(encoding="utf-8")
    assert flags.table().count("| `--") == len(flags.FIELDS)
    assert flags.written(text) == text, "run python tools/flags.py"


def test_the_top_level_holds_only_what_belongs_there() -> None:
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()]
    names = [path.name for path in ROOT.iterdir() if not path.name.startswith(".")]
    found = [name for name in names if not any(fnmatch(name, pattern) for pattern in ignored)]
    assert sorted(found) == sorted(TOP_LEVEL)


def test_nothing_unpickles_or_runs_text() -> None:
    for path in [*MODULES.values(), *python_tools()]:
        assert list(forbidden(parse(path))) == [], here(path)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "import multiprocessing.connection",
        "eval('1')",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "numpy.load(path, allow_pickle=True)",
        "torch.distributed.broadcast_object_list(things)",
    ],
)
def test_the_gate_sees_what_it_should(source: str) -> None:
    assert list(forbidden(ast.parse(source)))


def test_the_gate_lets_its_neighbours_pass() -> None:
    source = "re.compile('x'); model.eval(); subprocess.run(['ls'], shell=False); torch.load(path, weights_only=True)"
    assert list(forbidden(ast.parse(source))) == []


def forbidden(tree: ast.Module) -> Iterator[str]:
    """Constructs that would execute what they read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"line {node.lineno}: {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FORBIDDEN_CALLS or re.search(r"_object(_list)?$", called):  # torch.distributed's pickle them
                yield f"line {node.lineno}: {called}"
            if called == "torch.load" and "weights_only=True" not in map(ast.unparse, node.keywords):
                yield f"line {node.lineno}: {called} of more than weights"
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in FORBIDDEN_ARGUMENTS and not off:
                    yield f"line {node.lineno}: {called}({keyword.arg}=...)"


def python_tools() -> list[Path]:
    """Commands in tools/ that are Python, with or without the ending."""
    files = [path for path in (ROOT / "tools").iterdir() if path.is_file()]
    return [path for path in files if path.suffix == ".py" or "python" in first_line(path)]


def first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
