"""LoRA files of diffusers, kohya's scripts and ComfyUI: against weights that diffusers fuses."""

import pytest
import torch

import bulkedge
from helpers import oracle_scores, save, some
from libraries import library

RECIPE = {"top_k": 4, "method": "dense"}
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers itself
TARGETS = ["to_q", "to_v", "conv1"]


@pytest.fixture(scope="module")
def diffusers():
    return library("diffusers")


def unet(diffusers):
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        cross_attention_dim=12, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def trained(diffusers, alpha):
    """A UNet with a LoRA on it that is not zero, its factors and its settings."""
    from peft import LoraConfig, get_peft_model_state_dict

    model = unet(diffusers)
    model.add_adapter(LoraConfig(r=3, lora_alpha=alpha, target_modules=TARGETS))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = torch.randn_like(parameter)
    return get_peft_model_state_dict(model), model.peft_config["default"].to_dict()


def in_kohyas_names(factors):
    """As kohya's scripts write them, with alpha beside the factors."""
    stored = {}
    for name, W in factors.items():
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        key = "lora_unet_" + layer.replace(".", "_")
        stored[f"{key}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[part] }.weight"] = W
        stored[f"{key}.alpha"] = torch.tensor(6.0)
    return stored


def written(case, folder, diffusers):
    """A LoRA file, and the UNet into which diffusers has loaded it."""
    factors, settings = trained(diffusers, alpha=3 if case == "plain" else 6)
    loader, tuned = diffusers.StableDiffusionPipeline, unet(diffusers)
    if case in ("plain", "metadata"):
        metadata = {"unet_lora_adapter_metadata": settings} if case == "metadata" else {}
        loader.save_lora_weights(folder, unet_lora_layers=factors, **metadata)
        state, alphas, metadata = loader.lora_state_dict(folder, return_lora_metadata=True)
        tuned.load_lora_adapter(state, prefix="unet", network_alphas=alphas, metadata=metadata)
        return folder / "pytorch_lora_weights.safetensors", tuned
    if case == "kohya":
        file = save(folder / "lora.safetensors", in_kohyas_names(factors))
        state, alphas = loader.lora_state_dict(file)
        tuned.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
        return file, tuned
    named = {f"diffusion_model.{name}": W for name, W in factors.items()}
    file = save(folder / "lora.safetensors", named)
    tuned.load_lora_adapter(file.parent, weight_name=file.name, prefix="diffusion_model")
    return file, tuned


@pytest.mark.parametrize("case", ["plain", "metadata", "kohya", "comfyui"])
def test_scores_are_those_of_the_weights_that_diffusers_fuses(case, diffusers, tmp_path):
    before = {name: W.clone() for name, W in unet(diffusers).state_dict().items()}
    unet(diffusers).save_pretrained(tmp_path / "base")
    file, tuned = written(case, tmp_path, diffusers)
    tuned.fuse_lora()
    tuned.unload_lora()
    after = tuned.state_dict()
    base = tmp_path / "base/diffusion_pytorch_model.safetensors"
    record = bulkedge.audit(base, file, recipe=RECIPE)
    assert record.summary.lost == 0
    changed = {name for name, W in after.items() if not W.equal(before[name])}
    assert {row.name for row in record.matrices} == changed
    for row in some(record.matrices):
        W0, W = (side[row.name].flatten(1).double() for side in (before, after))
        found = torch.tensor([d.score for d in row.directions], dtype=torch.float64)
        torch.testing.assert_close(found, oracle_scores(W0, W, 4), atol=1e-4, rtol=0)
        norm = float(torch.linalg.matrix_norm(W - W0, 2))
        assert row.spectral_norm_update == pytest.approx(norm, rel=1e-4)
