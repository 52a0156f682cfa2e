"""Reconstructions and their scores, against plain formulas on the same images."""

import os
import sys
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision
from command_line import DDCONFIG, encdiff_config
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from ldm.data.rendered import RenderedTrain
from ldm.evaluation import fid as fid_module
from ldm.evaluation.fid import fid
from ldm.evaluation.reconstruction import reconstruct, reconstruction_scores
from ldm.models.autoencoder import AutoencoderKL, VQModel
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.util import UserError

IDENTITY = {"target": "torch.nn.Identity"}
QUIET: dict[str, Any] = {"progress": False}


class Rows:
    """A data set of some rows of another; notes which rows were asked for, and how many at once."""

    def __init__(self, dataset: Any, count: int) -> None:
        self.dataset, self.count, self.image_size = dataset, count, dataset.image_size
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return self.count

    def fetch(self, rows: Any) -> dict[str, torch.Tensor]:
        self.asked.append(list(rows))
        return self.dataset.fetch(rows)


class Perfect(torch.nn.Module):
    """A first stage that loses nothing."""

    device = torch.device("cpu")

    def encode(self, x):
        return x

    def decode(self, x):
        return x

    def reconstruct(self, x):
        return x, None


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """64 rooms of 16×16 pixels."""
    return RenderedTrain(tmp_path_factory.mktemp("small"), (4, 4, 4, 1, 1, 1), 16)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """8 rooms of 32×32 pixels."""
    return RenderedTrain(tmp_path_factory.mktemp("large"), (2, 2, 2, 1, 1, 1), 32)


@pytest.fixture
def vq() -> VQModel:
    torch.manual_seed(0)
    return VQModel(DDCONFIG, IDENTITY, n_embed=32, embed_dim=3).eval()


@pytest.fixture
def encdiff() -> LatentDiffusion:
    """A tiny EncDiff whose tokens reach its output, which those of an untrained one do not."""
    params = encdiff_config(Path())["model"]["params"]
    del params["first_stage_config"]["params"]["ckpt_path"]
    torch.manual_seed(1)
    model = LatentDiffusion(**params)
    for parameter in model.model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter.data, std=0.1)
    model.scale_factor.fill_(1.7)
    return model.eval()


def batch(dataset, rows) -> torch.Tensor:
    """Images (b, c, h, w) in [-1, 1]."""
    return dataset.fetch(rows)["image"].permute(0, 3, 1, 2).float() / 127.5 - 1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- reconstruct


def test_first_stages_encode_and_decode(vq, small):
    x = batch(small, range(4))
    with torch.no_grad():
        expected = vq.decode(vq.encode(x)[0]).clamp(-1, 1)
    assert torch.equal(reconstruct(vq, x), expected)
    assert not vq.codes_used.any()

    kl = AutoencoderKL({**DDCONFIG, "double_z": True}, IDENTITY, embed_dim=3)
    with torch.no_grad():
        posterior = kl.encode(x)
        noise = torch.randn(posterior.mean.shape, generator=seeded(5))
        expected = kl.decode(posterior.mean + posterior.std * noise).clamp(-1, 1)
    torch.testing.assert_close(reconstruct(kl, x, generator=seeded(5)), expected)


def test_encdiff_samples_from_noise_under_the_tokens_alone(encdiff, small, monkeypatch):
    x = batch(small, range(3))
    with torch.no_grad():
        tokens = encdiff.cond_stage_model(x)
        latents, _ = DDIMSampler(encdiff).sample(4, 3, (3, 8, 8), tokens, 1.0, generator=seeded(), verbose=False)
        expected = encdiff.first_stage_model.decode(latents / 1.7).clamp(-1, 1)
    monkeypatch.setattr(encdiff, "encode_first_stage", None)  # the latent of the image is not looked at
    made = reconstruct(encdiff, x, 4, generator=seeded())
    assert torch.equal(made, expected) and made.abs().max() <= 1
    assert not torch.equal(made, reconstruct(encdiff, x, 4, generator=seeded(1)))
    assert not torch.equal(made, reconstruct(encdiff, x, 4, 0.0, generator=seeded()))
    # Another image, the same noise: another sample.
    assert not torch.equal(made, reconstruct(encdiff, x.flip(0), 4, generator=seeded()))


