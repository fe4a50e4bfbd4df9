"""Class-conditional diffusers pipelines around the two shipped denoisers.

They follow the loop of the large diffusers pipelines (batched guidance, `scheduler.step`,
`interrupt`, callbacks), so what works on these works there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

# Needed at run time too: diffusers loads a custom component only from a module already imported.
from stretto.diffusion.shipped.dit import ClassDiT
from stretto.errors import ConfigError

Generators = torch.Generator | list[torch.Generator] | None


class ClassPipeline(DiffusionPipeline):
    """The loop both pipelines share; subclasses name the denoiser and call it."""

    def _setup(self) -> None:
        self._interrupt = False
        self._num_timesteps = 0
        self._guidance_scale = 1.0

    @property
    def denoiser(self) -> Any:
        """The module whose output `scheduler.step` consumes."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of real classes; this number itself is the label of the null class."""
        raise NotImplementedError

    def denoise(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One raw prediction; x is (n, C, H, W), t and labels are (n,)."""
        raise NotImplementedError

    @property
    def interrupt(self) -> bool:
        """True once a callback asked to skip the remaining steps (`pipe._interrupt = True`)."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float:
        """Guidance of the present call; a callback may change it between steps."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether every step also predicts for the null class."""
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps of the present call."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | torch.Tensor,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict | None] | None = None,
        return_dict: bool = True,
        sigmas: list[float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate one picture per class label.

        class_labels holds B integers in [0, num_classes). guidance_scale 1 or less evaluates
        without the null class. latents, if given, is (B, C, H, W) of unit variance; else they
        are drawn from generator (one, or a list of B so that an item does not depend on its
        neighbours). sigmas replaces the noise levels of schedulers that accept them.
        output_type: "pil", "np" (B, H, W, C) and "pt" (B, C, H, W) in [0, 1], or "latent".
        Returns `.images`, or a tuple of it.
        Raises ConfigError for bad labels, latents, step counts or a sigma list that is refused.
        """
        self._setup()
        self._guidance_scale = guidance_scale
        device = self._execution_device
        labels = self._labels(class_labels).to(device)
        timesteps = self._timesteps(num_inference_steps, sigmas, device)
        x = self._noise(len(labels), generator, latents, device)
        x = self._loop(x, timesteps, labels, generator, callback_on_step_end)
        images = VaeImageProcessor(vae_scale_factor=1).postprocess(x, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _loop(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor,
        generator: Generators,
        callback: Callable[..., dict | None] | None,
    ) -> torch.Tensor:
        extra = self._step_arguments(generator)
        with self.progress_bar(total=len(timesteps)) as progress:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                noise_pred = self._guided(x, t, labels)
                x = self.scheduler.step(noise_pred, t, x, **extra, return_dict=False)[0]
                if callback is not None:
                    changed = callback(self, i, t, {"latents": x}) or {}
                    x = changed.pop("latents", x)
                progress.update()
        return x

    def _guided(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The prediction for the class, pushed away from the null class's when guidance is on."""
        if self.do_classifier_free_guidance:
            x = torch.cat([x, x])
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        # FlowMatchEuler, unlike most schedulers, has no such method.
        if hasattr(self.scheduler, "scale_model_input"):
            x = self.scheduler.scale_model_input(x, t)
        prediction = self.denoise(x, t.expand(x.shape[0]), labels)
        if not self.do_classifier_free_guidance:
            return prediction
        cond, null = prediction.chunk(2)
        return null + self.guidance_scale * (cond - null)

    def _labels(self, class_labels: int | Sequence[int] | torch.Tensor) -> torch.Tensor:
        labels = torch.atleast_1d(torch.as_tensor(class_labels))
        if labels.ndim != 1 or not labels.numel() or labels.is_floating_point():
            raise ConfigError(
                f"class labels of shape {tuple(labels.shape)} and {labels.dtype}: one integer per "
                "picture is needed; pass a list such as [0, 3, 9]"
            )
        bad = [int(label) for label in labels if not 0 <= label < self.num_classes]
        if bad:
            raise ConfigError(
                f"class labels {bad} are outside 0..{self.num_classes - 1}: this model was "
                f"trained on {self.num_classes} classes; pass labels in that range"
            )
        return labels.long()

    def _timesteps(self, steps: int, sigmas: list[float] | None, device: Any) -> torch.Tensor:
        if sigmas is None:
            if steps < 1:
                raise ConfigError(f"num_inference_steps is {steps}: at least 1 step is needed")
            self.scheduler.set_timesteps(steps, device=device)
        elif "sigmas" in inspect.signature(self.scheduler.set_timesteps).parameters:
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            raise ConfigError(
                f"{type(self.scheduler).__name__} takes no list of sigmas ({len(sigmas)} given): "
                "pass num_inference_steps, or use a flow-matching scheduler"
            )
        self._num_timesteps = len(self.scheduler.timesteps)
        return self.scheduler.timesteps

    def _noise(
        self, batch: int, generator: Generators, latents: torch.Tensor | None, device: Any
    ) -> torch.Tensor:
        config = self.denoiser.config
        shape = (batch, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            self._check_generators(generator, batch)
            latents = randn_tensor(shape, generator, device, self.denoiser.dtype)
        elif tuple(latents.shape) != shape:
            raise ConfigError(
                f"latents of shape {tuple(latents.shape)} for {batch} labels of this model: "
                f"pass latents of shape {shape}"
            )
        latents = latents.to(device, self.denoiser.dtype)
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)

    @staticmethod
    def _check_generators(generator: Generators, batch: int) -> None:
        if isinstance(generator, list) and len(generator) != batch:
            raise ConfigError(
                f"{len(generator)} generators for {batch} labels: pass one generator per label, "
                "or a single one for the whole batch"
            )

    def _step_arguments(self, generator: Generators) -> dict[str, Any]:
        """The generator, for schedulers whose step draws noise."""
        accepted = inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if "generator" in accepted else {}


class ClassDiTPipeline(ClassPipeline):
    """Pictures of a class from a `ClassDiT` with a flow-matching scheduler."""

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: ClassDiT, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self._setup()

    @property
    def denoiser(self) -> Any:
        return self.transformer

    @property
    def num_classes(self) -> int:
        return self.transformer.config.num_classes

    def denoise(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.transformer(
            hidden_states=x, timestep=t, class_labels=labels, return_dict=False
        )[0]


class ClassUNetPipeline(ClassPipeline):
    """Pictures of a class from a diffusers `UNet2DModel` that predicts epsilon.

    The last of the U-Net's `num_class_embeds` rows is the null class.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self._setup()

    @property
    def denoiser(self) -> Any:
        return self.unet

    @property
    def num_classes(self) -> int:
        return self.unet.config.num_class_embeds - 1

    def denoise(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.unet(x, t, class_labels=labels, return_dict=False)[0]
