"""Nothing in the source can run what a file says: a call that could fails here, wherever it is added."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmjd

SOURCE = Path(dmjd.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"),
    *("joblib.load", "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all"),
    *("torch.hub.load", "torch.jit.load", "torch.export.load", "torch.package.PackageImporter"),
    *("os.system", "os.popen", "os.execv", "os.execvp", "os.spawnl", "os.startfile", "pty.spawn"),
    *("subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_output", "subprocess.getoutput"),
    *("tarfile.TarFile.extract", "tarfile.TarFile.extractall", "zipfile.ZipFile.extractall", "shutil.unpack_archive"),
}
UNSAFE = {"shell": True, "weights_only": False, "allow_pickle": True, "trust_remote_code": True}  # values of arguments
NEEDED = {"torch.load": ("weights_only", True)}


def unsafe(source: str) -> Iterator[str]:
    """Name every call that could run code, by what its name was imported as."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                first = each.name.partition(".")[0]
                names[each.asname or first] = each.name if each.asname else first
        elif isinstance(node, ast.ImportFrom):
            names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        called = names.get(first, first) + dot + rest
        given = {each.arg: ast.unparse(each.value) for each in node.keywords}
        wrong = any(given.get(name, str(not value)) != str(not value) for name, value in UNSAFE.items())
        missing = any(called == name and given.get(key) != str(value) for name, (key, value) in NEEDED.items())
        if wrong or missing or called in FORBIDDEN or called.endswith((".extractall", ".unsafe_load", ".full_load")):
            yield f"{node.lineno}: {ast.unparse(node)[:80]}"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(SOURCE)) for path in FILES])
def test_source__has_no_call_that_runs_what_a_file_says(path: Path) -> None:
    assert not list(unsafe(path.read_text()))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle; pickle.load(file)",
        "import pickle as p; p.loads(content)",
        "from pickle import Unpickler; Unpickler(file).load()",
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "import torch; torch.load(path, weights_only=safe)",
        "import yaml; yaml.load(file, yaml.SafeLoader)",
        "from yaml import unsafe_load; unsafe_load(file)",
        "eval(text)",
        "exec(text)",
        "import os; os.system(text)",
        "import subprocess; subprocess.run(text, shell=True)",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=trusted)",
        "archive.extractall(folder)",
    ],
)
def test_unsafe__knows_each_way(line: str) -> None:
    assert list(unsafe(line))


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.load(path, weights_only=True)",
        "import yaml; yaml.safe_load(file)",
        "network.eval()",
        "import re; re.compile(text)",
        "import numpy as np; np.load(path, allow_pickle=False)",
    ],
)
def test_unsafe__lets_the_rest_pass(line: str) -> None:
    assert not list(unsafe(line))
