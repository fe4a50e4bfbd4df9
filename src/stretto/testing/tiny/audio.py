"""Tiny sound pipelines: AudioLDM2 and Stable Audio."""

from __future__ import annotations

from stretto.testing.tiny.parts import SD_SCHEDULE, assemble, draw, make, seeded

TOKENS = 6
GPT, T5 = 16, 32


@seeded()
def audioldm2(scheduler: str, **config):
    """AudioLDM2Pipeline. Ready embeddings still need both encoders and the vocoder in place.

    Every cross-attention block has three streams: self, the language model's width, T5's width.
    """
    return assemble(
        "AudioLDM2Pipeline",
        unet=make(
            "AudioLDM2UNet2DConditionModel",
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=((None, GPT, T5),) * 2,
        ),
        vae=_mel_vae(),
        scheduler=make(scheduler, **{**SD_SCHEDULE, **config}),
        text_encoder_2=_t5(),
        language_model=_gpt2(),
        vocoder=_vocoder(),
    )


def _mel_vae():
    return make(
        "AutoencoderKL",
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
    )


def _t5():
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=32, d_model=T5, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=GPT, n_head=2, n_layer=1, n_positions=16, vocab_size=32)
    return GPT2LMHeadModel(config).eval()


def _vocoder():
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(
        model_in_dim=8,
        sampling_rate=16000,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
    )
    return SpeechT5HifiGan(config).eval()


def audioldm2_inputs() -> dict:
    """Both branches of T5 states and of generated language-model states."""
    return {
        "prompt_embeds": draw(1, 1, TOKENS, T5),
        "negative_prompt_embeds": draw(2, 1, TOKENS, T5),
        "generated_prompt_embeds": draw(3, 1, TOKENS + 2, GPT),
        "negative_generated_prompt_embeds": draw(4, 1, TOKENS + 2, GPT),
        "attention_mask": draw(0, 1, TOKENS).ge(-9.0).long(),
        "negative_attention_mask": draw(0, 1, TOKENS).ge(-9.0).long(),
        "guidance_scale": 3.5,
        "output_type": "latent",
    }


@seeded()
def stable_audio(scheduler: str, **config):
    """StableAudioPipeline; the checkpoint's cosine SDE solver needs torchsde, so it is not used."""
    return assemble(
        "StableAudioPipeline",
        transformer=make(
            "StableAudioDiTModel",
            sample_size=4,
            in_channels=3,
            out_channels=3,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            cross_attention_dim=GPT,
            time_proj_dim=8,
            global_states_input_dim=2 * GPT,
            cross_attention_input_dim=GPT,
        ),
        vae=make(
            "AutoencoderOobleck",
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            decoder_channels=3,
            decoder_input_channels=3,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=4,
        ),
        projection_model=make(
            "StableAudioProjectionModel",
            text_encoder_dim=GPT,
            conditioning_dim=GPT,
            min_value=0,
            max_value=32,
        ),
        scheduler=make(scheduler, **config),
    )


def stable_audio_inputs() -> dict:
    """Both branches, two seconds."""
    return {
        "prompt_embeds": draw(1, 1, TOKENS, GPT),
        "negative_prompt_embeds": draw(2, 1, TOKENS, GPT),
        "audio_end_in_s": 2.0,
        "guidance_scale": 3.5,
        "output_type": "latent",
    }
