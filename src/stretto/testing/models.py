"""The matrix of tiny random-weight diffusers pipelines that exactness is tested on.

Every case is a genuine diffusers pipeline class with seeded random weights, CPU float32, needing
no file, no hub and no tokenizer. Reading the registry imports no diffusers; building a case does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from stretto.testing.tiny import audio, transformer, unet, video


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pipeline, its scheduler and inputs as data, with the facts a step-parallel run needs.

    `calls_per_step` is the largest number of denoiser calls in one call of `scheduler.step`
    (skip-layer guidance uses it in some steps only). `guidance` says how branches are evaluated:
    "batch" in one call with twice the rows, "calls" one after another, "none" a single branch.
    `edits`: the pipeline changes latents between steps. `stochastic`: the scheduler draws noise
    from the generator inside a step.
    """

    name: str
    family: str
    scheduler: str
    build: Callable[[], Any]
    inputs: Callable[[], dict]
    steps: int = 8
    output: str = "images"
    calls_per_step: int = 1
    guidance: Literal["batch", "calls", "none"] = "batch"
    edits: bool = False
    stochastic: bool = False
    denoisers: tuple[str, ...] = ("unet",)

    @property
    def batched(self) -> bool:
        """Whether guidance branches share one denoiser call."""
        return self.guidance == "batch"

    def pipeline(self):
        """A fresh pipeline: two of them have equal weights and share nothing."""
        return self.build()

    def call(self, pipe, seed: int = 0, **overrides) -> torch.Tensor:
        """One generation of `pipe` from a CPU generator seeded with `seed`, as one tensor.

        `overrides` replace arguments of the pipeline call, `num_inference_steps` and `generator`
        included. The tensor is the final latent where the pipeline can return it.
        """
        arguments = {
            "num_inference_steps": self.steps,
            **self.inputs(),
            "generator": torch.Generator("cpu").manual_seed(seed),
            **overrides,
        }
        return self.tensor(pipe(**arguments))

    def tensor(self, result) -> torch.Tensor:
        """What a call of the pipeline returned, as one tensor."""
        return _tensor(getattr(result, self.output))


def _tensor(value) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value[0], torch.Tensor):
        return torch.stack(list(value))
    return torch.from_numpy(np.asarray(value))


def _registry(*cases: Case) -> dict[str, Case]:
    named = {case.name: case for case in cases}
    assert len(named) == len(cases), "two cases share a name"
    return named


def _sd15(name: str, scheduler: str, inputs=unet.sd15_inputs, *, steps=8, facts=None, **build):
    """A Stable Diffusion 1.5 case: `facts` are Case fields, `build` goes to the builder."""
    return Case(
        name=f"sd15-{name}",
        family="sd15",
        scheduler=scheduler,
        build=partial(unet.sd15, scheduler, **build),
        inputs=inputs,
        steps=steps,
        **(facts or {}),
    )


_NOISY = {"stochastic": True}
_LEADING = {"set_alpha_to_one": False, "clip_sample": False}

