"""report.html: what is gathered from log directories, and how it is shown."""

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from command_line import ROOT
from omegaconf import OmegaConf
from report_runs import configs, log_scalars, picture, quickstart, scored, scores, small, start, whole_run

from ldm.cli.configure import compose
from ldm.figures.report import matrix_table, render, write_report
from ldm.figures.report_data import gather
from ldm.util import UserError

VOID = {"meta", "link", "img", "br"}
DANGER = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text; elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.parts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(*logdirs: Path) -> Page:
    return Page(render([gather(logdir) for logdir in logdirs]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return whole_run(tmp_path_factory.mktemp("logs") / "2023-11-14T22-13-20_first")


# ---- what is gathered


def test_what_was_trained(whole):
    run = gather(whole)
    assert run["notes"] == [] and run["name"] == "first" and run["status"] == "finished"
    assert run["steps"] == 400 and run["images"] == 400 * 64
    assert run["seconds"] == 7 * 60
    assert run["speed"] == pytest.approx(640, rel=1e-3), "10 steps of 64 images per second, whatever the pause"
    text = page_of(whole).text
    for words in (
        "EncDiff (LatentDiffusion), 20 concepts, tokens of 16 numbers, 1,234,567 parameters",
        "RenderedTrain, 4,096 images of 32 × 32",
        "floor hue 3 × wall hue 2 × shape 4",
        "400 of 400 steps of 64 images: 25,600 seen",
        "7 min, from command to end, 640 images/s in training",
        "A processor, 2 cores",
        "0123abcd with changes that are not committed",
        "python 3.12.1, torch 2.9.0",
        "main_val.py --base configs/quickstart/encdiff.yaml -t",
        "checkpoints/last.ckpt",
    ):
        assert words in text, words


def test_losses_are_those_that_say_something(whole, caplog):
    caplog.set_level("INFO")
    found = dict(gather(whole)["quantities"])
    assert list(found) == ["loss_simple", "learning rate"], "no scores, no zeros, nothing twice"
    assert caplog.messages == []
    assert {kind: len(curve.steps) for kind, curve in found["loss_simple"].items()} == {
        "train": 8,
        "val": 2,
        "val, EMA": 2,
    }


def test_scores_over_steps(whole):
    page = page_of(whole)
    charts = [svg["aria-label"] for svg in page.of("svg") if svg.get("role") == "img"]
    assert charts[0] == "FactorVAE score over steps. live .650; EMA .650"
    assert charts[1] == "DCI over steps. live .325; EMA .325"
    assert "FactorVAE score train accuracy .750 .750 eval accuracy .650 .650 num active dims 4 4" in page.text
    assert "completeness – –" in page.text, "NaN is null in the file"


def test_differences_from_the_shipped_file(tmp_path):
    given = ["model.params.linear_end=0.03", "lightning.callbacks.image_logger.params.max_images=4"]
    command = f"python main_val.py -b configs/quickstart/encdiff.yaml -t --max_steps 7 {' '.join(given)}"
    config = quickstart(*given, "lightning.trainer.max_steps=7", "data.params.batch_size=8")
    resumed = start(2, "2023-11-15T00:00:00Z", command="python main_val.py -r logs/a -t data.params.batch_size=8")
    configs(tmp_path / "a", config, start(command=command), resumed)
    assert {key: (old, new) for key, old, new in gather(tmp_path / "a")["changes"]} == {
        "model.params.linear_end": ("0.0155", "0.03"),
        "data.params.batch_size": ("64", "8"),
        "lightning.trainer.max_steps": ("2000", "7"),
        "lightning.callbacks.image_logger.params.max_images": ("8", "4"),
    } | {k: v for k, v in _quickstart_image_logger().items() if v[0] != "8"}
    configs(tmp_path / "b", quickstart(), start())
    assert gather(tmp_path / "b")["changes"] == []
    assert "As in quickstart/encdiff.yaml." in page_of(tmp_path / "b").text
    configs(tmp_path / "c", quickstart(), start(command="python main_val.py --base my.yaml -t"))
    assert gather(tmp_path / "c")["shipped"] == [] and "whole configuration" in page_of(tmp_path / "c").text


def _quickstart_image_logger() -> dict:
    found = OmegaConf.load(ROOT / "configs" / "quickstart" / "encdiff.yaml")
    value = OmegaConf.select(found, "lightning.callbacks.image_logger.params.max_images")
    return {"lightning.callbacks.image_logger.params.max_images": (str(value or "(not set)"), "4")}


def test_the_papers_numbers_beside_a_run_of_the_papers_values_only(tmp_path):
    names = ["latent-diffusion/shapes3d-vq-4-16", "ablations/paper"]
    sizes = dict(zip(("a", "b", "c", "d", "e", "f"), (10, 10, 10, 8, 4, 15), strict=True))
    for folder, overlays in (("other", []), ("pixel", ["ablations/pixel"])):
        config = compose([ROOT / "configs" / f"{name}.yaml" for name in (*names, *overlays)], complete=False)
        if folder == "other":
            config.model.params.loss_type = "l1"
        configs(tmp_path / folder, config, start())
        scores(tmp_path / folder, scored(100, factors=sizes))
    texts = {name: page_of(tmp_path / name).text for name in ("other", "pixel")}
    assert "paper 1.000" in texts["pixel"] and ".981 ± .015" in texts["pixel"]
    assert not re.search(r"± \.|\.969|\.930", texts["other"])
    assert (
        "The paper's numbers are for other values: model.params.loss_type is l1, and l2 in the paper" in texts["other"]
    )


def test_resumed_twice_the_time_between_does_not_count(tmp_path):
    starts = [
        start(1, end={"how": "SIGTERM", "steps": 30, "at": "2023-11-14T22:13:50Z"}),
        start(2, "2023-11-14T23:13:20Z"),  # killed
        start(3, "2023-11-15T00:13:20Z", end={"how": "SIGINT", "steps": 90, "at": "2023-11-15T00:13:40Z"}),
    ]
    configs(tmp_path, small(), *starts)
    (tmp_path / "log.txt").write_text("2023-11-14T23:13:25Z INFO step\na line\n2023-11-15T00:13:30Z INFO step\n")
    run = gather(tmp_path)
    assert run["seconds"] == 30 + 5 + 20 and run["status"] == "stopped by SIGINT" and run["steps"] == 90
    assert "55 s in 3 starts, from command to end" in page_of(tmp_path).text


def test_without_a_recorded_end_the_log_tells_it(tmp_path):
    configs(tmp_path, small(), start())
    for line, status in (
        ("INFO stopped; saved logs/a/checkpoints/last.ckpt. Resume with -r logs/a", "stopped"),
        ("ERROR error: no space", "ended by an error"),
        ("INFO logging to logs/a", ""),
    ):
        (tmp_path / "log.txt").write_text(f"2023-11-14T23:13:25Z {line}\n")
        assert gather(tmp_path)["status"] == status


def test_figures_or_else_the_newest_pictures(tmp_path):
    for step, name in ((1, "inputs"), (20, "inputs"), (20, "swap")):
        picture(tmp_path / "images" / "train" / f"{name}_gs-{step:06}_e-000000.png")
    assert [p["name"] for p in gather(tmp_path)["pictures"]] == ["inputs", "swap"]
    for step in ("000900", "001000"):
        picture(tmp_path / "images" / "figures" / step / "attention.png")
    found = gather(tmp_path)["pictures"]
    assert [(p["name"], p["caption"].rpartition(", ")[2]) for p in found] == [("attention", "step 1,000")]
    picture(tmp_path / "figures" / "swaps.png")
    picture(tmp_path / "figures" / "matrices.png")
    found = gather(tmp_path)["pictures"]
    assert [p["name"] for p in found] == ["swaps", "attention"], "the page has matrices of its own"
    assert [p["caption"].rpartition(", ")[2] for p in found][1] == "step 1,000" and "step" not in found[0]["caption"]


# ---- how it is shown


def test_everything_is_text(tmp_path):
    logdir = tmp_path / f"2023-11-14T22-13-20_{DANGER.replace('/', '')}"
    config = quickstart()
    config.model.params.monitor = DANGER
    configs(logdir, config, start(command=f"python main_val.py {DANGER!r}", host=DANGER, versions={DANGER: DANGER}))
    record = scored(10, factors={DANGER: 3, "b": 2, "c": 4})
    record["scores"][DANGER] = {DANGER: 0.5}
    scores(logdir, record)
    log_scalars(logdir, {f"train/{DANGER.replace('/', '')}": [(1, 0.5, 1.0), (2, 0.25, 2.0)]})
    picture(logdir / "figures" / f"{DANGER.replace('/', '')}.png")
    (logdir / "metrics" / f"{DANGER.replace('/', '')}.json").write_text("{")
    for logdirs in ([logdir], [logdir, logdir]):
        page = page_of(*logdirs)
        assert not page.of("script") and len(page.of("img")) == len(logdirs)
        assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
        assert all(image["src"].startswith("data:image/png;base64,") for image in page.of("img"))
        assert page.text.count("alert(1)") > 5


def test_rows_of_a_matrix_are_sorted(tmp_path):
    table = matrix_table([[0.0, 0.0], [0.0, 0.9], [0.3, 0.1], [0.6, 0.2]], ["a", "b"])
    assert [n for n, _ in table["rows"]] == [3, 2, 1, 0]
    assert table["rows"][2][1] == [(".00", 0.0), (".90", 1.0)]
    shuffled = np.random.default_rng(0).permutation(5)
    rows = [n for n, _ in matrix_table(np.eye(5)[shuffled].tolist(), [])["rows"]]
    assert np.array_equal(np.eye(5)[shuffled][rows], np.eye(5))
    chance = matrix_table([[0.5, 1.0], [0.1, 0.5]], ["a", "b"], chance=True)
    assert [[shade for _, shade in cells] for _, cells in chance["rows"]] == [[0.8, 0.0], [0.0, 1.0]]
    for values in (None, [], [1, 2], [[1, 2], [3]], "text", [["a"]], {}):
        assert matrix_table(values, ["a"]) is None


def test_several_runs_side_by_side(whole, tmp_path):
    other = whole_run(tmp_path / "2023-11-15T00-00-00_second", 0.25, "model.params.loss_type=l2")
    page = page_of(whole, other)
    charts = [svg["aria-label"] for svg in page.of("svg") if svg.get("role") == "img"]
    assert (
        charts[0]
        == "FactorVAE score over steps. first, live .650; first, EMA .650; second, live .650; second, EMA .650"
    )
    assert "first, training 0.625" in charts[2] and "second, training 0.312" in charts[2]
    assert [image["alt"].partition(":")[0] for image in page.of("img")] == [
        f"{title} of {run}" for title in ("Swapped concepts", "Traversals, moving,") for run in ("first", "second")
    ]
    assert "model.params.loss_type l1 l2" in page.text
    assert "The same in all" in page.text and "2 runs of EncDiff" in page.text
    assert len({attributes["class"] for attributes in page.of("path") if "line c" in attributes.get("class", "")}) >= 4


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [tmp_path / f"2023-11-1{day}T00-00-00_a" for day in (4, 5)]
    for folder in folders:
        configs(folder, small(), start())
    text = page_of(*folders).text
    assert all(folder.name in text for folder in folders)


# ---- what is missing or damaged


def test_next_to_nothing_is_enough(tmp_path):
    assert "Configuration" in page_of(tmp_path).text, "an empty folder"
    configs(tmp_path / "b", small(), start(end={"how": "SIGINT", "steps": 1, "at": "2023-11-14T22:13:21Z"}))
    page = page_of(tmp_path / "b")
    assert "stopped by SIGINT" in page.text and "1 of 4,000 steps of 64 images: 64 seen" in page.text
    assert gather(tmp_path / "b")["notes"] == []


@pytest.mark.parametrize(
    ("path", "content", "told"),
    [
        ("metrics/000400.json", b'{"scores": {"dci"', "metrics/000400.json is damaged"),
        ("metrics/000400.json", b"[1, 2]", "metrics/000400.json is damaged"),
        ("configs/0-run.json", b"\xff\xfe", "configs/0-run.json is damaged"),
        ("configs/0-project.yaml", b"model: [", "the configuration cannot be shown"),
        ("figures/swaps.png", b"\x89PNG\r\n\x1a\nno picture", "figures/swaps.png is damaged"),
        ("tensorboard/events.out.tfevents.1.a", b"\x00" * 40, ""),
    ],
)
def test_damaged_pieces_cost_themselves(tmp_path, path, content, told):
    logdir = whole_run(tmp_path / "a")
    (logdir / path).write_bytes(content)
    run = gather(logdir)
    assert len(run["notes"]) == bool(told) and all(note.startswith(told) for note in run["notes"])
    text = page_of(logdir).text
    assert told in text and "FactorVAE score" in text and "loss_simple" in text
    assert ("400 of 400 steps" in text) == (path != "configs/0-project.yaml")


ODD = (None, "text", -1, 1e400, True, [], {}, [[]], {"a": {"b": []}}, [{"a": None}], {"at": 1, "how": 2, "steps": "x"})


def test_odd_values_anywhere(tmp_path):
    """Each value of the records replaced by others that do not belong there: there is a page every time."""
    config, own = small(), {"command": "python main_val.py --base my.yaml -t"}
    configs(tmp_path, config, start(end={"how": "finished", "steps": 4, "at": "2023-11-14T22:20:20Z"}, **own))
    scores(tmp_path, scored(10))
    for path in (tmp_path / "configs" / "0-run.json", tmp_path / "metrics" / "000010.json"):
        record = json.loads(path.read_text())
        for turn in range(len(ODD)):
            odd = {key: ODD[(turn + place) % len(ODD)] for place, key in enumerate(record)}
            path.write_text(json.dumps(odd | ({"scores": record["scores"]} if "scores" in record and turn % 2 else {})))
            page_of(tmp_path)
        path.write_text(json.dumps(record))
    record, values = scored(10), (*ODD, 10**400, -(10**20), 1e308, 0)
    for turn in range(0, len(values), 3):
        for kind in ("scores", "scores_of_ema"):
            for number, entry in enumerate(record[kind]["dci"]):
                record[kind]["dci"][entry] = values[(turn + number) % len(values)]
        record["matrices"]["dci"]["importance"] = [[value, 0.5] for value in values[turn : turn + 3]]
        record["factors"] = dict.fromkeys("ab", values[turn])
        scores(tmp_path, record)
        page_of(tmp_path)
    keys = ("model.params", "data", "model.target", "data.params.train", "model.params.unet_config")
    for key, value in zip(keys, (None, "text", [1], {"a": "${nowhere}"}, 3), strict=True):
        OmegaConf.update(changed := config.copy(), key, value, merge=False, force_add=True)
        configs(tmp_path, changed, start(**own))
        page_of(tmp_path)


# ---- files


def test_writing(whole, tmp_path):
    path = tmp_path / "new" / "page.html"
    write_report([whole], path)
    assert Page(path.read_text(encoding="utf-8")).of("title") and list(path.parent.iterdir()) == [path]
    with pytest.raises(UserError, match="no run"):
        write_report([], path)


def test_the_script(whole, tmp_path, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("report_script", ROOT / "scripts" / "report.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.chdir(tmp_path)
    script.main([str(whole), str(whole), "--out", "two.html"])
    assert capsys.readouterr().out.strip() == "two.html" and (tmp_path / "two.html").is_file()
    script.main([str(whole)])
    assert (whole / "report.html").is_file()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no runs in empty"):
        script.main(["empty"])
    with pytest.raises(UserError, match="is a folder"):
        script.main([str(whole), "--out", "empty"])
