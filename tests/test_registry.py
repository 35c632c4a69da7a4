import importlib
import sys

import pytest

from dmjd.errors import ConfigError
from dmjd.registry import Registry


@pytest.fixture
def animals(tmp_path, monkeypatch):
    """A package of two modules, and a third in another distribution that offers it as an entry point."""
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "__init__.py").write_text(
        "from dmjd.registry import Registry\nanimal = Registry('animal', 'zoo')\n"
    )
    for name in ("cat", "dog"):
        (tmp_path / "zoo" / f"{name}.py").write_text(
            f"from zoo import animal\n@animal('{name}', 'small_{name}')\ndef build(): return '{name}'\n"
        )
    (tmp_path / "elsewhere.py").write_text("from zoo import animal\n@animal('emu')\ndef build(): return 'emu'\n")
    info = tmp_path / "elsewhere-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[zoo]\nemu = elsewhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    import zoo

    yield zoo.animal
    for module in ("zoo", "zoo.cat", "zoo.dog", "elsewhere"):
        sys.modules.pop(module, None)


def test_one_file_is_enough_in_the_package_or_elsewhere(animals):
    assert animals.names() == ["cat", "dog", "emu", "small_cat", "small_dog"]
    assert animals.get("cat")() == animals.get("small_cat")() == "cat"
    assert animals.get("emu")() == "emu"


def test_nothing_is_imported_before_a_question(animals):
    assert "zoo.cat" not in sys.modules
    animals.get("dog")
    assert "zoo.cat" in sys.modules


def test_unknown_name(animals):
    with pytest.raises(ConfigError, match="no animal of this name; dgo; did you mean dog"):
        animals.get("dgo")
    with pytest.raises(ConfigError, match="no animal of this name; XXXX; choose one of cat, dog, emu"):
        animals.get("XXXX")


def test_an_unknown_name_says_how_to_make_it_known(animals):
    with pytest.raises(ConfigError, match=r"import its module first, or install it with an entry point of zoo$"):
        animals.get("ibis")
    animals.others = "a photograph"
    with pytest.raises(ConfigError, match="small_dog, or give a photograph; one of your own: import its module"):
        animals.get("ibis")


def test_two_things_of_one_name():
    registry = Registry("animal", "zoo")
    registry("cat")(1)
    with pytest.raises(ValueError, match="two kinds of animal of the name 'cat'"):
        registry("cat")(2)


def test_a_definition_that_is_run_again_counts_and_another_one_is_refused():
    registry, cell = Registry("animal", "dmjd.targets"), "@animal('cat')\ndef cat(): return {}"
    for sound in (1, 2):
        exec(cell.format(sound), {"animal": registry, "__name__": "notebook"})
    assert registry.get("cat")() == 2
    with pytest.raises(ValueError, match="two kinds of animal of the name 'cat'"):
        exec(cell.format(3), {"animal": registry, "__name__": "elsewhere"})