_SD15 = (
    _sd15("ddim", "DDIMScheduler", **_LEADING),
    _sd15("ddim-v", "DDIMScheduler", **_LEADING, prediction_type="v_prediction"),
    _sd15("euler", "EulerDiscreteScheduler"),
    _sd15("euler-karras", "EulerDiscreteScheduler", use_karras_sigmas=True),
    _sd15("euler-ancestral", "EulerAncestralDiscreteScheduler", facts=_NOISY),
    _sd15("ddpm", "DDPMScheduler", facts=_NOISY, clip_sample=False),
    _sd15("dpm++2m", "DPMSolverMultistepScheduler"),
    _sd15(
        "sde-dpm++",
        "DPMSolverMultistepScheduler",
        facts=_NOISY,
        algorithm_type="sde-dpmsolver++",
    ),
    _sd15("unipc", "UniPCMultistepScheduler"),
    _sd15("deis", "DEISMultistepScheduler"),
    _sd15("lms", "LMSDiscreteScheduler"),
    _sd15("pndm", "PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=False),
    _sd15("heun", "HeunDiscreteScheduler"),
    _sd15("kdpm2", "KDPM2DiscreteScheduler"),
    _sd15("kdpm2-ancestral", "KDPM2AncestralDiscreteScheduler", facts=_NOISY),
    _sd15("lcm", "LCMScheduler", facts=_NOISY),
    _sd15(
        "img2img",
        "EulerDiscreteScheduler",
        unet.img2img_inputs,
        pipeline="StableDiffusionImg2ImgPipeline",
    ),
    _sd15(
        "inpaint",
        "DDIMScheduler",
        unet.inpaint_inputs,
        facts={"edits": True},
        pipeline="StableDiffusionInpaintPipeline",
        **_LEADING,
    ),
    _sd15(
        "controlnet",
        "UniPCMultistepScheduler",
        unet.controlnet_inputs,
        pipeline="StableDiffusionControlNetPipeline",
        controlnet=True,
    ),
)

_SDXL = tuple(
    Case(
        name=name,
        family="sdxl",
        scheduler="EulerDiscreteScheduler",
        build=partial(unet.sdxl, "EulerDiscreteScheduler"),
        inputs=inputs,
    )
    for name, inputs in (
        ("sdxl-euler", unet.sdxl_inputs),
        ("sdxl-denoising-end", unet.sdxl_cut_inputs),
    )
)

_FLOW = "FlowMatchEulerDiscreteScheduler"
_UNIPC = "UniPCMultistepScheduler"


def _case(
    name: str, scheduler: str, build, inputs, *, facts: dict[str, Any] | None = None, **config
):
    """A case of another family: `build` takes the scheduler name and `config`."""
    fields: dict[str, Any] = {"denoisers": ("transformer",), **(facts or {})}
    return Case(
        name=name,
        family=build.__name__,
        scheduler=scheduler,
        build=partial(build, scheduler, **config),
        inputs=inputs,
        **fields,
    )


_CALLS = {"guidance": "calls", "calls_per_step": 2}
_VIDEO = {"output": "frames"}
_FLUX_SHIFT = {"shift": 3.0, "use_dynamic_shifting": True}
_COG = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
    "timestep_spacing": "trailing",
}
_WAN_UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

_IMAGE = (
    _case("sd3-flow", _FLOW, transformer.sd3, transformer.sd3_inputs, shift=3.0),
    _case(
        "sd3-skip-layer",
        _FLOW,
        transformer.sd3,
        transformer.sd3_skip_inputs,
        facts={"calls_per_step": 2},
        shift=3.0,
    ),
    _case(
        "flux-distilled",
        _FLOW,
        transformer.flux,
        transformer.flux_inputs,
        facts={"guidance": "none"},
        **_FLUX_SHIFT,
    ),
    _case(
        "flux-true-cfg",
        _FLOW,
        transformer.flux,
        transformer.flux_cfg_inputs,
        facts=_CALLS,
        **_FLUX_SHIFT,
    ),
    _case(
        "qwen-image",
        _FLOW,
        transformer.qwen,
        transformer.qwen_inputs,
        facts=_CALLS,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
    ),
)

