"""Imports point one way: ops <- kernels <- modules, calibration <- the rest <- cli."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "scalesweep_hf"
FILES = sorted(PACKAGE.rglob("*.py"))

# What each part may import of the package, itself aside. Others are glue: anything but cli.
MAY_IMPORT = {
    "version": set[str](),
    "discovery": set[str](),
    "ops": set[str](),
    "kernels": {"ops"},
    "modules": {"ops", "kernels"},
    "calibration": {"ops", "kernels", "names", "files"},
    "evaluate": {
        *(
            "ops",
            "kernels",
            "modules",
            "calibration",
            "config",
            "files",
            "names",
            "targets",
            "version",
        ),
    },
    "export": {"ops", "checkpoint", "config", "files", "names", "targets", "version"},
    "config": {"ops", "kernels", "names", "files", "version"},
    "names": set[str](),
    "files": set[str](),
}
# Modules that even inside functions never import these.
NEVER = {
    "ops": {"transformers", "triton", "accelerate", "datasets", "safetensors"},
    "kernels": {"transformers", "accelerate", "datasets", "safetensors"},
    "modules/linear.py": {"transformers", "accelerate", "datasets"},
    "modules": {"datasets"},
    "discovery": {"torch", "transformers", "lm_eval"},
    "calibration/observers.py": {"transformers", "datasets"},
    "calibration/collect.py": {"transformers", "datasets"},
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def package_of(path: Path) -> list[str]:
    return ["scalesweep_hf", *path.relative_to(PACKAGE).parent.parts]


def imported_by(node: ast.AST, path: Path) -> list[str]:
    """Return the dotted names that one statement imports, "a.b" for ``from a import b`` too."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        package = package_of(path)
        base = package[: len(package) - node.level + 1] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        return [f"{module}.{alias.name}" for alias in node.names]
    return []


def imports(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {name for node in nodes for name in imported_by(node, path)}


def statements_run_on_import(nodes: list[ast.stmt]) -> Iterator[ast.AST]:
    """Yield all nodes but those inside functions and ``if TYPE_CHECKING``."""
    todo: list[ast.AST] = list(nodes)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        yield node
        todo += ast.iter_child_nodes(node)


def imports_on_import(path: Path) -> set[str]:
    nodes = statements_run_on_import(ast.parse(path.read_text(encoding="utf-8")).body)
    return {name for node in nodes for name in imported_by(node, path)}


def own_parts(path: Path) -> set[str]:
    """Return the parts of the package that a file imports, itself aside."""
    own = [name.split(".") for name in imports(path) if name.split(".")[0] == "scalesweep_hf"]
    parts = {name[1] if len(name) > 1 else "__init__" for name in own}
    known = {part_of(file) for file in FILES}
    # A name that is no part comes from the package's own __init__.
    return {part if part in known else "__init__" for part in parts} - {part_of(path)}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_there_is_something_to_check() -> None:
    assert {"ops", "modules", "calibration", "config", "quantizer"} <= {part_of(f) for f in FILES}
    assert "scalesweep_hf.ops.objectives.OBJECTIVES" in imports(PACKAGE / "config.py")
    assert own_parts(PACKAGE / "quantizer.py") >= {"modules", "calibration", "config"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    if part in MAY_IMPORT:
        assert own_parts(path) <= MAY_IMPORT[part]
    elif part != "__init__":
        assert "__init__" not in own_parts(path)
    if part not in ("cli", "__main__"):
        assert "cli" not in own_parts(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_arithmetic_and_modules_know_no_transformers(path: Path) -> None:
    for place, forbidden in NEVER.items():
        if name_of(path) == place or part_of(path) == place:
            assert not {name.split(".")[0] for name in imports(path)} & forbidden


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").rglob("*.py")), ids=name_of)
def test_ops_know_no_modules(path: Path) -> None:
    assert not any(
        name.startswith(("torch.nn.Module", "torch.nn.modules")) for name in imports(path)
    )
    assert "nn.Module" not in ast.unparse(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", sorted((PACKAGE / "calibration").rglob("*.py")), ids=name_of)
def test_calibration_imports_transformers_only_inside_functions(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports_on_import(path)}
    assert not tops & {"transformers", "datasets"}


IMPORT = """
import os, socket
def refuse(*args, **kwargs):
    raise AssertionError(f"network: {args}")
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
from transformers.quantizers import auto
assert "scalesweep" not in auto.AUTO_QUANTIZER_MAPPING
import scalesweep_hf as package
assert {"scalesweep", "modelopt"} <= {*auto.AUTO_QUANTIZATION_CONFIG_MAPPING}
quantizer, config = package.ScaleSweepHfQuantizer, package.ScaleSweepConfig
assert auto.AUTO_QUANTIZER_MAPPING["scalesweep"] is quantizer
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["scalesweep"] is config
missing = [name for name in package.__all__ if not hasattr(package, name)]
assert not missing, missing
assert len(package.__all__) <= 12
"""


def test_importing_registers_the_method_and_touches_no_network() -> None:
    env = os.environ | {"SCALESWEEP_NO_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
