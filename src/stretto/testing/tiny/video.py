"""Tiny video pipelines: Wan, CogVideoX, Stable Video Diffusion, Latte, LTX, HunyuanVideo."""

from __future__ import annotations

from stretto.testing.tiny.parts import (
    SD_SCHEDULE,
    assemble,
    draw,
    image_vae,
    make,
    masks,
    picture,
    seeded,
)

TOKENS, WIDTH = 6, 32


def _guided(size: int, frames: int, **more) -> dict:
    return {
        "prompt_embeds": draw(1, 1, TOKENS, WIDTH),
        "negative_prompt_embeds": draw(2, 1, TOKENS, WIDTH),
        "height": size,
        "width": size,
        "num_frames": frames,
        "output_type": "latent",
        **more,
    }


def _wan_transformer():
    return make(
        "WanTransformer3DModel",
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


@seeded()
def wan(scheduler: str, boundary_ratio: float | None = None, **config):
    """WanPipeline; with a boundary ratio it is Wan 2.2 with a second, low-noise transformer."""
    return assemble(
        "WanPipeline",
        transformer=_wan_transformer(),
        transformer_2=None if boundary_ratio is None else _wan_transformer(),
        boundary_ratio=boundary_ratio,
        scheduler=make(scheduler, **config),
        vae=make(
            "AutoencoderKLWan",
            base_dim=3,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
    )


def wan_inputs() -> dict:
    """Two branches, one call each: latents (1, 16, 2, 4, 4)."""
    return _guided(32, 5, guidance_scale=4.0)


def wan22_inputs() -> dict:
    """`wan_inputs` with another guidance scale below the boundary."""
    return {**wan_inputs(), "guidance_scale_2": 2.5}


@seeded()
def cogvideox(scheduler: str, **config):
    """CogVideoXPipeline; guided predictions are float32 and rescaled per step if asked."""
    return assemble(
        "CogVideoXPipeline",
        transformer=make(
            "CogVideoXTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=WIDTH,
            num_layers=2,
            sample_width=4,
            sample_height=4,
            sample_frames=9,
            max_text_seq_length=TOKENS,
        ),
        scheduler=make(scheduler, **config),
        vae=make(
            "AutoencoderKLCogVideoX",
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
    )


def cogvideox_inputs() -> dict:
    """Two branches in one batch: latents (1, 3, 4, 4, 4)."""
    return _guided(32, 9, guidance_scale=4.0, max_sequence_length=TOKENS)


def cogvideox_dynamic_inputs() -> dict:
    """`cogvideox_inputs` whose guidance scale moves with the timestep."""
    return {**cogvideox_inputs(), "use_dynamic_cfg": True}


def _image_encoder():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=16,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=16,
        patch_size=16,
    )
    return CLIPVisionModelWithProjection(config).eval()


@seeded()
def svd(scheduler: str, **config):
    """StableVideoDiffusionPipeline, image to video, guidance growing over the frames."""
    from transformers import CLIPImageProcessor

    return assemble(
        "StableVideoDiffusionPipeline",
        unet=make(
            "UNetSpatioTemporalConditionModel",
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=16,
            in_channels=8,
            out_channels=4,
            down_block_types=(
                "CrossAttnDownBlockSpatioTemporal",
                "DownBlockSpatioTemporal",
            ),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=WIDTH,
            num_attention_heads=2,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            num_frames=2,
        ),
        scheduler=make(scheduler, **{**SD_SCHEDULE, **config}),
        vae=make(
            "AutoencoderKLTemporalDecoder",
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            latent_channels=4,
        ),
        image_encoder=_image_encoder(),
        feature_extractor=CLIPImageProcessor(crop_size=32, size=32),
    )


def svd_inputs() -> dict:
    """A picture and the micro-conditions: latents (1, 2, 4, 16, 16)."""
    return {
        "image": picture(1, 1, 3, 32, 32),
        "height": 32,
        "width": 32,
        "num_frames": 2,
        "fps": 7,
        "motion_bucket_id": 127,
        "min_guidance_scale": 1.0,
        "max_guidance_scale": 2.5,
        "output_type": "latent",
    }


@seeded()
def latte(scheduler: str, **config):
    """LattePipeline with learned variance channels, which the pipeline drops."""
    return assemble(
        "LattePipeline",
        transformer=make(
            "LatteTransformer3DModel",
            sample_size=8,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=WIDTH,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=24,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            video_length=2,
        ),
        scheduler=make(scheduler, **config),
        vae=image_vae(),
    )


def latte_inputs() -> dict:
    """Two branches in one batch: latents (1, 4, 2, 8, 8)."""
    inputs = _guided(16, 2, guidance_scale=5.0, negative_prompt=None, clean_caption=False)
    inputs["video_length"] = inputs.pop("num_frames")
    return inputs


@seeded()
def ltx(scheduler: str, **config):
    """LTXPipeline: one token per latent position."""
    return assemble(
        "LTXPipeline",
        transformer=make(
            "LTXVideoTransformer3DModel",
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=WIDTH,
        ),
        scheduler=make(scheduler, **config),
        vae=make(
            "AutoencoderKLLTXVideo",
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=1,
            patch_size_t=1,
        ),
    )


def ltx_inputs() -> dict:
    """Masked branches in one batch."""
    return _guided(32, 5, guidance_scale=3.0, **masks(TOKENS))


@seeded()
def hunyuan(scheduler: str, **config):
    """HunyuanVideoPipeline with embedded (distilled) guidance."""
    return assemble(
        "HunyuanVideoPipeline",
        transformer=make(
            "HunyuanVideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            guidance_embeds=True,
            text_embed_dim=WIDTH,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
        ),
        scheduler=make(scheduler, **config),
        vae=make(
            "AutoencoderKLHunyuanVideo",
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            spatial_compression_ratio=8,
            temporal_compression_ratio=4,
            mid_block_add_attention=True,
        ),
    )


def hunyuan_inputs() -> dict:
    """One branch: guidance enters as a number."""
    inputs = _guided(32, 5, guidance_scale=4.0, pooled_prompt_embeds=draw(3, 1, 8))
    del inputs["negative_prompt_embeds"]
    return {**inputs, "prompt_attention_mask": masks(TOKENS)["prompt_attention_mask"]}


@seeded()
def mochi(scheduler: str, **config):
    """MochiPipeline: predictions and latents are cast to float32 around the step."""
    return assemble(
        "MochiPipeline",
        transformer=make(
            "MochiTransformer3DModel",
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=WIDTH,
            time_embed_dim=4,
            max_sequence_length=16,
        ),
        scheduler=make(scheduler, **config),
        vae=make(
            "AutoencoderKLMochi",
            latent_channels=12,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
    )


def mochi_inputs() -> dict:
    """Masked branches in one batch."""
    boolean = {key: mask.bool() for key, mask in masks(TOKENS).items()}
    return _guided(32, 7, guidance_scale=4.0, **boolean)