_WAN = {**_VIDEO, **_CALLS}
_MOVING = (
    _case("wan-unipc", _UNIPC, video.wan, video.wan_inputs, facts=_WAN, **_WAN_UNIPC),
    _case("wan-flow", _FLOW, video.wan, video.wan_inputs, facts=_WAN, shift=3.0),
    _case(
        "wan22-two-transformers",
        _UNIPC,
        video.wan,
        video.wan22_inputs,
        facts={**_WAN, "denoisers": ("transformer", "transformer_2")},
        boundary_ratio=0.7,
        **_WAN_UNIPC,
    ),
    _case(
        "cogvideox-ddim",
        "CogVideoXDDIMScheduler",
        video.cogvideox,
        video.cogvideox_inputs,
        facts=_VIDEO,
        **_COG,
    ),
    _case(
        "cogvideox-dpm",
        "CogVideoXDPMScheduler",
        video.cogvideox,
        video.cogvideox_dynamic_inputs,
        facts={**_VIDEO, "stochastic": True},
        **_COG,
    ),
    _case(
        "svd",
        "EulerDiscreteScheduler",
        video.svd,
        video.svd_inputs,
        facts={**_VIDEO, "denoisers": ("unet",)},
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_spacing="leading",
        timestep_type="continuous",
    ),
    _case(
        "latte",
        "DDIMScheduler",
        video.latte,
        video.latte_inputs,
        facts=_VIDEO,
        clip_sample=False,
    ),
    _case(
        "audioldm2",
        "DDIMScheduler",
        audio.audioldm2,
        audio.audioldm2_inputs,
        facts={"output": "audios", "denoisers": ("unet",)},
        **_LEADING,
    ),
)

CASES = _registry(*_SD15, *_SDXL, *_IMAGE, *_MOVING)
"""Cases of the exactness matrix by name."""

_UNCONDITIONAL = {"stochastic": True, "guidance": "none", "denoisers": ("unet",)}

OTHERS = _registry(
    _case("ltx", _FLOW, video.ltx, video.ltx_inputs, facts=_VIDEO, **_FLUX_SHIFT),
    _case(
        "hunyuan-video",
        _FLOW,
        video.hunyuan,
        video.hunyuan_inputs,
        facts={**_VIDEO, "guidance": "none"},
        shift=7.0,
    ),
    _case(
        "pixart-sigma", "DPMSolverMultistepScheduler", transformer.pixart, transformer.pixart_inputs
    ),
    _case("sana", _FLOW, transformer.sana, transformer.sana_inputs, shift=3.0),
    _case("lumina2", _FLOW, transformer.lumina2, transformer.lumina2_inputs, facts=_CALLS),
    _case("auraflow", _FLOW, transformer.auraflow, transformer.auraflow_inputs, shift=1.73),
    _case("dit", "DDIMScheduler", transformer.dit, transformer.dit_inputs),
    _case(
        "stable-audio",
        "EDMDPMSolverMultistepScheduler",
        audio.stable_audio,
        audio.stable_audio_inputs,
        facts={"output": "audios"},
        prediction_type="v_prediction",
        sigma_data=1.0,
        sigma_schedule="exponential",
    ),
    _case("mochi", _FLOW, video.mochi, video.mochi_inputs, facts=_VIDEO),
    _case("chroma", _FLOW, transformer.chroma, transformer.chroma_inputs, facts=_CALLS),
    _case("cogview4", _FLOW, transformer.cogview4, transformer.cogview4_inputs, facts=_CALLS),
    _case(
        "kandinsky22",
        "DDPMScheduler",
        unet.kandinsky,
        unet.kandinsky_inputs,
        facts={"stochastic": True, "denoisers": ("unet",)},
        variance_type="learned_range",
        clip_sample=False,
    ),
    _sd15(
        "consistency-distilled",
        "LCMScheduler",
        unet.distilled_inputs,
        facts={"stochastic": True, "guidance": "none"},
        pipeline="LatentConsistencyModelPipeline",
        guidance_width=8,
    ),
    _case(
        "pixels-consistency",
        "CMStochasticIterativeScheduler",
        unet.pixels,
        unet.pixel_inputs,
        facts=_UNCONDITIONAL,
        pipeline="ConsistencyModelPipeline",
        num_train_timesteps=40,
    ),
    _case(
        "pixels-ddim-eta",
        "DDIMScheduler",
        unet.pixels,
        unet.noisy_pixel_inputs,
        facts=_UNCONDITIONAL,
        pipeline="DDIMPipeline",
    ),
)
"""Further pipelines, for "any other diffusers pipeline", by name."""
