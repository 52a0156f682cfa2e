"""Diffusion in pixel space: no first stage in the graph."""

import torch
from command_line import ROOT
from overlays import composed, without_checkpoint

from ldm.util import instantiate_from_config


def test_the_image_itself_is_noised(tmp_path):
    base = ROOT / "configs" / "quickstart" / "encdiff.yaml"
    model = instantiate_from_config(composed(without_checkpoint(tmp_path, base), "pixel").model, "model")
    assert not list(model.first_stage_model.parameters())
    assert not [name for name in model.state_dict() if name.startswith("first_stage_model")]
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    latent = model.get_first_stage_encoding(model.encode_first_stage(image))
    assert torch.equal(latent, image) and torch.equal(model.decode_first_stage(latent), image)
    model.on_train_batch_start({"image": image}, 0)
    assert float(model.scale_factor) == 1, "images are not scaled"
    seen = []
    model.model.diffusion_model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model.shared_step({"image": image.permute(0, 2, 3, 1), "idx": torch.arange(2)})[0].backward()
    assert seen == [(2, 3, 32, 32)]


def test_attention_is_on_maps_of_16_and_8(tmp_path):
    """As on latents of 16 positions a side, for images of 64."""
    config = composed(without_checkpoint(tmp_path), "pixel")
    with torch.device("meta"):
        unet = instantiate_from_config(config.model.params.unet_config, "unet_config")
        sizes: set[int] = set()
        for name, module in unet.named_modules():
            if name.endswith("transformer_blocks.0"):
                module.register_forward_pre_hook(lambda m, args: sizes.add(args[0].shape[1]))
        unet(torch.zeros(1, 3, 64, 64), torch.zeros(1).long(), torch.zeros(1, 20, 16))
    assert sizes == {16 * 16, 8 * 8}
