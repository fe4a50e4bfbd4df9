"""Tiny image pipelines around a transformer: SD3, Flux, Qwen-Image and the smaller families.

Latents are 8x8 unless said otherwise; the VAE halves a 16x16 image once.
"""

from __future__ import annotations

from stretto.testing.tiny.parts import SD_SCHEDULE, assemble, draw, image_vae, make, masks, seeded

SIZE = 16
TOKENS, WIDTH = 6, 32


def guided(**more) -> dict:
    """Ready embeddings of both guidance branches, a size, and the latent as output."""
    return {
        "prompt_embeds": draw(1, 1, TOKENS, WIDTH),
        "negative_prompt_embeds": draw(2, 1, TOKENS, WIDTH),
        "height": SIZE,
        "width": SIZE,
        "output_type": "latent",
        **more,
    }


def masked(**more) -> dict:
    """`guided` with attention masks that hide the last token of the negative branch."""
    return guided(**masks(TOKENS), **more)


@seeded()
def sd3(scheduler: str, **config):
    """StableDiffusion3Pipeline with two joint blocks, so that one can be skipped."""
    return assemble(
        "StableDiffusion3Pipeline",
        transformer=make(
            "SD3Transformer2DModel",
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=8,
        ),
        scheduler=make(scheduler, **config),
        vae=image_vae(shift_factor=0.06, scaling_factor=1.5),
    )


def sd3_inputs(**more) -> dict:
    """Both branches with pooled embeddings."""
    pooled = {"pooled_prompt_embeds": draw(3, 1, WIDTH)}
    pooled["negative_pooled_prompt_embeds"] = draw(4, 1, WIDTH)
    return guided(guidance_scale=5.0, **pooled, **more)


def sd3_skip_inputs() -> dict:
    """`sd3_inputs` where steps 1 to 4 of 8 add a third branch that skips block 0."""
    return sd3_inputs(skip_guidance_layers=[0], skip_layer_guidance_stop=0.6)


