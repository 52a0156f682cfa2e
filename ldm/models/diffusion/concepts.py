"""Working with a trained EncDiff: images to scalars, to tokens, and back, one concept at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.bars import Bar, bar
from ldm.models.images import as_images
from ldm.modules.attention import recording
from ldm.modules.mode import evaluating
from ldm.util import UserError, nearest

# What the methods take as images; see `as_images`.
Images = Image.Image | np.ndarray | torch.Tensor | Sequence[Any]
# One concept or several, by number or by the factor that they stand for.
Chosen = int | str | Sequence[int | str]
VALUES = 11  # of a traversal


@dataclass(frozen=True)
class Concepts:
    """What a model's concepts stand for, and how far their scalars go over a set of images.

    Attributes:
        tokens: each factor's concepts by number, the strongest first; every factor has at least one.
        share: part of a factor's importance that these hold, 0 to 1.
        low, high: 1st and 99th percentile of each scalar; empty where they are not known.
    """

    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    share: Mapping[str, float] = field(default_factory=dict)
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


def _advance(shown: Bar, images: int, step: int) -> None:
    """So many images have done a step."""
    shown.update(images)


class ConceptMethods:
    """Methods of `LatentDiffusion` for people. Lightning's and LDM's stay beside them.

    `images` are PIL images of any mode and size, which are cropped to their central square and resized; uint8 arrays
    (b, h, w, c) or (h, w, c); tensors (b, c, h, w) or (c, h, w), uint8 or floats in [-1, 1]; or a list of these. One
    image is a batch of one. Results are float32 on the CPU, images among them (…, c, h, w) in [-1, 1].

    `drawing` options, of all methods that make images, are those of `draw`.

    Attributes:
        concepts: see `Concepts`; None until they are matched with factors by `ldm.load` or `ldm.match`.
    """

    concepts: Concepts | None = None

    def scalars(self: Any, images: Images, batch_size: int = 256) -> torch.Tensor:
        """What the encoder makes of images: one scalar per concept.

        Args:
            images: see the class. batch_size: images at a time.

        Returns:
            (b, n); (b, n, w) where a variant has vectors in their place.

        Raises:
            UserError: no concept encoder, or images that do not fit.
        """
        return self._encode(images, batch_size, self._encoder().encoding)

    def tokens(self: Any, images: Images, batch_size: int = 256) -> torch.Tensor:
        """Concept tokens (b, n, d) of images; see `scalars`."""
        return self._encode(images, batch_size, self._encoder())

    def draw(
        self: Any,
        tokens: torch.Tensor,
        steps: int = 20,
        sampler: str = "dpm",
        eta: float = 0.0,
        seed: int = 0,
        batch_size: int = 64,
        progress: str = "",
    ) -> torch.Tensor:
        """Images under given tokens. All start from the same noise, so that they differ by their tokens alone.

        Args:
            tokens: (b, n, d).
            steps: of the sampler. sampler: `dpm` for DPM-Solver++, or `ddim`.
            eta: η, from 0, deterministic, to 1. seed: of the noise.
            batch_size: images at a time; for η = 0, the result does not depend on it.
            progress: title of a bar; none is shown without.

        Returns:
            (b, c, h, w) in [-1, 1].

        Raises:
            UserError: an unknown sampler, or steps, η or batch size out of range.
            ValueError: tokens of another shape.
        """
        return torch.cat(list(self._draw(tokens, steps, sampler, eta, seed, batch_size, progress)))

    def reconstruct(self: Any, images: Images, **drawing: Any) -> torch.Tensor:
        """Images (b, c, h, w) from nothing but the tokens of images; see `draw` for the options."""
        return self.draw(self.tokens(images), **drawing)

    def swap(self: Any, a: Images, b: Images, concepts: Chosen, **drawing: Any) -> torch.Tensor:
        """Images with some of their concepts taken from other images (paper, Figure 4).

        Args:
            a: images. b: as many, or one for all.
            concepts: those that come from b: numbers, or factors' names once they are matched. None of them, `[]`,
                gives reconstructions of a.
            drawing: see `draw`.

        Returns:
            (b, c, h, w) in [-1, 1].

        Raises:
            UserError: an unknown concept, or another number of images.
        """
        numbers, mine, others = self.concept_numbers(concepts), self.tokens(a), self.tokens(b)
        if len(others) not in (1, len(mine)):
            raise UserError(f"expected one image, or {len(mine)} as in a, got {len(others)}", "b")
        mine[:, numbers] = others[:, numbers]
        return self.draw(mine, **drawing)

    def traverse(
        self: Any, images: Images, concept: int | str, values: Sequence[float] | None = None, **drawing: Any
    ) -> torch.Tensor:
        """Images while one concept's scalar takes one value after another.

        Args:
            images: see the class.
            concept: number, or a factor's name, whose strongest concept is taken.
            values: of the scalar; by default 11 from the 1st to the 99th percentile, once they are known.
            drawing: see `draw`.

        Returns:
            (b, v, c, h, w) in [-1, 1].

        Raises:
            UserError: an unknown concept, no values, or a variant whose concepts are vectors.
        """
        number = next(iter(self.concept_numbers(concept)), None)
        if number is None:
            raise UserError("expected a number or a factor's name, got none", "concept")
        scalars = self.scalars(images)
        if scalars.ndim != 2:
            raise UserError(f"this model's concepts are vectors of {scalars.shape[-1]} numbers: swap them instead")
        wanted = (
            self.scalar_values(number) if values is None else torch.as_tensor(values, dtype=torch.float32).flatten()
        )
        moved = scalars.repeat_interleave(len(wanted), dim=0)
        moved[:, number] = wanted.repeat(len(scalars))
        return self.draw(self.warp(moved), **drawing).unflatten(0, (len(scalars), len(wanted)))

    def attention(self: Any, images: Images, **drawing: Any) -> torch.Tensor:
        """Where each concept's token is attended to while images are drawn (paper, Figure 5).

        Args:
            images: see the class. drawing: see `draw`.

        Returns:
            (b, n, h, w), at the size of the images: the mean over heads, layers and steps, which sums to 1 over the n
            tokens at each place.

        Raises:
            UserError: a model without cross attention.
        """
        tokens = self.tokens(images)
        found = []
        for part in tokens.split(drawing.pop("batch_size", 64)):
            with recording(self.model) as maps:
                self.draw(part, batch_size=len(part), **drawing)
            mean = maps.mean(self.cond_stage_model.image_size)
            if mean is None:
                raise UserError(f"{type(self).__name__} has no cross attention over the tokens", "attention")
            found.append(mean.float().cpu())
        return torch.cat(found)

    # ---- what these are made of

    def concept_numbers(self: Any, concepts: Chosen) -> list[int]:
        """Concepts by number or by factors' names -> their numbers.

        Raises:
            UserError: no such concept, or a name where none are known.
        """
        chosen = [concepts] if isinstance(concepts, str) or not isinstance(concepts, Iterable) else list(concepts)
        found: list[int] = []
        known = self.concepts.tokens if self.concepts is not None else {}
        for one in chosen:
            if isinstance(one, str):
                if not known:
                    raise UserError("concepts have no names yet: give numbers, or call ldm.match(model, dataset)", one)
                if one not in known:
                    raise UserError(f"there is no factor of this name{nearest(one, known)}", one)
                found += known[one]
            elif isinstance(one, int | np.integer) and 0 <= one < self._encoder().latent_unit:
                found.append(int(one))
            else:
                last = self._encoder().latent_unit - 1
                raise UserError(f"expected a number from 0 to {last}, or a factor's name, got {one!r}", "concepts")
        return found

    def scalar_values(self: Any, concept: int, count: int = VALUES) -> torch.Tensor:
        """`count` values (count,) of a scalar, evenly spaced from its 1st to its 99th percentile.

        Raises:
            UserError: they are not known.
        """
        if self.concepts is None or not self.concepts.low:
            raise UserError(
                "the scalars' range is not known: give values=, or call ldm.match(model, dataset)", "values"
            )
        return torch.linspace(self.concepts.low[concept], self.concepts.high[concept], count)

    def warp(self: Any, scalars: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        """Scalars (b, n) -> tokens (b, n, d), on the CPU."""
        warp = self._encoder().warp
        with torch.no_grad(), evaluating(self):
            parts = [warp(part.to(self.device)) for part in scalars.split(batch_size)]
        return torch.cat(parts).float().cpu()

    def _encoder(self: Any) -> Any:
        if self.cond_stage_model is None:
            raise UserError("this model has no concept encoder (conditioning_key: none)")
        return self.cond_stage_model

    def _encode(self: Any, images: Images, batch_size: int, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        encoder = self.cond_stage_model
        x = as_images(images, encoder.num_channels, encoder.image_size)
        with torch.no_grad(), evaluating(self):
            parts = [function(part.to(self.device)).float().cpu() for part in x.split(batch_size)]
        return torch.cat(parts)

    @torch.no_grad()
    def _draw(
        self: Any,
        tokens: torch.Tensor,
        steps: int,
        sampler: str,
        eta: float,
        seed: int,
        batch_size: int,
        progress: str,
    ) -> Iterator[torch.Tensor]:
        chosen = self.sampler(sampler)
        if not isinstance(steps, int) or not 1 <= steps <= self.num_timesteps:
            raise UserError(f"expected 1 to {self.num_timesteps}, the model's timesteps, got {steps}", "steps")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"expected at least 1, got {batch_size}", "batch_size")
        if not 0 <= eta <= 1:
            raise UserError(f"expected a number from 0 to 1, got {eta}", "eta")
        tokens = torch.as_tensor(tokens)
        shape = (self.channels, self.image_size, self.image_size)
        generator = torch.Generator(self.device).manual_seed(seed)
        start = torch.randn(1, *shape, generator=generator, device=self.device)
        shown = bar(total=steps * len(tokens), progress=bool(progress), desc=progress)
        with evaluating(self), shown:
            for part in tokens.split(batch_size):
                x_T = start.expand(len(part), *shape)
                options: dict[str, Any] = {"x_T": x_T, "generator": generator, "log_every_t": self.num_timesteps}
                options |= {"eta": eta, "verbose": False, "callback": partial(_advance, shown, len(part))}
                latents, _ = chosen.sample(steps, len(part), shape, part.to(self.device), **options)
                yield self.decode_first_stage(latents).clamp(-1, 1).float().cpu()
