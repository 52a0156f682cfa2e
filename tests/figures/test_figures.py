"""Each figure shows what it says: compared with the model's own methods, panel by panel."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.figures import attention, interpolation, matrices
from ldm.figures.draw import FIGURES, Kind, draw_figures
from ldm.figures.panels import to_pixels
from ldm.figures.subject import make_subject, pairs
from ldm.figures.traversals import VALUES
from ldm.models.diffusion.concepts import Concepts
from ldm.util import UserError

SIX = ["floor hue", "wall hue", "object hue", "scale", "shape", "orientation"]
DRAWING = {"steps": 2, "seed": 0}


def drawn(subject, name):
    """A figure's images, and the subject's model as it was meanwhile."""
    with subject.in_use():
        return FIGURES[name].draw(subject)


def close(pixels, images):
    """At most one step of 255 apart: batches of other sizes may round differently."""
    difference = np.abs(pixels.astype(int) - to_pixels(images).astype(int))
    assert difference.max() <= 1 and pixels.std() > 5


def test_subject(subject, dataset):
    """Images of the first row, the last and two between; every factor has a row; percentiles of the whole set."""
    rows = [0, 21, 42, 63]
    for image, row in zip(subject.images, rows, strict=True):
        torch.testing.assert_close(image, dataset[row]["image"].permute(2, 0, 1))
    np.testing.assert_array_equal(subject.factors, dataset.grid.factors(rows))
    assert [row.name for row in subject.rows()] == SIX
    scalars = subject.model.scalars(dataset.fetch(np.arange(64))["image"].numpy())
    np.testing.assert_allclose(subject.concepts.low, np.percentile(scalars, 1, axis=0), atol=1e-4)
    assert "EMA weights of the U-Net · step 1,234 · 2 steps of DPM-Solver++" in subject.note


# Images in each figure of four images of six factors, and its files; None: a plot, or checked elsewhere.
FILES = {
    "reconstructions": (3 * 4, ["png"]),
    "swaps": ((3 + 6) * 4, ["png"]),
    "traversals": (None, ["png", "gif"]),
    "attention": ((1 + 6) * 4, ["png"]),
    "interpolation": (7 * 9 + 2, ["png"]),
    "denoising": (3 * 2 * 2 + 3, ["png", "gif"]),
    "matrices": (None, ["png", "pdf"]),
    "bottleneck": (None, ["png", "pdf"]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_files_and_panels(name, subject, tmp_path, monkeypatch):
    """The right number of panels, in files that can be opened."""
    seen = []
    kind = FIGURES[name]
    monkeypatch.setitem(FIGURES, name, Kind(lambda subject: seen.append(kind.draw(subject)) or seen[0], kind.animate))
    files = draw_figures(subject, [name], tmp_path, dpi=60)
    count, kinds = FILES[name]
    assert [path.name for path in files[name]] == [f"{name}.{kind}" for kind in kinds]
    with Image.open(files[name][0]) as picture:
        assert min(picture.size) > 80
    if kinds[-1] == "pdf":
        assert files[name][1].read_bytes().startswith(b"%PDF")
    if kinds[-1] == "gif":
        with Image.open(files[name][1]) as moving:
            assert moving.n_frames == (2 * VALUES - 1 if name == "traversals" else 2)
    if name == "traversals":
        count = len({number for row in subject.rows() for number in row.concepts[:2]}) * VALUES
    if count is not None:
        assert seen[0].count == count and len(seen[0].rows) == seen[0].images.shape[0]


def test_reconstructions(subject, model):
    figure = drawn(subject, "reconstructions")
    with model.ema_scope():
        made = model.reconstruct(subject.images, **DRAWING)
    close(figure.images[0], subject.images)
    close(figure.images[2], made)
    error = np.square(made.numpy() / 2 - subject.images.numpy() / 2).mean()
    assert f"MSE {error:.4f}".replace(" 0.", " .") in figure.rows[2]


def test_swaps(subject, model):
    """Rows are the targets with a factor's concepts of the sources; nothing swapped is the reconstruction."""
    figure = drawn(subject, "swaps")
    sources, targets = (list(side) for side in zip(*pairs(subject), strict=True))
    source, target = subject.images[sources], subject.images[targets]
    close(figure.images[0], source)
    close(figure.images[1], target)
    close(figure.images[2], model.reconstruct(target, **DRAWING))
    for number, factor in enumerate(SIX, 3):
        chosen = subject.concepts.tokens[factor]
        close(figure.images[number], model.swap(target, source, list(chosen), **DRAWING))
        assert figure.rows[number].startswith(f"{factor}\nconcept")
        assert f"{subject.concepts.share[factor]:.0%}".replace("%", " %") in figure.rows[number]


def test_pairs_differ_in_as_many_factors_as_they_can(subject):
    for source, target in pairs(subject):
        differing = (subject.factors != subject.factors[target]).sum(axis=1)
        assert differing[source] == differing.max() > 0