def test_encdiff_samples_by_dpm_solver(encdiff, small):
    x = batch(small, range(3))
    with torch.no_grad():
        tokens = encdiff.cond_stage_model(x)
        latents, _ = DPMSolverSampler(encdiff).sample(20, 3, (3, 8, 8), tokens, 1.0, generator=seeded(), verbose=False)
        expected = encdiff.first_stage_model.decode(latents / 1.7).clamp(-1, 1)
    assert torch.equal(reconstruct(encdiff, x, generator=seeded(), sampler="dpm"), expected)  # 20 steps by itself
    found = reconstruction_scores(encdiff, small, 3, 3, lpips=None, sampler="dpm", **QUIET)
    assert "DPM-Solver++, 20 steps, eta 1, noise of seed 0 in batches of 3" in found["protocol"]


def test_every_module_returns_to_its_mode(encdiff, small):
    encdiff.train()
    encdiff.model.eval()
    before = [module.training for module in encdiff.modules()]
    running = encdiff.cond_stage_model.encoder[1].running_mean.clone()
    reconstruct(encdiff, batch(small, range(2)), 2)
    assert [module.training for module in encdiff.modules()] == before and encdiff.training
    assert torch.equal(encdiff.cond_stage_model.encoder[1].running_mean, running)
    with pytest.raises(UserError, match="built for images"):
        reconstruct(encdiff, torch.zeros(1, 3, 32, 32), 2)
    assert [module.training for module in encdiff.modules()] == before


def test_wrong_values_are_named(encdiff, vq, small):
    x = batch(small, range(2))
    for model, images, options, message in (
        (encdiff, x, {"steps": 0}, r"steps: expected 1 to 100.*got 0"),
        (encdiff, x, {"steps": 101}, r"steps: expected 1 to 100.*got 101"),
        (encdiff, x, {"eta": 1.5}, r"eta: .*1\.5"),
        (encdiff, x, {"steps": None}, r"steps: expected 1 to 100.*got 200"),
        (encdiff, x, {"sampler": "plms"}, "sampler: expected ddim or dpm, got 'plms'"),
        (encdiff, x[0], {}, r"images: .*\(3, 16, 16\)"),
        (encdiff, x.to(torch.uint8), {}, "images: .*uint8"),
        (torch.nn.Linear(1, 1), x, {}, "model: .*Linear"),
        (vq, x[:, :, :15, :15], {}, r"images: the model makes .*\(3, 15, 15\)"),
    ):
        with pytest.raises(UserError, match=message):
            reconstruct(model, images, **{"steps": 2, **options})
    params = encdiff_config(Path())["model"]["params"] | {"conditioning_key": "none", "cond_stage_config": None}
    del params["first_stage_config"]["params"]["ckpt_path"]
    with pytest.raises(UserError, match="no concept encoder"):
        reconstruct(LatentDiffusion(**params), x, 2)


