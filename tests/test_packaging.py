"""The package as it is installed: names, data files, and what importing it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nla_jax

REPO = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = {
    "nla_jax": "nla_jax",
    "models": "nla_jax.models",
    "train": "nla_jax.train",
    "configs": "nla_jax.configs",
    "tools": "nla_jax.tools",
}


def _on_disk() -> set[str]:
    """Every folder with Python in it, by the name it should be installed under."""
    found = set()
    for top, package in FOLDERS.items():
        for file in (REPO / top).rglob("*.py"):
            found.add(".".join([package, *file.parent.relative_to(REPO / top).parts]))
    return found


def test_every_folder_is_listed_for_installation():
    assert set(SETUPTOOLS["packages"]) == _on_disk()
    assert {SETUPTOOLS["package-dir"][name]: name for name in FOLDERS.values()} == FOLDERS


def test_every_data_file_has_a_pattern_that_ships_it():
    patterns = SETUPTOOLS["package-data"]["*"]
    for top in FOLDERS:
        for file in (REPO / top).rglob("*"):
            if file.is_file() and file.suffix not in {".py", ".pyc"}:
                assert any(file.match(pattern) for pattern in patterns), f"a wheel would lack {file}"
                assert (file.parent / "__init__.py").exists(), f"{file} is not inside a package"


@pytest.mark.parametrize("name", SETUPTOOLS["packages"])
def test_package_imports_under_its_installed_name(name):
    code = f"import {name}, sys; print({name}.__file__); assert 'models' not in sys.modules"
    # From another directory: the repository root on sys.path would hide a broken mapping.
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_is_light():
    code = "import nla_jax, sys; print(*sorted({'jax', 'numpy', 'torch', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", nla_jax.__all__)
def test_public_names_resolve(name):
    assert getattr(nla_jax, name) is not None
    assert name in dir(nla_jax)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'explian'"):
        _ = nla_jax.explian


# What each layer may import from; the layers above it must stay unknown to it.
MAY_IMPORT = {
    "configs": {"configs"},
    "models": {"models"},
    "nla_jax": {"models", "nla_jax", "configs"},
    "train": {"models", "nla_jax", "train", "configs"},
    "tools": {"models", "nla_jax", "train", "configs", "tools"},
}


def _imports(file: Path) -> set[str]:
    """Modules of this package that a file imports, at any depth, by their full names."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write the import in full"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in names if name.split(".")[0] == "nla_jax"}


@pytest.mark.parametrize("top", FOLDERS)
def test_imports_go_one_way(top):
    for file in (REPO / top).rglob("*.py"):
        for name in _imports(file):
            parts = name.split(".")
            target = parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "nla_jax"
            assert target in MAY_IMPORT[top], f"{file} imports {name}"


def test_core_dependencies_hold_no_torch():
    listed = PROJECT["project"]["dependencies"] + (REPO / "requirements.lock").read_text().splitlines()
    assert not [line for line in listed if line.startswith(("torch", "transformers", "accelerate"))]


def test_lock_pins_versions_and_names_no_place():
    for line in (REPO / "requirements.lock").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert name and version, line
            assert not {"/", "@", ":"} & set(line), line
