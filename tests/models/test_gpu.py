"""What only a GPU can show; elsewhere these tests are skipped. `scripts/gpu_check.sh` runs them."""

import copy

import pytest
import torch
from command_line import CHECKPOINT, ROOT

from ldm.modules.graphs import Recorder, call
from ldm.modules.speed import Choices, apply

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FAST = ROOT / "configs" / "fast.yaml"


@pytest.fixture(autouse=True)
def float32_products():
    """Without TF32, so that numbers can be compared."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def pair():
    """The same small EncDiff on the CPU and on the GPU, and a batch."""
    from test_training import encdiff

    torch.manual_seed(0)
    model, other = encdiff(), encdiff()
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    latent, image = torch.randn(4, 3, 8, 8, generator=generator), torch.randn(4, 3, 16, 16, generator=generator)
    t, noise = torch.tensor([1, 20, 60, 99]), torch.randn(4, 3, 8, 8, generator=generator)
    return model, other.cuda(), (latent, image, t, noise)


def loss(model, batch):
    latent, image, t, noise = (part.to(model.device) for part in batch)
    return model.p_losses(latent, model.get_learned_conditioning(image), t, noise)[0]


def test_loss_and_gradients_are_the_cpus():
    cpu, gpu, batch = pair()
    for model in (cpu, gpu):
        loss(model, batch).backward()
    assert loss(gpu, batch).item() == pytest.approx(loss(cpu, batch).item(), rel=1e-5)
    for (name, a), b in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: name + m)


def test_replays_give_the_losses_and_gradients_of_launches():
    """At the batch size that is recorded and at another one, with weights and batch norm's statistics moving on."""
    _, launched, batch = pair()
    replayed = copy.deepcopy(launched)
    apply(replayed, Choices(cuda_graphs=True))
    optimizers = [torch.optim.SGD(model.trained_parameters()[0], lr=0.1) for model in (launched, replayed)]
    for count in (4, 4, 4, 3, 4, 4):
        for part in batch:
            part.copy_(part.flip(0))
        some = tuple(part[:count] for part in batch)
        losses = []
        for model in (launched, replayed):
            model.zero_grad()
            losses.append(loss(model, some))
            losses[-1].backward()
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
        for (name, a), b in zip(launched.named_parameters(), replayed.parameters(), strict=True):
            if a.grad is not None:
                torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: name + m)
        for optimizer in optimizers:
            optimizer.step()
    for network in (replayed.model.diffusion_model, replayed.cond_stage_model):
        assert len(network.recorder.replays) == 1
    for (name, a), b in zip(launched.named_buffers(), replayed.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: name + m)


def test_replays_draw_dropout_anew():
    network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)).cuda()
    network.recorder = Recorder()
    x = torch.ones(4, 8, device="cuda")
    outputs = [call(network, x).detach().clone() for _ in range(4)]
    assert network.recorder.replays and not torch.equal(outputs[2], outputs[3])


def test_a_step_does_not_wait_for_the_gpu():
    _, gpu, batch = pair()
    batch = tuple(part.cuda() for part in batch)
    optimizer = torch.optim.AdamW(gpu.trained_parameters()[0], fused=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu.losses_at_random_times(batch[0], gpu.get_learned_conditioning(batch[1]))[0].backward()
        optimizer.step()
        gpu._update_ema()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_both_stages_train_by_the_fast_overlay(cli):
    """With images and latents on the GPU, a ragged last batch, pictures and scores."""
    first = cli.run("--base", cli.vq, FAST, "-t", "--gpus", "0,", "--max_epochs", 2, "data.params.batch_size=24")
    assert first.status == 0, first.err
    assert "keeping images on the GPU" in first.log
    given = [f"{CHECKPOINT}={first.logdir / 'checkpoints' / 'last.ckpt'}", "data.params.batch_size=24"]
    second = cli.run("--base", cli.enc, FAST, "-t", "--gpus", "0,", "--max_epochs", 2, *given, score=True)
    assert second.status == 0, second.err
    assert "with CUDA graphs" in second.log
    assert "keeping latents; keeping images on the GPU" in second.log and list(second.logdir.glob("metrics/*.json"))
    resumed = cli.run("-r", second.logdir, "-t", "--max_epochs", 3)
    assert resumed.status == 0, resumed.err