# ---- scores


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al., 2004, Eq. 13) of one channel (h, w) in [0, 1]."""

    def blur(image):
        return gaussian_filter(image, 1.5, mode="mirror", truncate=3.5)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float((luminance * (2 * covariance + c2) / (var_a + var_b + c2)).mean())


def test_mse_and_ssim_by_hand(vq, small):
    rows = [0, 9, 18, 27, 36, 45, 54, 63]  # 8 of 64 at even distances
    found = reconstruction_scores(vq.train(), small, 8, 3, lpips=None, **QUIET)
    assert vq.training
    x = batch(small, rows)
    a, b = ((images.double().numpy() + 1) / 2 for images in (x, reconstruct(vq, x)))
    mse = ((a - b) ** 2).reshape(8, -1).mean(1)
    similarity = np.array(
        [[ssim(*pair) for pair in zip(*image, strict=True)] for image in zip(a, b, strict=True)]
    ).mean(1)
    assert found["mse"] == pytest.approx(mse.mean(), rel=1e-5)
    assert found["ssim"] == pytest.approx(similarity.mean(), abs=1e-5)
    assert found["mse_standard_error"] == pytest.approx(mse.std(ddof=1) / 8**0.5, rel=1e-4)
    assert found["ssim_standard_error"] == pytest.approx(similarity.std(ddof=1) / 8**0.5, rel=1e-3)
    assert found["images"] == 8 and not {"lpips", "lpips_standard_error"} & set(found)
    assert "8 of 64 images" in found["protocol"] and "16×16" in found["protocol"] and "LPIPS: none" in found["protocol"]


def test_a_perfect_first_stage(small):
    found = reconstruction_scores(Perfect(), small, 16, lpips=None, **QUIET)
    assert found["mse"] == 0 and found["mse_standard_error"] == 0
    assert found["ssim"] == pytest.approx(1, abs=1e-6)


def test_encdiff_scores_follow_the_seed(encdiff, small):
    data = Rows(small, 64)
    first, again = (reconstruction_scores(encdiff, data, 6, 4, steps=3, lpips=None, **QUIET) for _ in range(2))
    other = reconstruction_scores(encdiff, data, 6, 4, steps=3, seed=1, lpips=None, **QUIET)
    assert first == again and first["mse"] != other["mse"]
    assert [len(rows) for rows in data.asked[:2]] == [4, 2]
    # As DDIM does, 3 steps of 100 timesteps are 4.
    assert "DDIM, 4 steps, eta 1, noise of seed 0 in batches of 4" in first["protocol"]


# The layers of torchvision's `features` whose outputs are compared.
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}


def backbone(name: str) -> torch.nn.Sequential:
    """torchvision's layers up to the last that is compared, without VGG16's 124 million weights for classes."""
    if name == "alex":
        return torchvision.models.alexnet().features[: TAPS[name][-1] + 1]
    widths = (64, 64, "M", 128, 128, "M", *(256,) * 3, "M", *(512,) * 3, "M", *(512,) * 3)
    return torchvision.models.vgg.make_layers(list(widths))


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> dict[str, Path]:
    """Random weights of LPIPS's backbones in files of torchvision's layout."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("backbones")
    networks = {name: backbone(name) for name in TAPS}
    for name, network in networks.items():
        torch.save(network.state_dict(prefix="features."), folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in networks}


