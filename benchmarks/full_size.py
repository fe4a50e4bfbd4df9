"""Full-size pipelines with random weights, by configuration: for time and memory, never fidelity.

Each has its published sizes and a `tiny` twin that walks the same code on a CPU. Text and image
encoders are stand-ins of the right output width (one layer), because conditioning is no part of
what is measured; denoisers, VAEs and the vocoder have their real sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

#: What the image processor of CLIP subtracts and divides by.
_CLIP_MEAN, _CLIP_STD = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)
_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Shape:
    """What is generated. `frames` counts video frames, for sound hundredths of a second."""

    steps: int
    frames: int
    height: int = 0
    width: int = 0

    def but(self, **changes: int | None) -> Shape:
        return replace(self, **{k: v for k, v in changes.items() if v is not None})


class Model:
    """A pipeline by configuration: how to build it, call it, and decode its latents in pieces.

    `warmup`: exact steps of the published schedule; `claim`: its published speed-up on 8 devices,
    if there is one.
    `seconds`: one guided evaluation at `reference` on 14 SMs of an H200, for estimates only.
    `share`: memory of ranks > 0, of the device, where 8 ranks share 78 GiB; 0: they do not fit.
    """

    name: ClassVar[str]
    denoiser: ClassVar[str]
    dtype: ClassVar[torch.dtype]
    parameters: ClassVar[float]
    warmup: ClassVar[int]
    claim: ClassVar[float | None]
    reference: ClassVar[Shape]
    shape: ClassVar[Shape]
    tiny_shape: ClassVar[Shape]
    seconds: ClassVar[float]
    share: ClassVar[float]
    output: ClassVar[str] = "frames"
    #: Launches outlast kernels on a slice: run the denoiser as CUDA graphs, in every row.
    graphs: ClassVar[bool] = False
    #: Whether a step evaluates two branches, which ranks can share.
    guided: ClassVar[bool] = True

    def __init__(self, *, tiny: bool = False):
        self.tiny = tiny
        self.default = self.tiny_shape if tiny else self.shape

    def build(
        self, shape: Shape, device: str | torch.device, dtype: torch.dtype, seed: int = 0
    ) -> Any:
        """The pipeline on a device; one seed gives one set of weights on one kind of device."""
        torch.manual_seed(seed)
        with torch.device(device), default_dtype(dtype):
            modules = {name: make() for name, make in self.parts(shape).items()}
        for module in modules.values():
            if isinstance(module, torch.nn.Module):
                # Some parameters (mixing factors) ignore the default device. diffusers' own `to`
                # warns of nothing that matters here.
                torch.nn.Module.to(module, device=device, dtype=dtype)
                fill_zero_weights(module)
                module.requires_grad_(False).eval()
        pipe = self.assemble(modules)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def warmup_in(self, steps: int) -> int:
        """The published warm-up, or a quarter of fewer steps than were published."""
        return self.warmup if steps >= self.shape.steps else max(1, steps // 4)

    def parts(self, shape: Shape) -> dict[str, Any]:
        """Makers of the modules, by component name."""
        raise NotImplementedError

    def assemble(self, modules: dict[str, Any]) -> Any:
        raise NotImplementedError

    def inputs(self, shape: Shape, device: Any, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the pipeline call, without steps, generator and output type."""
        raise NotImplementedError

    def call(self, pipe: Any, inputs: dict, steps: int, output: str = "latent", seed: int = 1):
        """One generation from a CPU generator; the tensor that the pipeline returns."""
        generator = torch.Generator("cpu").manual_seed(seed)
        result = pipe(**inputs, num_inference_steps=steps, generator=generator, output_type=output)
        return getattr(result, self.output)

    def pieces(self, pipe: Any, latents: Tensor, *, shared: bool) -> list[Tensor]:
        """Latents cut into what can be decoded apart: by one device, or `shared` by several."""
        raise NotImplementedError

    def decode(self, pipe: Any, piece: Tensor) -> Tensor:
        """One piece as pixels or samples."""
        raise NotImplementedError

    def decoded_shape(self, pipe: Any, piece: Tensor) -> tuple[int, ...]:
        raise NotImplementedError

    def join(self, pipe: Any, shape: Shape, parts: list[Tensor], *, shared: bool) -> Tensor:
        """The pipeline's output from decoded pieces, in the order of `pieces`."""
        raise NotImplementedError


