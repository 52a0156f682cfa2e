"""Pictures of a trained EncDiff: reconstructions, samples, denoising rows, the swap grid."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, repeat

from ldm.bars import bar
from ldm.signals import Stopped

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

# What the pictures show, where LDM's name says it only to those who know the code: for files, loggers and bars.
# `log_images` keeps LDM's names, which users' own code asks for.
NAMES = {
    "reconstruction": "first_stage_reconstruction",
    "samples": "encdiff_reconstruction",
    "samples_x0_quantized": "encdiff_reconstruction_quantized",
    "samples_inpainting": "encdiff_inpainting",
}


def _grid(images: torch.Tensor) -> torch.Tensor:
    """(rows, columns, c, h, w) -> one picture (1, c, rows·h, columns·w)."""
    return rearrange(images, "r n c h w -> 1 c (r h) (n w)")


def swap_tokens(tokens: torch.Tensor, source: int = 0) -> torch.Tensor:
    """Every image's tokens with one token taken from the source image, for each token in turn.

    Args:
        tokens: (b, n, d).
        source: number of the image that the token is taken from.

    Returns:
        (n, b, n, d): entry (k, i) is image i with token k of the source.
    """
    count = tokens.shape[1]
    swapped = repeat(tokens, "b n d -> k b n d", k=count).clone()
    for k in range(count):
        swapped[k, :, k] = tokens[source, k]
    return swapped


@torch.no_grad()
def diffusion_images(
    model: "LatentDiffusion",
    batch: Mapping[str, torch.Tensor],
    N: int = 8,
    n_row: int = 4,
    sample: bool = True,
    ddim_steps: int | None = 200,
    ddim_eta: float = 1.0,
    sampler: str = "ddim",
    dpm_steps: int = 20,
    plot_denoise_rows: bool = True,
    plot_progressive_rows: bool = False,
    plot_diffusion_rows: bool = False,
    sample_swap: bool = True,
    swap_images: int = 5,
    inpaint: bool = False,
    quantize_denoised: bool = False,
    plot_ema: bool = True,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """What the model makes of a batch of images.

    Args:
        batch: images (b, h, w, c) in [-1, 1]; the first `N` are used.
        sample: sample from each image's tokens. ddim_steps: of DDIM; None, which in LDM means sampling without DDIM,
            takes one step per timestep. ddim_eta: η, of either sampler.
        sampler: `ddim`, or `dpm` for DPM-Solver++, which takes `dpm_steps`.
        n_row: number of images shown in rows over time.
        plot_denoise_rows: x_t on its way from noise to the sample, if there is one. plot_progressive_rows: the
            predicted x_0 meanwhile.
        plot_diffusion_rows: the forward process.
        sample_swap: the swap grid. The first row shows `swap_images` images; in row k + 1 each is sampled from its own
            tokens except token k, which comes from the first image. All cells start from the same noise.
        inpaint: mask the middle, and fill it in. quantize_denoised: also sample with x_0 passed through the codebook.
        plot_ema: use the EMA weights.
        generator: source of the random numbers.
        progress: show a bar.

    Returns:
        Pictures (b, c, h, w) in [-1, 1] by LDM's names; `NAMES` says what they show.

    Raises:
        UserError: another sampler.
        Stopped: by a signal; its `pictures` are those that were finished.
    """
    x = model.get_input(batch, model.first_stage_key)[:N].to(model.device)
    source = model.get_input(batch, model.cond_stage_key)[:N].to(model.device)
    count, n_row = len(x), min(n_row, len(x))
    shape = (model.channels, model.image_size, model.image_size)
    z = model.get_first_stage_encoding(model.encode_first_stage(x))
    pictures = {"inputs": x, "reconstruction": model.decode_first_stage(z)}
    chosen = model.sampler(sampler)
    steps = min((ddim_steps if sampler == "ddim" else dpm_steps) or model.num_timesteps, model.num_timesteps)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=model.device, dtype=z.dtype)

    def draw(name: str, tokens: torch.Tensor | None, size: int, **options):
        options = {"eta": ddim_eta, "generator": generator, "log_every_t": model.log_every_t} | options
        return chosen.sample(steps, size, shape, tokens, verbose=False, callback=shown.begin(name), **options)

    if plot_diffusion_rows:
        times = torch.linspace(0, model.num_timesteps - 1, 6).long().to(model.device)
        noised = [model.q_sample(z[:n_row], t.expand(n_row), noise(n_row, *shape)) for t in times]
        rows = [model.decode_first_stage(step) for step in noised]
        pictures["diffusion_row"] = _grid(torch.stack(rows, dim=1))

    rows_over_time = {"denoise_row": plot_denoise_rows, "progressive_row": plot_progressive_rows}
    rows_over_time["denoise_row"] &= sample  # as in LDM
    wanted = {
        "samples": sample or plot_progressive_rows,
        "samples_x0_quantized": quantize_denoised,
        "samples_inpainting": inpaint,
    }
    shown = _DrawingBar(model, steps, progress)
    was_training = model.training
    model.eval()
    try:
        with model.ema_scope() if plot_ema else torch.no_grad():
            tokens = model.get_learned_conditioning(source) if model.conditioned else None
            swapped = min(swap_images, count) if sample_swap and tokens is not None else 0
            cells = {"swap": swapped * tokens.shape[1]} if tokens is not None and swapped else {}
            shown.expect({name: count for name in wanted if wanted[name]} | cells)
            if wanted["samples"]:
                latents, way = draw("samples", tokens, count)
                pictures["samples"] = model.decode_first_stage(latents)
                for name, key in (("denoise_row", "x_inter"), ("progressive_row", "pred_x0")):
                    if rows_over_time[name]:
                        rows = [model.decode_first_stage(step[:n_row]) for step in way[key]]
                        pictures[name] = _grid(torch.stack(rows, dim=1))
            if quantize_denoised:
                latents, _ = draw("samples_x0_quantized", tokens, count, quantize_x0=True)
                pictures["samples_x0_quantized"] = model.decode_first_stage(latents)
            if inpaint:
                mask = torch.ones(count, 1, *shape[1:], device=model.device)
                quarter = model.image_size // 4
                mask[:, :, quarter:-quarter, quarter:-quarter] = 0
                latents, _ = draw("samples_inpainting", tokens, count, mask=mask, x0=z)
                pictures["samples_inpainting"] = model.decode_first_stage(latents)
            if tokens is not None and swapped:
                pictures["swap"] = _swap_grid(model, x, tokens, swapped, draw, noise(1, *shape))
    except Stopped as stop:
        stop.pictures = pictures
        raise
    finally:
        shown.close()
        model.train(was_training)
    return pictures


class _DrawingBar:
    """One bar for all pictures that are sampled: which is drawn, of how many, and the time that is left for them."""

    def __init__(self, model: "LatentDiffusion", steps: int, progress: bool) -> None:
        self.steps, self.sizes, self.names = steps, dict[str, int](), model.picture_names
        self.shown = bar(total=1, progress=progress, desc="drawing")

    def expect(self, sizes: dict[str, int]) -> None:
        """How many images are sampled for each picture."""
        self.sizes = sizes
        self.shown.total = self.steps * sum(sizes.values())

    def begin(self, name: str) -> Callable[[int], None]:
        """The next picture; gives what the sampler calls after each step."""
        place, said = list(self.sizes).index(name) + 1, self.names.get(name, f"{name} grid").replace("_", " ")
        self.shown.set_description(f"drawing {said}, picture {place} of {len(self.sizes)}")
        return lambda done: self.shown.update(self.sizes[name] if done < self.steps else 0)

    def close(self) -> None:
        """All are drawn."""
        self.shown.close()


def _swap_grid(
    model: "LatentDiffusion", x: torch.Tensor, tokens: torch.Tensor, count: int, draw: Any, start: torch.Tensor
) -> torch.Tensor:
    """The swap grid as one picture (1, c, (n + 1)·h, count·w)."""
    swapped = rearrange(swap_tokens(tokens[:count]), "k b n d -> (k b) n d")
    latents, _ = draw("swap", swapped, len(swapped), x_T=start.expand(len(swapped), -1, -1, -1), eta=0.0)
    rows = rearrange(model.decode_first_stage(latents), "(k b) c h w -> k b c h w", b=count)
    return _grid(torch.cat([x[None, :count], rows]))
