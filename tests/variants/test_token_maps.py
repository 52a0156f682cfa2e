"""Chunks, orthogonal vectors and Euler encoding: other ways from scalars to tokens."""

import math

import pytest
import torch

from ldm.modules.encoders.concept import Encoder4
from ldm.variants.euler import EulerTokens
from ldm.variants.orthogonal_vectors import OrthogonalVectors
from ldm.variants.vector import ChunkTokens


def encoder(kind: str, latent_unit: int = 4, context_dim: int = 6) -> Encoder4:
    sizes = {"latent_unit": latent_unit, "context_dim": context_dim}
    node = {"target": f"ldm.variants.{kind}", "params": sizes}
    torch.manual_seed(0)
    return Encoder4(d=8, image_size=16, tokens_config=node, **sizes).eval()


def test_chunks_of_the_feature_vector_are_the_tokens():
    model, image = encoder("vector.ChunkTokens"), torch.randn(3, 3, 16, 16)
    features = model.encoder(image)
    assert features.shape == (3, 24), "n·d features"
    chunks = model.encoding(image)
    for k in range(4):
        assert torch.equal(chunks[:, k], features[:, 6 * k : 6 * (k + 1)])
    assert torch.equal(model.warp(chunks), chunks) and torch.equal(model(image), chunks)
    assert not list(model.net.parameters()), "no scalars, no MLPs"
    assert ChunkTokens(4, 6).features_per_concept == 6


def test_vectors_are_orthonormal_and_stay_so():
    torch.manual_seed(0)
    tokens = OrthogonalVectors(latent_unit=20, context_dim=32)
    optimizer = torch.optim.AdamW(tokens.parameters(), lr=0.5)
    target = torch.randn(5, 20, 32)
    start = tokens.vectors().detach()
    for _ in range(20):
        torch.testing.assert_close(tokens.vectors() @ tokens.vectors().t(), torch.eye(20), rtol=0, atol=1e-5)
        optimizer.zero_grad()
        (tokens(torch.ones(5, 20)) - target).square().mean().backward()
        optimizer.step()
    assert (tokens.vectors() - start).abs().max() > 0.1, "they learn"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors = tokens.vectors()
    torch.testing.assert_close(vectors @ vectors.t(), torch.eye(20), rtol=0, atol=1e-5)


def test_a_token_is_its_scalar_times_its_vector():
    model = encoder("orthogonal_vectors.OrthogonalVectors")
    scalars = torch.randn(3, 4)
    made = model.warp(scalars)
    for k, vector in enumerate(model.net.vectors()):
        torch.testing.assert_close(made[:, k], scalars[:, k : k + 1] * vector)
    inner = torch.einsum("bkd,bjd->bkj", made, made)
    torch.testing.assert_close(inner, torch.diag_embed(scalars**2), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"context_dim: expected at least latent_unit \(7\)"):
        OrthogonalVectors(7, 6)


def test_scalars_are_angles_on_unit_circles():
    model = encoder("euler.EulerTokens")
    scalars = torch.randn(5, 4).double()
    points = EulerTokens.circle(scalars)
    torch.testing.assert_close(points.norm(dim=-1), torch.ones(5, 4).double())
    torch.testing.assert_close(torch.view_as_complex(points), torch.exp(1j * scalars))
    # Moving a scalar turns its point, and leaves the other planes alone.
    delta = 0.7
    turn = torch.tensor([[math.cos(delta), math.sin(delta)], [-math.sin(delta), math.cos(delta)]]).double()
    torch.testing.assert_close(EulerTokens.circle(scalars + delta), points @ turn)
    model = model.double()
    torch.testing.assert_close(model.warp(scalars + 2 * math.pi), model.warp(scalars))
    expected = torch.stack([model.net[k](points[:, k]) for k in range(4)], dim=1)
    torch.testing.assert_close(model.warp(scalars), expected)
    moved = scalars.clone()
    moved[:, 2] += 1
    changed = (model.warp(moved) - model.warp(scalars)).abs().amax(dim=(0, 2)) > 0
    assert changed.tolist() == [False, False, True, False]
