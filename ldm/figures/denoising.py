"""The way from noise to an image: x_t, and the x_0 that is predicted from it."""

import numpy as np
import torch

from ldm.figures.panels import Panels, to_pixels
from ldm.figures.subject import NotShown, Subject

COLUMNS, IMAGES, MOVING = 8, 3, 6


def draw(subject: Subject) -> Panels:
    """Two rows per image, decoded: x_t, and the predicted x_0, from the noisiest timestep to the last."""
    times, noisy, clean = way(subject, IMAGES)
    chosen = np.linspace(0, len(times) - 1, min(COLUMNS, len(times))).round().astype(int)
    rows, labels = [], []
    for image in range(len(subject.images[:IMAGES])):
        for name, states in (("x_t", noisy), ("predicted x_0", clean)):
            rows.append([*states[chosen, image], to_pixels(subject.images[image])])
            labels.append(name.replace("x_t", "xₜ").replace("x_0", "x₀"))
    pixels = np.array(rows)
    blank = {(row, len(chosen)) for row in range(0, len(rows), 2)}
    columns = [*(f"t = {times[n]}" for n in chosen), "image"]
    after = range(1, len(rows) - 1, 2)
    title = "Denoising under an image's tokens"
    return Panels(pixels, labels, columns, title=title, note=subject.note, blank=blank, after=tuple(after))


def animate(subject: Subject) -> list[Panels]:
    """A frame per step."""
    times, noisy, clean = way(subject, MOVING)
    frames = []
    for number, t in enumerate(times):
        pixels = np.stack([noisy[number], clean[number]])
        note = f"t = {t} · {subject.note}"
        frames.append(Panels(pixels, ["xₜ", "predicted x₀"], title="Denoising", note=note, width=4.5))
    return frames


def way(subject: Subject, count: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Timesteps (s,) in the order of their visit, x_t and the x_0 predicted from it (s, b, h, w, 3) uint8."""
    subject.require_tokens()
    if subject.one_pass:
        raise NotShown("the tokens are decoded in one pass, without noise")
    model = subject.model
    sampler, tokens = model.sampler("dpm"), model.tokens(subject.images[:count]).to(model.device)
    shape = (model.channels, model.image_size, model.image_size)
    generator = torch.Generator(model.device).manual_seed(subject.seed)
    start = torch.randn(1, *shape, generator=generator, device=model.device).expand(len(tokens), *shape)
    options = {"x_T": start, "log_every_t": 1, "verbose": False}
    _, found = sampler.sample(subject.steps, len(tokens), shape, tokens, **options)
    times = [int(t) for t in sampler.plan(subject.steps, 0.0).timesteps[::-1]]
    # The first entry of both is the noise; x_t is what there was before each step.
    noisy, clean = (torch.cat(states) for states in (found["x_inter"][:-1], found["pred_x0"][1:]))
    decoded = [to_pixels(model.decode_first_stage(states)) for states in (noisy, clean)]
    noisy_pixels, clean_pixels = (pixels.reshape(len(times), len(tokens), *pixels.shape[1:]) for pixels in decoded)
    return times, noisy_pixels, clean_pixels