@seeded()
def flux(scheduler: str, **config):
    """FluxPipeline with embedded (distilled) guidance."""
    return assemble(
        "FluxPipeline",
        transformer=make(
            "FluxTransformer2DModel",
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        scheduler=make(scheduler, **config),
        vae=image_vae(shift_factor=0.06, scaling_factor=1.5),
    )


def flux_inputs() -> dict:
    """One branch: guidance enters as a number."""
    inputs = guided(pooled_prompt_embeds=draw(3, 1, WIDTH), guidance_scale=3.5)
    del inputs["negative_prompt_embeds"]
    return inputs


def flux_cfg_inputs() -> dict:
    """Two branches, evaluated one after the other."""
    negative = {"negative_prompt_embeds": draw(2, 1, TOKENS, WIDTH)}
    negative["negative_pooled_prompt_embeds"] = draw(4, 1, WIDTH)
    return {**flux_inputs(), **negative, "true_cfg_scale": 3.0}


@seeded()
def qwen(scheduler: str, **config):
    """QwenImagePipeline; its VAE halves twice, latents are packed 2x2."""
    return assemble(
        "QwenImagePipeline",
        transformer=make(
            "QwenImageTransformer2DModel",
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(8, 4, 4),
        ),
        scheduler=make(scheduler, **config),
        vae=make(
            "AutoencoderKLQwenImage",
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
    )


def qwen_inputs() -> dict:
    """Two branches of different length, evaluated one after the other."""
    mask = masks(TOKENS)["prompt_attention_mask"]
    inputs = guided(height=32, width=32, true_cfg_scale=3.0, prompt_embeds_mask=mask)
    inputs["negative_prompt_embeds"] = draw(2, 1, TOKENS - 2, WIDTH)
    return {**inputs, "negative_prompt_embeds_mask": mask[:, 2:]}


@seeded()
def pixart(scheduler: str, **config):
    """PixArtSigmaPipeline with learned variance channels, which the pipeline drops."""
    return assemble(
        "PixArtSigmaPipeline",
        transformer=make(
            "PixArtTransformer2DModel",
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            cross_attention_dim=24,
            caption_channels=WIDTH,
            in_channels=4,
            out_channels=8,
        ),
        scheduler=make(scheduler, **{**SD_SCHEDULE, **config}),
        vae=image_vae(),
    )


def pixart_inputs() -> dict:
    """Masked branches; resolution bins are for real sizes only."""
    return masked(guidance_scale=4.0, negative_prompt=None, use_resolution_binning=False)


@seeded()
def sana(scheduler: str, **config):
    """SanaPipeline: linear attention, a deep-compression VAE."""
    return assemble(
        "SanaPipeline",
        transformer=make(
            "SanaTransformer2DModel",
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=WIDTH,
            sample_size=8,
        ),
        scheduler=make(scheduler, **config),
        vae=make(
            "AutoencoderDC",
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41,
        ),
    )


def sana_inputs() -> dict:
    """Masked branches without the resolution bins; sizes must divide by 32."""
    return {**pixart_inputs(), "height": 32, "width": 32}


@seeded()
def lumina2(scheduler: str, **config):
    """Lumina2Pipeline: the conditional and the unconditional branch are two calls."""
    return assemble(
        "Lumina2Pipeline",
        transformer=make(
            "Lumina2Transformer2DModel",
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(128, 128, 128),
            cap_feat_dim=WIDTH,
        ),
        scheduler=make(scheduler, **config),
        vae=image_vae(shift_factor=0.06),
    )


def lumina2_inputs() -> dict:
    """Masked branches with normalised guidance; the pipeline takes the VAE to halve three times."""
    return masked(guidance_scale=4.0, height=64, width=64)


@seeded()
def auraflow(scheduler: str, **config):
    """AuraFlowPipeline."""
    return assemble(
        "AuraFlowPipeline",
        transformer=make(
            "AuraFlowTransformer2DModel",
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        ),
        scheduler=make(scheduler, **config),
        vae=image_vae(),
    )


def auraflow_inputs() -> dict:
    """Masked branches."""
    return masked(guidance_scale=3.5)


@seeded()
def chroma(scheduler: str, **config):
    """ChromaPipeline: Flux without pooled text, the two branches evaluated one after the other."""
    return assemble(
        "ChromaPipeline",
        transformer=make(
            "ChromaTransformer2DModel",
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        scheduler=make(scheduler, **config),
        vae=image_vae(shift_factor=0.06, scaling_factor=1.5),
    )


def chroma_inputs() -> dict:
    """Masked branches; the masks go to attention as they are, so they are boolean."""
    inputs = masked(guidance_scale=3.0)
    for key in ("prompt_attention_mask", "negative_prompt_attention_mask"):
        inputs[key] = inputs[key].bool()
    return inputs


@seeded()
def cogview4(scheduler: str, **config):
    """CogView4Pipeline: the two branches are two calls, the latents four-dimensional."""
    return assemble(
        "CogView4Pipeline",
        transformer=make(
            "CogView4Transformer2DModel",
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=WIDTH,
            time_embed_dim=8,
            condition_dim=4,
            rope_axes_dim=(8, 8),
        ),
        scheduler=make(scheduler, **config),
        vae=image_vae(),
    )


def cogview4_inputs() -> dict:
    """Both branches."""
    return guided(guidance_scale=4.0)


@seeded()
def dit(scheduler: str, **config):
    """DiTPipeline, class-conditional; the latent itself is carried twice through the loop."""
    return assemble(
        "DiTPipeline",
        transformer=make(
            "DiTTransformer2DModel",
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            num_embeds_ada_norm=1000,
        ),
        scheduler=make(scheduler, **config),
        vae=image_vae(),
    )


def dit_inputs() -> dict:
    """One class label; the pipeline cannot return latents, so it decodes."""
    return {"class_labels": [7], "guidance_scale": 4.0, "output_type": "np"}
