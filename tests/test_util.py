"""From configuration to objects: targets, keys, kinds of values."""

import pytest
from omegaconf import OmegaConf

from ldm.factors import FactorGrid
from ldm.util import RENAMED, RENAMED_MODULES, UserError, check_keys, get_obj_from_str, instantiate_from_config, nearest


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
    grid = instantiate_from_config({"target": "ldm.factors.FactorGrid", "params": {"sizes": [2, 3]}})
    assert grid == FactorGrid((2, 3))
    node = OmegaConf.create({"target": here("Derived"), "params": {"size": 5}})
    made = instantiate_from_config(node)
    assert (made.size, made.extra, made.path) == (5, 1, "here")
    assert instantiate_from_config({"target": "collections.OrderedDict"}) == {}


@pytest.mark.parametrize("target", sorted(RENAMED))
def test_names_of_the_original_resolve(target):
    assert get_obj_from_str(target).__module__.startswith(("ldm.", "pytorch_lightning."))


def test_modules_of_the_original_resolve():
    assert get_obj_from_str("ldm.data.disdata.Shapes3DTrain").__module__ == "ldm.data.dis"
    assert set(RENAMED_MODULES) == {"ldm.data.disdata"}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("ldm.models.autoencodr.VQModel", "there is no module 'ldm.models.autoencodr'"),
        ("ldm.models.autoencoder.VQModle", "did you mean 'VQModel'"),
        ("ldm.data.disdata.FFHQTrain", "'ldm.data.disdata.FFHQTrain' is a data set of the release that is not part"),
        ("nonsense", "expected a dotted name"),
        ("..x", "expected a dotted name"),
        (7, "expected a dotted name"),
        ("ldm.util.RENAMED", "no class or function"),
    ],
)
def test_unknown_targets(target, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        get_obj_from_str(target, "model.target")


def test_a_broken_module_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        get_obj_from_str("broken_module.Thing")


@pytest.mark.parametrize(
    ("cls", "params", "message"),
    [
        (Base, {"sise": 3}, r"x\.params: unknown key 'sise' for Base; did you mean 'size'"),
        (Derived, {"extar": 3}, "did you mean 'extra'"),
        (Derived, {"rte": 3}, "did you mean 'rate'"),
        (Base, {"size": "abc"}, r"x\.params\.size: expected a whole number, got 'abc'"),
        (Base, {"size": 2.5}, "whole number, got 2.5"),
        (Base, {"size": True}, "whole number, got True"),
        (Base, {"size": None}, "whole number, got None"),
        (Base, {"size": [1]}, r"whole number, got \[1\]"),
        (Base, {"rate": "fast"}, "a number, got 'fast'"),
        (Base, {"flag": 3}, "true or false, got 3"),
        (Base, {"path": 3}, "a text, got 3"),
        (Derived, {"extra": "x"}, "a whole number or null, got 'x'"),
        (Derived, {"size": "x"}, "a whole number, got 'x'"),
    ],
)
def test_wrong_keys_and_values(cls, params, message):
    with pytest.raises(UserError, match=message):
        check_keys(cls, params, "x.params")
    with pytest.raises(UserError, match=message):
        check_keys(cls, OmegaConf.create(params), "x.params")


def test_right_keys_and_values_pass():
    check_keys(Base, {"path": "a", "size": 1, "rate": 1, "flag": True, "free": [1, 2]}, "x")
    check_keys(Derived, {"extra": None, "rate": 0.1}, "x")
    check_keys(Open, {"whatever": 1}, "x")
    check_keys(Base, ["path", "size"], "x")


def test_errors_in_building_name_the_node():
    with pytest.raises(UserError, match=r"grid \(FactorGrid\): a factor grid needs"):
        instantiate_from_config({"target": "ldm.factors.FactorGrid", "params": {"sizes": []}}, "grid")
    with pytest.raises(UserError, match=r"grid: expected a node with 'target'"):
        instantiate_from_config({"traget": "x"}, "grid")
    node = OmegaConf.create({"target": "ldm.factors.FactorGrid", "params": {"sizes": "???"}})
    with pytest.raises(UserError, match=r"grid\.params\.sizes is left as \?\?\?"):
        instantiate_from_config(node, "grid")


def test_nearest():
    assert nearest("batch_sise", ["batch_size", "train"]) == "; did you mean 'batch_size'?"
    assert nearest("zzz", ["b", "a"]) == "; known here: a, b"
    assert nearest("zzz", []) == ""