class Svd(Model):
    """Stable Video Diffusion, 14 frames of 1024 x 576; guidance 1 to 3 in one batch of two."""

    name, denoiser, dtype = "svd", "unet", torch.float16
    parameters, warmup, claim = 1524.6e6, 5, 3.88
    reference = shape = Shape(steps=50, frames=14, height=576, width=1024)
    tiny_shape = Shape(steps=10, frames=4, height=32, width=32)
    seconds, share = 2.83, 0.112
    #: Frames decoded at once: pieces for several ranks, and less memory on one.
    chunk = 2

    def parts(self, shape: Shape) -> dict[str, Any]:
        import diffusers

        unet = dict(_TINY_SVD, num_frames=shape.frames) if self.tiny else {}
        blocks = (32, 64) if self.tiny else (128, 256, 512, 512)
        vae = {
            "block_out_channels": blocks,
            "down_block_types": ("DownEncoderBlock2D",) * len(blocks),
            "layers_per_block": 1 if self.tiny else 2,
            "latent_channels": 4,
        }
        return {
            "unet": lambda: diffusers.UNetSpatioTemporalConditionModel(**unet),
            "vae": lambda: diffusers.AutoencoderKLTemporalDecoder(**vae),
            "image_encoder": lambda: _image_encoder(32 if self.tiny else 1024),
        }

    def assemble(self, modules: dict[str, Any]) -> Any:
        import diffusers

        scheduler = diffusers.EulerDiscreteScheduler(
            **_BETAS,
            prediction_type="v_prediction",
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
            timestep_spacing="leading",
            timestep_type="continuous",
        )
        return diffusers.StableVideoDiffusionPipeline(
            **modules, scheduler=scheduler, feature_extractor=Pixels()
        )

    def inputs(self, shape: Shape, device: Any, dtype: torch.dtype) -> dict[str, Any]:
        picture = torch.rand(
            (1, 3, shape.height, shape.width), generator=torch.Generator("cpu").manual_seed(2)
        )
        return {
            "image": picture.to(device, dtype),
            "height": shape.height,
            "width": shape.width,
            "num_frames": shape.frames,
            "min_guidance_scale": 1.0,
            "max_guidance_scale": 3.0,
            "fps": 7,
            "motion_bucket_id": 127,
            "decode_chunk_size": self.chunk,
        }

    def pieces(self, pipe: Any, latents: Tensor, *, shared: bool) -> list[Tensor]:
        return list((1 / pipe.vae.config.scaling_factor * latents.flatten(0, 1)).split(self.chunk))

    def decode(self, pipe: Any, piece: Tensor) -> Tensor:
        return pipe.vae.decode(piece, num_frames=len(piece)).sample

    def decoded_shape(self, pipe: Any, piece: Tensor) -> tuple[int, ...]:
        scale = pipe.vae_scale_factor
        return (len(piece), 3, piece.shape[2] * scale, piece.shape[3] * scale)

    def join(self, pipe: Any, shape: Shape, parts: list[Tensor], *, shared: bool) -> Tensor:
        frames = torch.cat(parts)
        video = frames.reshape(-1, shape.frames, *frames.shape[1:]).permute(0, 2, 1, 3, 4).float()
        return pipe.video_processor.postprocess_video(video=video, output_type="pt")