def lpips_by_hand(name: str, path: Path, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """LPIPS (Zhang et al., 2018, Eq. 1) on torchvision's own layers."""
    import torchmetrics.functional.image as shipped

    file = Path(shipped.__file__).parent / "lpips_models" / f"{name}.pth"
    heads = torch.load(file, map_location="cpu", weights_only=True)
    network = backbone(name)
    network.load_state_dict({k.removeprefix("features."): v for k, v in torch.load(path, weights_only=True).items()})
    total = torch.zeros(len(a))
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = ((images - shift[:, None, None]) / scale[:, None, None] for images in (a, b))
    for layer, module in enumerate(network):
        a, b = module(a), module(b)
        if layer in TAPS[name]:
            squares = (F.normalize(a) - F.normalize(b)) ** 2
            head = heads[f"lin{TAPS[name].index(layer)}.model.1.weight"].flatten()
            total += torch.einsum("bchw,c->bhw", squares, head).mean(dim=(1, 2))
    return total


@pytest.mark.parametrize("name", ["alex", "vgg"])
@torch.no_grad()
def test_lpips_by_hand(name, backbones, vq, large):
    state = torch.get_rng_state()
    found = reconstruction_scores(vq, large, 4, 3, lpips=name, lpips_weights=backbones[name], **QUIET)
    assert torch.equal(torch.get_rng_state(), state)
    x = batch(large, [0, 2, 5, 7])
    expected = lpips_by_hand(name, backbones[name], x, reconstruct(vq, x))
    assert found["lpips"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found["lpips_standard_error"] == pytest.approx(float(expected.std()) / 2, rel=1e-3)
    assert f"{name}.pth" in found["protocol"]
    if name == "alex":
        assert reconstruction_scores(Perfect(), large, 2, lpips_weights=backbones[name], **QUIET)["lpips"] == 0


def no_network(*arguments, **options):
    raise urllib.error.URLError("no network")


def test_weights_are_fetched_once_or_asked_for(backbones, vq, large, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    message = r"AlexNet's weights in .*alexnet-owt-7be5be79\.pth.*no network.*https://download.*--lpips-weights"
    with pytest.raises(UserError, match=message):
        reconstruction_scores(vq, large, 2, **QUIET)
    with pytest.raises(UserError, match=r"VGG16.*vgg16-397923af\.pth.*https://download"):
        reconstruction_scores(vq, large, 2, lpips="vgg", **QUIET)

    def fetch(url, target):
        Path(target).write_bytes(backbones["alex"].read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    first = reconstruction_scores(vq, large, 2, **QUIET)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    assert first == reconstruction_scores(vq, large, 2, **QUIET)
    assert (tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth").is_file()


@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_files_that_hold_other_things_are_refused(name, vq, large, tmp_path):
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    for file, cause in (("missing.pth", "No such file"), ("broken.pth", ""), ("other.pth", r"features\.0\.weight")):
        with pytest.raises(UserError, match=f"{file}.*{cause}.*--lpips none"):
            reconstruction_scores(vq, large, 2, lpips=name, lpips_weights=tmp_path / file, **QUIET)


def test_wrong_counts_are_named(vq, encdiff, small):
    for model, data, options, message in (
        (vq, small, {"images": 1}, "images: expected at least 2, got 1"),
        (vq, Rows(small, 1), {}, "images: expected at least 2, got 1"),
        (vq, small, {"lpips": "squeeze"}, "lpips: expected vgg, alex or None, got 'squeeze'"),
        (vq, small, {"lpips": "alex"}, "at least 31 pixels, not 16"),
        (encdiff, small, {"steps": 0}, "steps"),
    ):
        with pytest.raises(UserError, match=message):
            reconstruction_scores(model, data, **{"lpips": None, **QUIET, **options})


# ---- FID


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    """Random weights of torch-fidelity's Inception in a file."""
    torch_fidelity = pytest.importorskip("torch_fidelity")
    module = sys.modules["torch_fidelity.feature_extractor_inceptionv3"]
    network = torch_fidelity.FeatureExtractorInceptionV3
    torch.manual_seed(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *arguments, **options: {})
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        built = network("inception", ["2048"])
    for layer in built.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(built.state_dict(), path)
    return path


@pytest.fixture
def shallow(monkeypatch):
    """The first 64 features instead of the last 2,048: a tenth of the time."""
    monkeypatch.setattr(fid_module, "FEATURES", "64")


def features(path: Path, layer: str, images: torch.Tensor) -> np.ndarray:
    """Inception's features (n, d) of uint8 images (n, c, h, w)."""
    import torch_fidelity

    network = torch_fidelity.FeatureExtractorInceptionV3("x", [layer], feature_extractor_weights_path=str(path))
    return network(images)[0].double().numpy()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the Gaussians of two sets of features (n, d) (Heusel et al., 2017, Eq. 6).

    With covariances AᵀA and BᵀB, the trace of the root of their product is the sum of the singular values of ABᵀ, which
    is small and, unlike the product, regular.
    """
    spread = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b)]
    root = scipy.linalg.svdvals(spread[0] @ spread[1].T).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + sum((x**2).sum() for x in spread) - 2 * root


def uint8(dataset, rows) -> torch.Tensor:
    return dataset.fetch(rows)["image"].permute(0, 3, 1, 2)


@pytest.mark.slow
def test_fid_is_the_distance_of_two_gaussians(inception, shallow, small, tmp_path):
    """By hand, and by torch-fidelity's own entry point."""
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=seeded())
    data = Rows(small, 12)
    found = fid(images, data, weights=inception, batch_size=5, **QUIET)
    a, b = features(inception, "64", images), features(inception, "64", uint8(small, range(12)))
    assert found["fid"] == pytest.approx(distance(a, b), rel=1e-4)
    assert found["images"] == found["real_images"] == 12
    assert all(part in found["protocol"] for part in ("given, 16×16", "12 of 12", "inception.pth", "torch-fidelity 0."))

    import torch_fidelity

    sets = {"input1": List(images), "input2": List(uint8(small, range(12)))}
    options = {"feature_layer_fid": "64", "feature_extractor_weights_path": str(inception), "save_cpu_ram": True}
    theirs = torch_fidelity.calculate_metrics(**sets, **options, fid=True, cuda=False, cache=False, verbose=False)
    assert found["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


class List(torch.utils.data.Dataset):
    """Tensors as a data set."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


@pytest.mark.slow
def test_fid_on_the_last_layer(inception, small):
    """All 2,048 features."""
    images = uint8(small, [0, 20, 40])
    data = Rows(small, 3)
    found = fid(images.numpy(), data, weights=inception, **QUIET)["fid"]
    a, b = features(inception, "2048", images), features(inception, "2048", uint8(small, range(3)))
    assert found == pytest.approx(distance(a, b), rel=1e-3)


def test_fid_of_the_same_images_is_zero(inception, shallow, small):
    data = Rows(small, 10)
    assert fid(Perfect(), data, 10, weights=inception, **QUIET)["fid"] == pytest.approx(0, abs=1e-4)
    assert fid(Perfect(), data, 5, weights=inception, **QUIET)["fid"] > 1e-2  # the other five


@pytest.mark.slow
def test_fid_of_samples(inception, shallow, encdiff, small):
    data = Rows(small, 12)
    options = {"weights": inception, "steps": 2, "batch_size": 3, **QUIET}
    encdiff.train()
    state = torch.get_rng_state()
    found = fid(encdiff, data, 5, **options)
    assert encdiff.training and torch.equal(torch.get_rng_state(), state)
    asked = data.asked.copy()
    sources, reals = [*asked[0], *asked[1]], [*asked[2], *asked[3]]
    assert [len(rows) for rows in asked] == [3, 2, 3, 2]
    assert len({*sources, *reals}) == 10, "no image is in both"
    # The samples are those of `reconstruct`, rounded.
    generator = seeded()
    made = [reconstruct(encdiff, batch(small, rows), 2, generator=generator) for rows in asked[:2]]
    images = ((torch.cat(made) + 1) * 127.5).round().to(torch.uint8)
    a, b = features(inception, "64", images), features(inception, "64", uint8(small, reals))
    assert found["fid"] == pytest.approx(distance(a, b), rel=1e-4)
    assert "5 images (DDIM, 2 steps, eta 1, noise of seed 0 in batches of 3" in found["protocol"]

    assert fid(encdiff, data, 5, **options) == found
    data.asked.clear()
    assert fid(encdiff, data, 5, seed=1, **options)["fid"] != found["fid"]
    assert data.asked != asked, "the seed shuffles the set"
    by_dpm = fid(encdiff, data, 5, sampler="dpm", **options)
    assert "(DPM-Solver++, 2 steps, eta 1" in by_dpm["protocol"] and by_dpm["fid"] != found["fid"]
    assert fid(encdiff, Rows(small, 2), 3, real_images=9, **options)["real_images"] == 2


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_fid_says_what_is_missing(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch_fidelity", None)
        with pytest.raises(UserError, match=r'torch-fidelity: pip install -e "\.\[fid\]"'):
            fid(Perfect(), small, 2, **QUIET)
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(
        UserError, match=r"weights-inception-2015-12-05-6726825d\.pth.*https://github.com.*--inception-weights"
    ):
        fid(Perfect(), small, 2, **QUIET)
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "trap.pth")
    for name in ("other.pth", "trap.pth", "missing.pth"):
        with pytest.raises(UserError, match=f"Inception's weights.*{name}.*--inception-weights"):
            fid(Perfect(), small, 2, weights=tmp_path / name, **QUIET)
    assert not (tmp_path / "sprung").exists(), "nothing that a file holds is run"


def test_fid_refuses_wrong_values(encdiff, small):
    for model, options, message in (
        (Perfect(), {"images": 1}, "images: expected at least 2, got 1"),
        (Perfect(), {"real_images": 1}, "real_images: expected at least 2, got 1"),
        (encdiff, {"steps": 0}, "steps"),
        (torch.zeros(4, 3, 16, 16), {}, "images: expected uint8.*float32"),
        (torch.zeros(4, 16, 16, 3, dtype=torch.uint8), {}, r"images: expected.*\(4, 16, 16, 3\)"),
    ):
        with pytest.raises(UserError, match=message):
            fid(model, small, **QUIET, **options)