def test_traversals(subject, model):
    figure = drawn(subject, "traversals")
    for row, label in enumerate(figure.rows):
        number = int(label.split("concept ")[1].split()[0])
        values = np.linspace(subject.concepts.low[number], subject.concepts.high[number], VALUES)
        close(figure.images[row], model.traverse(subject.images[2:3], number, values, **DRAWING)[0])
        assert [float(text.replace("−", "-")) for text in figure.captions[row]] == pytest.approx(values, abs=0.006)


def test_attention(subject, model):
    """The brightest place of a row's maps is where its tokens are attended to most."""
    figure = drawn(subject, "attention")
    maps = model.attention(subject.images, **DRAWING)
    for row, factor in enumerate(SIX, 1):
        summed = maps[:, list(subject.concepts.tokens[factor])].sum(dim=1)
        assert f"{summed.min():.2f} to {summed.max():.2f}".replace("0.", ".") in figure.rows[row]
        white = torch.ones(4, 3, 16, 16)
        scaled = (summed - summed.min()) / (summed.max() - summed.min())
        over_white = attention.overlaid(white, scaled)[..., 1]  # green rises with the colour map
        place = np.unravel_index(over_white.argmax(), over_white.shape)
        assert summed[place] > summed.max() - 0.02 * (summed.max() - summed.min())


def test_interpolation(subject, model):
    """From A to B; a factor's row begins at A, and ends at A with B's concepts."""
    figure = drawn(subject, "interpolation")
    source, target = pairs(subject)[2]
    a, b = subject.images[[target]], subject.images[[source]]
    close(figure.images[0, 0], a[0])
    close(figure.images[0, -1], b[0])
    close(figure.images[0, 1:-1][[0, -1]], model.reconstruct(torch.cat([a, b]), **DRAWING))
    for row, factor in enumerate(SIX, 1):
        close(figure.images[row, 1], model.reconstruct(a, **DRAWING)[0])
        close(figure.images[row, -2], model.swap(a, b, list(subject.concepts.tokens[factor]), **DRAWING)[0])
    vectors = torch.rand(2, 5, 3)
    way = interpolation.interpolated(vectors[0], vectors[1], [[1, 4]])[0]
    torch.testing.assert_close(way[-1, [1, 4]], vectors[1, [1, 4]])
    torch.testing.assert_close(way[:, [0, 2, 3]], vectors[0, [0, 2, 3]].expand(9, -1, -1))
    torch.testing.assert_close(way[4, 1], vectors[:, 1].mean(dim=0))


def test_denoising(subject, model):
    """What is predicted in the last step is the image."""
    figure = drawn(subject, "denoising")
    close(figure.images[1::2, 1], model.reconstruct(subject.images[:3], **DRAWING))
    close(figure.images[1::2, -1], subject.images[:3])
    times = model.sampler("dpm").plan(2, 0.0).timesteps[::-1]
    assert figure.columns == [f"t = {t}" for t in times] + ["image"]
    noise = figure.images[0::2, 0]
    assert (noise == noise[:1]).all(), "all start from the same noise"


def test_matrices_name_the_step_of_older_scores(model, dataset):
    matrix = np.eye(6)[:, [3, 1, 2, 0, 4, 5]][:4]
    record = {"step": 7, "factors": dict.fromkeys(SIX, 2), "matrices": {"dci": {"importance": matrix.tolist()}}}
    record["information"] = (matrix / 2).tolist()
    subject = make_subject(model, dataset, record, 4, step=9)
    figure = matrices.draw(subject)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert "DCI: importance, step 7" in titles and "mutual information (nats)" in titles
    image = figure.axes[0].images[0].get_array()
    np.testing.assert_array_equal(image[:, :4], np.eye(4), err_msg="sorted, it is diagonal")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["3", "1", "2", "0"]
    assert subject.concepts.tokens["floor hue"] == (3,), "matched by the record"
    other = make_subject(model, dataset, {**record, "factors": {"hue": 2}}, 4)
    assert list(other.matrices) == ["mig"], "a record of other data says nothing"


def test_of_many_attributes_there_is_one_matrix(subject):
    subject.names = [f"attribute_{k}" for k in range(40)]
    subject.matrices = {"dci": np.eye(4, 40), "tad": np.full((4, 40), 0.5), "mig": np.eye(4, 40)}
    figure = drawn(subject, "matrices")
    assert figure.axes[0].get_title(loc="left").startswith("TAD") and len(figure.axes) == 2  # and its scale


def test_bottleneck_has_the_four_schedules_and_the_models_own(subject):
    lines = {line.get_label(): line.get_xydata() for line in drawn(subject, "bottleneck").axes[0].lines}
    assert list(lines) == ["linear (this model's)", "cosine", "sqrt-linear", "sqrt"]
    assert all(np.isfinite(line).all() and len(line) == 99 for line in lines.values())


