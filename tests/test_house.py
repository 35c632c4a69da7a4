"""What keeps the source readable is checked: sizes of functions, names of classes, one file for a verb."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

import dmjd
from dmjd.cli import VERBS

SOURCE = Path(dmjd.__file__).parent
FILES = {str(path.relative_to(SOURCE)): path for path in sorted(SOURCE.rglob("*.py"))}
MOST_PARAMETERS, MOST_LINES = 8, 60


def functions(path):
    """Every function and method of a file, however deep, and whether a comment on its `def` line gives a reason."""
    source = path.read_text()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, "  # " in lines[node.lineno - 1]


def parameters(function):
    """Count parameters: `self` and `cls` do not count, `*rest` and `**rest` count as one each."""
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")]) + bool(given.vararg) + bool(given.kwarg)


@pytest.mark.parametrize("name", FILES)
def test_functions__have_at_most_8_parameters_and_60_lines_or_a_reason(name):
    for function, excused in functions(FILES[name]):
        place = f"{name}:{function.lineno} {function.name}"
        assert excused or parameters(function) <= MOST_PARAMETERS, f"{place} has {parameters(function)} parameters"
        length = function.end_lineno - function.lineno + 1
        assert excused or length <= MOST_LINES, f"{place} has {length} lines"


def test_tasks__are_the_verbs_and_nothing_else():
    modules = {path.stem for path in (SOURCE / "tasks").rglob("*.py")} - {"__init__"}
    assert modules == {verb.name for verb in VERBS} | {"report"}


def test_classes__have_names_of_their_own():
    names = Counter(
        node.name
        for path in FILES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, count in names.items() if count > 1]


@pytest.mark.parametrize("package", sorted({path.parent.name for path in SOURCE.glob("*/__init__.py")} - {"tasks"}))
def test_packages__say_what_each_of_their_files_is_for(package):
    index = ast.get_docstring(ast.parse((SOURCE / package / "__init__.py").read_text()))
    files = {path.stem for path in (SOURCE / package).glob("*.py")} - {"__init__"}
    assert not {name for name in files if not re.search(rf"\b{name}\b", index)}
