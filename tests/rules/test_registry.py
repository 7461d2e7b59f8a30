"""Rules by name, and modules that bring some of their own."""

import sys

import pytest

import ds_zoadamu
from ds_zoadamu.rules import RULES, MeZO, Rule, import_modules, origin, register

MODULE = """
from ds_zoadamu import register
from ds_zoadamu.rules import MeZO

@register
class Brought(MeZO):
    pass
"""


@pytest.fixture
def known():
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def test_a_name_belongs_to_one_rule(known):
    with pytest.raises(ds_zoadamu.ConfigError, match="a rule named 'MeZO' is registered already, by ds_zoadamu.rules.mezo;"):
        register(type("MeZO", (Rule,), {}))
    assert RULES["MeZO"] is MeZO


def test_a_module_of_ones_own_is_imported_from_the_working_directory(tmp_path, monkeypatch, known):
    (tmp_path / "brought_rules.py").write_text(MODULE)
    (tmp_path / "broken_rules.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    paths = list(sys.path)
    import_modules(["brought_rules"])
    assert origin(RULES["Brought"]) == "brought_rules" and origin(MeZO) is None
    with pytest.raises(ds_zoadamu.ConfigError, match="--import broken_rules: ZeroDivisionError: division by zero"):
        import_modules(["broken_rules"])
    with pytest.raises(ds_zoadamu.ConfigError, match="--import nowhere_rules: ModuleNotFoundError"):
        import_modules(["nowhere_rules"])
    assert sys.path == paths