# ---- variants, and data without factors


def told(caplog, subject, folder, names=tuple(FIGURES)):
    """Figures that were drawn, and why the others were not."""
    caplog.set_level(logging.WARNING)
    files = draw_figures(subject, names, folder, dpi=40, everything=False)
    return sorted(files), [record.getMessage() for record in caplog.records]


def test_first_stages_have_reconstructions_alone(first_stage_model, dataset, tmp_path, caplog):
    subject = make_subject(first_stage_model, dataset, count=2)
    files, lines = told(caplog, subject, tmp_path)
    assert files == ["reconstructions"] and len(lines) == len(FIGURES) - 1
    assert "no swaps: VQModel has no concept tokens" in lines
    assert drawn(subject, "reconstructions").count == 4 and "DPM" not in subject.note


VARIANTS = {
    "adagn": {"attention": "cross attention"},
    "vector": {"traversals": "vectors", "matrices": "no scalars"},
    "no_diffusion": {"denoising": "one pass", "bottleneck": "noise schedule"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, variant, dataset, tmp_path, caplog):
    """What a variant does not have is said in a line each; all the rest is drawn."""
    subject = make_subject(variant(name), dataset, count=2, steps=2)
    files, lines = told(caplog, subject, tmp_path)
    assert files == sorted(set(FIGURES) - set(VARIANTS[name]))
    assert len(lines) == len(VARIANTS[name])
    for figure, reason in VARIANTS[name].items():
        assert any(line.startswith(f"no {figure}: ") and reason in line for line in lines), lines
    assert ("one pass" in subject.note) == (name == "no_diffusion")


class Pictures:
    """The rooms as a set without a grid."""

    def __init__(self, rooms):
        self.rooms, self.fetch = rooms, rooms.fetch

    def __len__(self):
        return len(self.rooms)

    def __getitem__(self, row):
        return self.rooms[row]


def test_without_factors_each_concept_has_a_row(model, dataset, tmp_path, caplog):
    subject = make_subject(model, Pictures(dataset), count=3, steps=2)
    concepts = [f"concept {n}" for n in range(4)]
    assert [row.name for row in subject.rows()] == concepts and subject.names == ()
    assert drawn(subject, "swaps").rows == ["source", "target", "nothing swapped", *concepts]
    assert drawn(subject, "traversals").count == 4 * VALUES
    assert all(source != target for source, target in pairs(subject))
    files, lines = told(caplog, subject, tmp_path, ["matrices"])
    assert files == [] and lines == ["no matrices: its data have no factors"]


def test_attributes_are_factors_too(model, dataset):
    """Of a labelled sample; two binary attributes."""
    pictures = Pictures(dataset)
    pictures.attributes, pictures.attribute_names = dataset.grid.factors(np.arange(64))[:, [1, 4]], ("Pale_Skin", "Hat")
    subject = make_subject(model, pictures, count=4, steps=2)
    assert [row.name for row in subject.rows()] == ["Pale Skin", "Hat"]
    assert subject.factors.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]] and subject.matrices["mig"].shape == (4, 2)
    assert pairs(subject) == [(3, 0), (2, 1), (1, 2), (0, 3)]


def test_many_attributes_go_to_the_rows_of_their_concepts(subject):
    tokens = {f"attribute_{k}": (k % 4,) for k in range(40)}
    subject.concepts = Concepts(tokens, dict.fromkeys(tokens, 0.5), (0.0,) * 4, (1.0,) * 4)
    rows = subject.rows()
    assert [row.name for row in rows] == [f"concept {n}" for n in range(4)]
    assert rows[1].about == "attribute 1\nattribute 5"


def test_what_is_drawn_is_the_ema(subject, model):
    """And the live weights where these are asked for; the model has its own ones again afterwards."""
    before = model.model.diffusion_model.out[2].weight.clone()
    with model.ema_scope(), torch.no_grad():
        expected = model.reconstruct(subject.images, **DRAWING)
    with torch.no_grad():
        model.model.diffusion_model.out[2].weight.mul_(3)
    try:
        close(drawn(subject, "reconstructions").images[2], expected)
        subject.live = True
        live = drawn(subject, "reconstructions").images[2]
        close(live, model.reconstruct(subject.images, **DRAWING))
        assert np.abs(live.astype(int) - to_pixels(expected)).max() > 5
    finally:
        with torch.no_grad():
            model.model.diffusion_model.out[2].weight.copy_(before)


def test_unknown_names(subject, tmp_path):
    with pytest.raises(UserError, match=r"there is no figure 'swap'; did you mean 'swaps'\?"):
        draw_figures(subject, ["matrices", "swap"], tmp_path)
    assert not list(tmp_path.iterdir())
