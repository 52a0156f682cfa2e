"""From configuration to objects: targets, keys, kinds of values."""

import re

import pytest
from omegaconf import DictConfig, OmegaConf

from ldm.factors import FactorGrid
from ldm.targets import allowing
from ldm.util import UserError, check_params, get_obj_from_str, instantiate_from_config, nearest

pytestmark = pytest.mark.usefixtures("own_classes")


class Base:
    def __init__(self, path: str, size: int = 3, rate: float = 0.5, flag: bool = False, free=None) -> None:
        self.path, self.size, self.rate, self.flag = path, size, rate, flag


class Derived(Base):
    def __init__(self, extra: int | None = 1, **kwargs) -> None:
        super().__init__(path="here", **kwargs)
        self.extra = extra


class Open:
    def __init__(self, **anything) -> None:
        self.anything = anything


def here(name: str) -> str:
    return f"{__name__}.{name}"


def test_instantiates_with_params():
    node = {"target": "ldm.factors.FactorGrid", "params": {"sizes": [2, 3]}}
    grid = instantiate_from_config(node, kind=FactorGrid)
    assert grid == FactorGrid((2, 3))
    node = OmegaConf.create({"target": here("Derived"), "params": {"size": 5}})
    made = instantiate_from_config(node, kind=Base)
    assert (made.size, made.extra, made.path) == (5, 1, "here")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("ldm.models.autoencodr.VQModel", "there is no module 'ldm.models.autoencodr'"),
        ("ldm.models.autoencoder.VQModle", "did you mean 'VQModel'"),
        ("nonsense", "expected a dotted name"),
        ("..x", "expected a dotted name"),
        (7, "expected a dotted name"),
        ("ldm.util.KINDS", "not a class"),
    ],
)
def test_unknown_targets(target, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        get_obj_from_str(target, "model.target")


def test_a_broken_module_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with allowing("broken_module"), pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        get_obj_from_str("broken_module.Thing")


@pytest.mark.parametrize(
    ("cls", "params", "message"),
    [
        (Base, {"sise": 3}, r"x\.params\.sise: unknown key for Base; did you mean 'size'"),
        (Derived, {"extar": 3}, "did you mean 'extra'"),
        (Derived, {"rte": 3}, "did you mean 'rate'"),
        (Base, {"size": "abc"}, r"x\.params\.size: expected a whole number, got 'abc'"),
        (Base, {"size": 2.5}, "whole number, got 2.5"),
        (Base, {"size": True}, "whole number, got True"),
        (Base, {"size": None}, "whole number, got None"),
        (Base, {"size": [1]}, r"whole number, got \[1\]"),
        (Base, {"rate": "fast"}, "a number, got 'fast'"),
        (Base, {"flag": 3}, "true or false, got 3"),
        (Base, {"path": 3}, "a string, got 3"),
        (Derived, {"extra": "x"}, "a whole number or null, got 'x'"),
        (Derived, {"size": "x"}, "a whole number, got 'x'"),
    ],
)
def test_wrong_keys_and_values(cls, params, message):
    with pytest.raises(UserError, match=message):
        check_params(cls, params, "x.params")
    with pytest.raises(UserError, match=message):
        instantiate_from_config(OmegaConf.create({"target": here(cls.__name__), "params": params}), "x", object)


def test_right_keys_and_values_pass():
    check_params(Base, {"path": "a", "size": 1, "rate": 1, "flag": True, "free": [1, 2]}, "x")
    check_params(Derived, {"extra": None, "rate": 0.1}, "x")
    check_params(Open, {"whatever": 1}, "x")


class Outer:
    def __init__(self, inner: dict, least: int = 1) -> None:
        if least < 1:
            raise UserError(f"expected at least 1, got {least}", "least")
        self.inner = instantiate_from_config(inner, "inner", object)


def outer(inner: dict, **params) -> DictConfig:
    return OmegaConf.create({"target": here("Outer"), "params": {"inner": inner, **params}})


def test_errors_have_the_full_name_of_the_key():
    grid = {"target": "ldm.factors.FactorGrid", "params": {"sizes": [2]}}
    assert instantiate_from_config(outer(grid), "model", Outer).inner == FactorGrid((2,))
    misspelled = {"target": here("Outer"), "params": {"inner": grid, "lest": 1}}
    for node, message in (
        (outer(grid, least=0), "model.params.least: expected at least 1, got 0"),
        (outer({**grid, "target": "ldm.factors.Grid"}), "model.params.inner.target: 'ldm.factors.Grid' is not"),
        (outer(misspelled), "model.params.inner.params.lest: unknown key for Outer; did you mean 'least'?"),
        (outer({"target": here("Outer"), "params": {"inner": 3}}), "inner.params.inner: expected the keys target"),
        (outer({**grid, "sizes": [3]}), "model.params.inner.sizes: unknown key .*; did you mean 'params.sizes'?"),
        (outer({**grid, "params": {"sizes": []}}), "model.params.inner (FactorGrid): a factor grid needs"),
        (outer({**grid, "params": {"sizes": "???"}}), "Missing mandatory value"),
    ):
        with pytest.raises(UserError, match=re.escape(message).replace(r"\.\*", ".*")):
            instantiate_from_config(node, "model", Outer)


def test_the_traceback_of_a_bug_is_kept():
    class Buggy:
        def __init__(self) -> None:
            None.shape  # type: ignore[attr-defined]  # noqa: B018

    globals()["Buggy"] = Buggy
    with pytest.raises(AttributeError, match="shape"):
        instantiate_from_config({"target": here("Buggy")}, kind=object)


def test_nearest():
    assert nearest("batch_sise", ["batch_size", "train"]) == "; did you mean 'batch_size'?"
    assert nearest("zzz", ["b", "a"]) == "; known here: a, b"
    assert nearest("zzz", []) == "; known here: nothing"
