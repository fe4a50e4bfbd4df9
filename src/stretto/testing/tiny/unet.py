"""Tiny image pipelines around UNet2DConditionModel: Stable Diffusion 1.5 kinds, SDXL, Kandinsky.

Latents are 8x8 and images 16x16 (the VAE halves once).
"""

from __future__ import annotations

from stretto.testing.tiny.parts import SD_SCHEDULE, assemble, draw, image_vae, make, picture, seeded

SIZE = 16
TOKENS, WIDTH = 6, 16

_BLOCKS = {
    "sample_size": SIZE // 2,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 2,
}
_CROSS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


@seeded()
def sd15(
    scheduler: str,
    pipeline: str = "StableDiffusionPipeline",
    *,
    controlnet: bool = False,
    guidance_width: int | None = None,
    **config,
):
    """A Stable Diffusion 1.5 pipeline class with the scheduler given by name and configuration.

    `guidance_width` embeds the guidance scale into the U-Net, as consistency distillation does.
    """
    extra = {"controlnet": _controlnet()} if controlnet else {}
    return assemble(
        pipeline,
        vae=image_vae(),
        unet=_unet(time_cond_proj_dim=guidance_width),
        scheduler=make(scheduler, **{**SD_SCHEDULE, **config}),
        requires_safety_checker=False,
        **extra,
    )


def _unet(**more):
    parts = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": WIDTH}
    return make("UNet2DConditionModel", **parts, **_BLOCKS, **_CROSS, **more)


def _controlnet():
    blocks = {key: value for key, value in _BLOCKS.items() if key != "sample_size"}
    return make(
        "ControlNetModel",
        in_channels=4,
        down_block_types=_CROSS["down_block_types"],
        cross_attention_dim=WIDTH,
        # The hint network halves once per further entry: 16x16 picture to 8x8 latent.
        conditioning_embedding_out_channels=(2, 4),
        **blocks,
    )


def sd15_inputs() -> dict:
    """Ready embeddings for guided text-to-image."""
    return {
        "prompt_embeds": draw(1, 1, TOKENS, WIDTH),
        "negative_prompt_embeds": draw(2, 1, TOKENS, WIDTH),
        "guidance_scale": 5.0,
        "output_type": "latent",
    }


def sized_inputs() -> dict:
    """`sd15_inputs` with height and width, for pipelines that do not read the U-Net's size."""
    return {**sd15_inputs(), "height": SIZE, "width": SIZE}


def img2img_inputs() -> dict:
    """`sd15_inputs` with a picture and a strength that skips the first steps."""
    return {**sd15_inputs(), "image": picture(3, 1, 3, SIZE, SIZE), "strength": 0.75}


def inpaint_inputs() -> dict:
    """`sd15_inputs` with a picture whose right half is to be repainted."""
    mask = picture(4, 1, 1, SIZE, SIZE).zero_()
    mask[..., SIZE // 2 :] = 1.0
    return {**sized_inputs(), "image": picture(3, 1, 3, SIZE, SIZE), "mask_image": mask}


def controlnet_inputs() -> dict:
    """`sd15_inputs` with a hint picture."""
    return {**sized_inputs(), "image": picture(5, 1, 3, SIZE, SIZE)}


@seeded()
def sdxl(scheduler: str, **config):
    """StableDiffusionXLPipeline; time ids and pooled text enter through the added embedding."""
    return assemble(
        "StableDiffusionXLPipeline",
        vae=image_vae(),
        unet=_unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            # Six time ids of width 4 and the pooled text.
            projection_class_embeddings_input_dim=6 * 4 + WIDTH,
        ),
        scheduler=make(scheduler, **{**SD_SCHEDULE, **config}),
        add_watermarker=False,
    )


def sdxl_inputs() -> dict:
    """`sd15_inputs` with pooled text embeddings."""
    return {
        **sized_inputs(),
        "pooled_prompt_embeds": draw(3, 1, WIDTH),
        "negative_pooled_prompt_embeds": draw(4, 1, WIDTH),
    }


def sdxl_cut_inputs() -> dict:
    """`sdxl_inputs` that stop at 70 % of the noise: only a local list of the pipeline shortens."""
    return {**sdxl_inputs(), "denoising_end": 0.7}


def distilled_inputs() -> dict:
    """One branch: guidance enters as a number."""
    inputs = sized_inputs()
    del inputs["negative_prompt_embeds"]
    return inputs


@seeded()
def kandinsky(scheduler: str, **config):
    """KandinskyV22Pipeline; its predictions carry a learned variance into the scheduler."""
    return assemble(
        "KandinskyV22Pipeline",
        unet=make(
            "UNet2DConditionModel",
            in_channels=4,
            out_channels=8,
            addition_embed_type="image",
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            encoder_hid_dim=WIDTH,
            encoder_hid_dim_type="image_proj",
            cross_attention_dim=WIDTH,
            resnet_time_scale_shift="scale_shift",
            **_BLOCKS,
        ),
        scheduler=make(scheduler, **config),
        movq=make(
            "VQModel",
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            # The spatial norm has 32 groups built in.
            block_out_channels=(32, 64),
            latent_channels=4,
            norm_num_groups=8,
            norm_type="spatial",
            num_vq_embeddings=12,
            vq_embed_dim=4,
        ),
    )


def kandinsky_inputs() -> dict:
    """Image embeddings of both branches."""
    return {
        "image_embeds": draw(1, 1, WIDTH),
        "negative_image_embeds": draw(2, 1, WIDTH),
        "height": SIZE,
        "width": SIZE,
        "guidance_scale": 4.0,
        "output_type": "latent",
    }


@seeded()
def pixels(scheduler: str, pipeline: str, **config):
    """A pipeline that denoises pixels without condition: DDIMPipeline, ConsistencyModelPipeline."""
    return assemble(
        pipeline,
        unet=make(
            "UNet2DModel",
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **_BLOCKS,
        ),
        scheduler=make(scheduler, **config),
    )


def pixel_inputs(**more) -> dict:
    """One picture; these pipelines have no latent to return."""
    return {"batch_size": 1, "output_type": "np", **more}


def noisy_pixel_inputs() -> dict:
    """`pixel_inputs` with noise added back in every step."""
    return pixel_inputs(eta=0.7)