class CogVideoX(Model):
    """CogVideoX-2b, 480 x 720, guidance in one batch of two.

    The published run has 45 frames, 265 s in sequence on 14 SMs of an H200; here 17 by default,
    with the published weights and steps. Latent frames must be odd in number: the VAE decodes an
    even number of them to a length of its own.
    """

    name, denoiser, dtype = "cogvideox", "transformer", torch.float16
    parameters, warmup, claim = 1693.8e6, 13, 2.43
    reference = Shape(steps=50, frames=49, height=480, width=720)
    shape = reference.but(frames=17)
    tiny_shape = Shape(steps=16, frames=9, height=96, width=160)
    seconds, share = 5.31, 0.113

    def parts(self, shape: Shape) -> dict[str, Any]:
        import diffusers

        # Other sizes than configured would make the position table anew in every evaluation.
        sizes = {
            "sample_height": shape.height // 8,
            "sample_width": shape.width // 8,
            "sample_frames": shape.frames,
        }
        transformer = {**_TINY_COG, **sizes} if self.tiny else sizes
        vae = {**_TINY_COG_VAE, "sample_height": 96, "sample_width": 160} if self.tiny else {}
        return {
            "transformer": lambda: diffusers.CogVideoXTransformer3DModel(**transformer),
            "vae": lambda: diffusers.AutoencoderKLCogVideoX(**vae),
        }

    def assemble(self, modules: dict[str, Any]) -> Any:
        import diffusers

        scheduler = diffusers.CogVideoXDDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        )
        return diffusers.CogVideoXPipeline(
            **modules, scheduler=scheduler, text_encoder=None, tokenizer=None
        )

    def inputs(self, shape: Shape, device: Any, dtype: torch.dtype) -> dict[str, Any]:
        tokens, width = (6, 32) if self.tiny else (226, 4096)
        return {
            "prompt_embeds": draw(1, 1, tokens, width).to(device, dtype),
            "negative_prompt_embeds": draw(2, 1, tokens, width).to(device, dtype),
            "max_sequence_length": tokens,
            "height": shape.height,
            "width": shape.width,
            "num_frames": shape.frames,
            "guidance_scale": 6.0,
        }

    def pieces(self, pipe: Any, latents: Tensor, *, shared: bool) -> list[Tensor]:
        whole = 1 / pipe.vae_scaling_factor_image * latents.permute(0, 2, 1, 3, 4)
        if not shared:
            return [whole]
        return [
            whole[..., rows, columns] for row in _tiles(pipe.vae, whole) for rows, columns in row
        ]

    def decode(self, pipe: Any, piece: Tensor) -> Tensor:
        return pipe.vae.decode(piece).sample

    def decoded_shape(self, pipe: Any, piece: Tensor) -> tuple[int, ...]:
        space, time = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
        batch, _, frames, height, width = piece.shape
        return (batch, 3, (frames - 1) * time + 1, height * space, width * space)

    def join(self, pipe: Any, shape: Shape, parts: list[Tensor], *, shared: bool) -> Tensor:
        video = _blended(pipe.vae, shape, parts) if shared else parts[0]
        return pipe.video_processor.postprocess_video(video=video, output_type="pt")


class AudioLdm2(Model):
    """AudioLDM2-large: three waveforms of 10 s in 200 steps, guidance in one batch of six."""

    name, denoiser, dtype = "audioldm2", "unet", torch.float16
    parameters, warmup, claim = 718.0e6, 5, 6.56
    reference = shape = Shape(steps=200, frames=1000)
    tiny_shape = Shape(steps=18, frames=16)
    # Measured on a U-Net of 385 M; the large one has twice its transformer layers.
    seconds, share = 0.55, 0.095
    output = "audios"
    waveforms = 3
    graphs = True

    def parts(self, shape: Shape) -> dict[str, Any]:
        import diffusers

        unet, vae, t5, gpt, vocoder = _TINY_AUDIO if self.tiny else _AUDIO
        return {
            "unet": lambda: diffusers.AudioLDM2UNet2DConditionModel(**unet),
            "vae": lambda: diffusers.AutoencoderKL(**vae),
            "text_encoder_2": lambda: _t5(t5),
            "language_model": lambda: _gpt2(gpt),
            "vocoder": lambda: _vocoder(vocoder),
        }

    def assemble(self, modules: dict[str, Any]) -> Any:
        import diffusers

        scheduler = diffusers.DDIMScheduler(
            **{**_BETAS, "beta_start": 0.0015, "beta_end": 0.0195},
            set_alpha_to_one=False,
            clip_sample=False,
        )
        absent = ("text_encoder", "projection_model", "tokenizer", "tokenizer_2")
        return diffusers.AudioLDM2Pipeline(
            **modules, **dict.fromkeys(absent), feature_extractor=None, scheduler=scheduler
        )

    def inputs(self, shape: Shape, device: Any, dtype: torch.dtype) -> dict[str, Any]:
        tokens, t5, gpt = (6, 32, 16) if self.tiny else (32, 1024, 768)
        embeddings = {
            "prompt_embeds": draw(1, 1, tokens, t5),
            "negative_prompt_embeds": draw(2, 1, tokens, t5),
            "generated_prompt_embeds": draw(3, 1, 8, gpt),
            "negative_generated_prompt_embeds": draw(4, 1, 8, gpt),
        }
        mask = torch.ones((1, tokens), dtype=torch.int64, device=device)
        rate = (2 * 2 if self.tiny else 160) / 16000
        return {
            **{name: value.to(device, dtype) for name, value in embeddings.items()},
            "attention_mask": mask,
            "negative_attention_mask": mask,
            "num_waveforms_per_prompt": self.waveforms,
            "audio_length_in_s": shape.frames * rate,
            "guidance_scale": 3.5,
        }

    def call(self, pipe: Any, inputs: dict, steps: int, output: str = "latent", seed: int = 1):
        result = super().call(pipe, inputs, steps, {"pt": "np"}.get(output, output), seed)
        return torch.as_tensor(result)

    def pieces(self, pipe: Any, latents: Tensor, *, shared: bool) -> list[Tensor]:
        scaled = 1 / pipe.vae.config.scaling_factor * latents
        return list(scaled.split(1)) if shared else [scaled]

    def decode(self, pipe: Any, piece: Tensor) -> Tensor:
        return pipe.mel_spectrogram_to_waveform(pipe.vae.decode(piece).sample)

    def decoded_shape(self, pipe: Any, piece: Tensor) -> tuple[int, ...]:
        config, samples = pipe.vocoder.config, piece.shape[2] * pipe.vae_scale_factor
        # Transposed convolutions whose kernel and rate differ in parity add a sample each.
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
            samples = (samples - 1) * rate - 2 * ((kernel - rate) // 2) + kernel
        return (len(piece), samples)

    def join(self, pipe: Any, shape: Shape, parts: list[Tensor], *, shared: bool) -> Tensor:
        rates = torch.tensor(pipe.vocoder.config.upsample_rates)
        return torch.cat(parts)[:, : shape.frames * int(rates.prod())]


class Flux(Model):
    """FLUX.1-dev at 1024 x 1024: 12 G parameters, guidance distilled into one branch.

    No step-parallel schedule was published for it; the warm-up is that of the others.
    """

    name, denoiser, dtype = "flux", "transformer", torch.bfloat16
    parameters, warmup, claim = 11901.4e6, 5, None
    reference = shape = Shape(steps=50, frames=1, height=1024, width=1024)
    tiny_shape = Shape(steps=10, frames=1, height=32, width=32)
    # 125 TFLOP an evaluation, at the rate that the others reach.
    seconds, share = 2.8, 0.0
    output = "images"
    guided = False

    def parts(self, shape: Shape) -> dict[str, Any]:
        import diffusers

        transformer, vae = _TINY_FLUX if self.tiny else _FLUX
        return {
            "transformer": lambda: diffusers.FluxTransformer2DModel(**transformer),
            "vae": lambda: diffusers.AutoencoderKL(**vae),
        }

    def assemble(self, modules: dict[str, Any]) -> Any:
        import diffusers

        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        )
        absent = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        return diffusers.FluxPipeline(**modules, **dict.fromkeys(absent), scheduler=scheduler)

    def inputs(self, shape: Shape, device: Any, dtype: torch.dtype) -> dict[str, Any]:
        tokens, width, pooled = (6, 32, 16) if self.tiny else (512, 4096, 768)
        return {
            "prompt_embeds": draw(1, 1, tokens, width).to(device, dtype),
            "pooled_prompt_embeds": draw(2, 1, pooled).to(device, dtype),
            "max_sequence_length": tokens,
            "height": shape.height,
            "width": shape.width,
            "guidance_scale": 3.5,
        }

    def pieces(self, pipe: Any, latents: Tensor, *, shared: bool) -> list[Tensor]:
        # One picture: patches of 2 x 2 latents, as many down as across, decoded by one rank.
        side = math.isqrt(latents.shape[1]) * 2 * pipe.vae_scale_factor
        whole = pipe._unpack_latents(latents, side, side, pipe.vae_scale_factor)
        return [whole / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor]

    def decode(self, pipe: Any, piece: Tensor) -> Tensor:
        return pipe.vae.decode(piece).sample

    def decoded_shape(self, pipe: Any, piece: Tensor) -> tuple[int, ...]:
        scale = pipe.vae_scale_factor
        return (len(piece), 3, piece.shape[2] * scale, piece.shape[3] * scale)

    def join(self, pipe: Any, shape: Shape, parts: list[Tensor], *, shared: bool) -> Tensor:
        return pipe.image_processor.postprocess(parts[0], output_type="pt")


_KINDS = (Svd, CogVideoX, AudioLdm2, Flux)
MODELS: dict[str, type[Model]] = {model.name: model for model in _KINDS}


# ---- stand-ins and small parts -----------------------------------------------------------------


class Pixels:
    """In the place of CLIP's image processor, which wants torchvision: resize and normalise."""

    def __call__(self, images: Tensor, **_: Any) -> SimpleNamespace:
        small = torch.nn.functional.interpolate(images.float(), size=(224, 224), mode="bilinear")
        mean, std = (small.new_tensor(v).view(1, 3, 1, 1) for v in (_CLIP_MEAN, _CLIP_STD))
        return SimpleNamespace(pixel_values=(small - mean) / std)


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal float32 on the CPU, so that every device gets the same values."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating tensors get this dtype: half-precision weights without a float32 copy."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def fill_zero_weights(module: torch.nn.Module) -> None:
    """Random values where a class starts at zero: else branches of it would have no effect."""
    for weight in module.parameters():
        if weight.ndim > 1 and not weight.is_meta and not weight.any():
            weight.normal_(std=0.02)


def _image_encoder(width: int) -> torch.nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,
        patch_size=32,
    )
    return CLIPVisionModelWithProjection(config)


def _t5(width: int) -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=32, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config)


def _gpt2(width: int) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(n_embd=width, n_head=2, n_layer=1, n_positions=16, vocab_size=32)
    )


def _vocoder(config: dict) -> torch.nn.Module:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    return SpeechT5HifiGan(SpeechT5HifiGanConfig(**config, normalize_before=False))


def _tiles(vae: Any, latents: Tensor) -> list[list[tuple[slice, slice]]]:
    """Rows of overlapping tiles, laid as the VAE's own tiled decoding lays them."""
    tall, wide = vae.tile_latent_min_height, vae.tile_latent_min_width
    down = int(tall * (1 - vae.tile_overlap_factor_height))
    right = int(wide * (1 - vae.tile_overlap_factor_width))
    height, width = latents.shape[-2:]
    return [
        [(slice(i, i + tall), slice(j, j + wide)) for j in range(0, width, right)]
        for i in range(0, height, down)
    ]


def _blended(vae: Any, shape: Shape, parts: list[Tensor]) -> Tensor:
    """Decoded tiles in one picture, blended as the VAE's own tiled decoding blends them."""
    tall, wide = vae.tile_sample_min_height, vae.tile_sample_min_width
    below = int(tall * vae.tile_overlap_factor_height)
    beside = int(wide * vae.tile_overlap_factor_width)
    grid = _tiles(vae, torch.empty(shape.height // 8, shape.width // 8, device="meta"))
    columns = len(grid[0])
    rows = [parts[k : k + columns] for k in range(0, len(parts), columns)]
    done = []
    for i, row in enumerate(rows):
        strip = []
        for j, tile in enumerate(row):
            tile = vae.blend_v(rows[i - 1][j], tile, below) if i else tile
            tile = vae.blend_h(row[j - 1], tile, beside) if j else tile
            strip.append(tile[..., : tall - below, : wide - beside])
        done.append(torch.cat(strip, dim=4))
    return torch.cat(done, dim=3)


# ---- configurations ------------------------------------------------------------------------------

_TINY_SVD = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "cross_attention_dim": 32,
    "num_attention_heads": (2, 2),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24,
}
_TINY_COG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 32,
    "num_layers": 2,
    "max_text_seq_length": 6,
}
_TINY_COG_VAE = {
    "block_out_channels": (8, 8, 8, 8),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
_AUDIO = (
    {
        "sample_size": 64,
        "in_channels": 8,
        "out_channels": 8,
        "block_out_channels": (128, 256, 384, 640),
        # diffusers reads this as the number of heads: 32 channels each.
        "attention_head_dim": (4, 8, 12, 20),
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        "cross_attention_dim": ((None, 768, None, 1024),) * 4,
        "transformer_layers_per_block": 2,
    },
    {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (128, 256, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "latent_channels": 8,
        "scaling_factor": 0.4111,
    },
    1024,
    768,
    {
        "model_in_dim": 64,
        "sampling_rate": 16000,
        "upsample_initial_channel": 1024,
        "upsample_rates": [5, 4, 2, 2, 2],
        "upsample_kernel_sizes": [16, 16, 8, 4, 4],
    },
)
_TINY_AUDIO = (
    {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": ((None, 16, None, 32),) * 2,
    },
    {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 2,
        "latent_channels": 4,
    },
    32,
    16,
    {
        "model_in_dim": 8,
        "sampling_rate": 16000,
        "upsample_initial_channel": 16,
        "upsample_rates": [2, 2],
        "upsample_kernel_sizes": [4, 4],
        "resblock_kernel_sizes": [3, 7],
        "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
    },
)
_FLUX = (
    {"guidance_embeds": True},
    {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
)
_TINY_FLUX = (
    {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True,
    },
    {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 2,
        "latent_channels": 4,
        "scaling_factor": 1.5,
        "shift_factor": 0.06,
    },
)
