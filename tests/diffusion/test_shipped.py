"""The shipped pipelines: they load, repeat, refuse bad input, and can be trained."""

import gzip
import json
import shutil
import struct
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from stretto.diffusion.shipped import data, load, losses, train
from stretto.diffusion.shipped.dit import ClassDiT
from stretto.diffusion.shipped.pipeline import ClassDiTPipeline, ClassUNetPipeline
from stretto.diffusion.shipped.recipe import Recipe, build
from stretto.errors import ConfigError
from tests.fresh import modules_after

WEIGHTS = resources.files("stretto.diffusion.shipped") / "weights"
NAMES = ("dit", "unet")
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=NAMES)
def pipe(request):
    return load.load(request.param)


@pytest.fixture(scope="module")
def dit():
    return load.load("dit")


def small_dit(**changes) -> ClassDiT:
    sizes = {"sample_size": 8, "width": 16, "num_layers": 2, "num_heads": 2}
    return ClassDiT(**(sizes | changes))


def files_below(folder):
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from files_below(entry)
        else:
            yield entry


class TestPackagedWeights:
    def test_together_at_most_five_megabytes(self):
        assert sum(len(file.read_bytes()) for file in files_below(WEIGHTS)) <= 5_000_000

    def test_unet_at_most_its_share(self):
        file = WEIGHTS / "unet" / "unet" / "diffusion_pytorch_model.safetensors"
        assert len(file.read_bytes()) <= 1_200_000

    def test_dit_is_the_documented_size(self, dit):
        assert sum(p.numel() for p in dit.transformer.parameters()) == 1_865_988
        assert (28 // dit.transformer.config.patch_size) ** 2 == 196

    def test_provenance_tells_how_to_repeat(self):
        for name in NAMES:
            record = json.loads((WEIGHTS / name / "provenance.json").read_text())
            assert record["model"] == name
            assert f"--model {name}" in record["command"]
            assert "Fashion-MNIST" in record["data"]
            assert {"seed", "commit", "final_loss", "device", "sha256"} <= record.keys()
            assert np.isfinite(record["final_loss"])

    def test_loaded_in_float32_from_float16(self, pipe):
        weights = list(pipe.denoiser.parameters())
        assert {p.dtype for p in weights} == {torch.float32}
        assert all(torch.equal(p, p.half().float()) for p in weights)
        assert all(torch.isfinite(p).all() for p in weights)

    def test_dtype_is_honoured(self):
        assert load.load("unet", torch.float64).denoiser.dtype == torch.float64

    def test_changed_weights_are_refused(self, tmp_path):
        folder = tmp_path / "unet"
        shutil.copytree(str(WEIGHTS / "unet"), folder)
        load.load_folder(folder)
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="sha256"):
            load.load_folder(folder)
        file.unlink()
        with pytest.raises(ConfigError, match="no file"):
            load.load_folder(folder)

    def test_unknown_name_lists_the_known(self):
        with pytest.raises(ConfigError, match=r"'sd3'.*dit, unet"):
            load.load("sd3")

    def test_a_saved_pipeline_opens_without_provenance(self, tmp_path):
        load.load("unet").save_pretrained(tmp_path)
        assert type(load.load_folder(tmp_path)).__name__ == "ClassUNetPipeline"

    def test_a_folder_that_is_no_pipeline(self, tmp_path):
        with pytest.raises(ConfigError, match=r"no model_index\.json"):
            load.load_folder(tmp_path)


class TestPipelines:
    def test_shapes_and_ranges(self, pipe):
        run = {"num_inference_steps": 2, "generator": seeded(0)}
        array = pipe([0, 9, 3], output_type="np", **run).images
        assert array.shape == (3, 28, 28, 1)
        assert 0 <= array.min() <= array.max() <= 1
        assert pipe([0, 9], output_type="pt", **run).images.shape == (2, 1, 28, 28)
        assert pipe(torch.tensor([4]), output_type="latent", **run).images.shape == (1, 1, 28, 28)
        assert [image.size for image in pipe(7, **run).images] == [(28, 28)]
        assert len(pipe(7, return_dict=False, **run)) == 1

    def test_one_generator_state_one_result(self, pipe):
        def latent(seed):
            run = {"num_inference_steps": 3, "output_type": "latent", "generator": seeded(seed)}
            return pipe([1, 5], **run).images

        assert torch.equal(latent(3), latent(3))
        assert not torch.equal(latent(3), latent(4))

    def test_item_does_not_depend_on_its_neighbours(self, pipe):
        run = {"num_inference_steps": 3, "output_type": "latent"}
        together = pipe([1, 5, 8], generator=[seeded(i) for i in range(3)], **run).images
        alone = [pipe([c], generator=[seeded(i)], **run).images for i, c in enumerate([1, 5, 8])]
        alone = torch.cat(alone)
        assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()

    def test_class_and_guidance_matter(self, pipe):
        latents = torch.randn(1, 1, 28, 28, generator=seeded(0))

        def run(label, scale):
            call = {"num_inference_steps": 3, "latents": latents, "output_type": "latent"}
            return pipe([label], guidance_scale=scale, **call).images

        assert not torch.equal(run(0, 1.0), run(1, 1.0))
        assert not torch.equal(run(0, 1.0), run(0, 3.0))

    def test_guidance_is_null_plus_scaled_difference(self, pipe):
        x = torch.randn(2, 1, 28, 28, generator=seeded(0))
        t, labels, null = torch.tensor(500), torch.tensor([2, 6]), torch.tensor([10, 10])
        pipe._guidance_scale = 4.0
        with torch.no_grad():
            guided = pipe._guided(x, t, labels)
            cond, away = (pipe.denoise(x, t.expand(2), y) for y in (labels, null))
        expected = away + 4.0 * (cond - away)
        assert (guided - expected).abs().max() <= 1e-5 * expected.abs().max()

    def test_guidance_off_evaluates_only_the_class(self, pipe):
        rows = []
        hook = pipe.denoiser.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(len(kwargs["class_labels"])), with_kwargs=True
        )
        try:
            pipe([1, 2], 2, guidance_scale=1.0, output_type="latent")
            pipe([1, 2], 2, guidance_scale=2.0, output_type="latent")
        finally:
            hook.remove()
        assert rows == [2, 2, 4, 4]

    def test_round_trip_through_a_folder(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        again = type(pipe).from_pretrained(tmp_path)
        run = {"num_inference_steps": 2, "output_type": "latent"}
        first = pipe([3], generator=seeded(1), **run).images
        assert torch.equal(first, again([3], generator=seeded(1), **run).images)

    def test_callback_edits_and_interrupts(self, pipe):
        seen = []

        def callback(pipeline, i, t, given):
            seen.append((i, pipeline.num_timesteps))
            pipeline._interrupt = i == 1
            return {"latents": torch.zeros_like(given["latents"])}

        latent = pipe([3], 5, output_type="latent", callback_on_step_end=callback).images
        assert seen == [(0, 5), (1, 5)]
        assert not latent.any()
        assert pipe.interrupt
        pipe([3], 1, output_type="latent")
        assert not pipe.interrupt

    @pytest.mark.parametrize("labels", [[0, 10], [-1], 11])
    def test_bad_label_is_named(self, pipe, labels):
        with pytest.raises(ConfigError, match=r"\[(10|-1|11)\] are outside 0\.\.9"):
            pipe(labels, 1)

    @pytest.mark.parametrize("labels", [[], [[1, 2]], [0.5]])
    def test_labels_of_another_kind(self, pipe, labels):
        with pytest.raises(ConfigError, match="one integer per picture"):
            pipe(labels, 1)

    def test_wrong_counts_and_shapes(self, pipe):
        with pytest.raises(ConfigError, match="num_inference_steps is 0"):
            pipe([1], 0)
        with pytest.raises(ConfigError, match=r"\(1, 1, 16, 16\).*\(1, 1, 28, 28\)"):
            pipe([1], 1, latents=torch.zeros(1, 1, 16, 16))
        with pytest.raises(ConfigError, match="2 generators for 1 labels"):
            pipe([1], 1, generator=[seeded(0), seeded(1)])


class TestSchedulers:
    @pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
    def test_flow_schedulers_solve_the_same_path(self, dit, kind):
        latents = torch.randn(1, 1, 28, 28, generator=seeded(0))

        def solve(scheduler, steps):
            other = ClassDiTPipeline(dit.transformer, scheduler)
            other.set_progress_bar_config(disable=True)
            run = {"guidance_scale": 1.0, "latents": latents, "output_type": "latent"}
            return other([5], steps, **run).images

        fine = solve(FlowMatchEulerDiscreteScheduler(shift=3.0), 40)
        coarse = solve(kind(**FLOW), 12)
        assert (coarse - fine).norm() <= 0.2 * fine.norm()

    def test_sigmas_replace_the_grid(self, dit):
        dit([5], sigmas=[1.0, 0.8, 0.3], output_type="latent")
        assert dit.num_timesteps == 3
        unet = load.load("unet")
        with pytest.raises(ConfigError, match="DDIMScheduler takes no list of sigmas"):
            unet([5], sigmas=[1.0, 0.5])

    def test_stochastic_step_draws_from_the_given_generator(self):
        unet = load.load("unet").unet
        stochastic = ClassUNetPipeline(unet, DDPMScheduler(clip_sample=False))
        stochastic.set_progress_bar_config(disable=True)
        run = {"num_inference_steps": 3, "output_type": "latent"}
        first = stochastic([1], generator=seeded(0), **run).images
        torch.manual_seed(99)
        assert torch.equal(first, stochastic([1], generator=seeded(0), **run).images)


class TestClassDiT:
    def test_starts_as_a_zero_velocity(self):
        torch.manual_seed(0)
        model = small_dit()
        model.initialize()
        x = torch.randn(2, 1, 8, 8, generator=seeded(0))
        out = model(x, torch.tensor([0.0, 1000.0]), torch.tensor([0, 10]))
        assert out.sample.shape == x.shape
        assert not out.sample.any()

    def test_patches_return_to_their_places(self):
        model = small_dit(in_channels=3)
        grid, p = 4, 2
        x = torch.randn(2, 3, 8, 8, generator=seeded(0))
        tokens = x.unflatten(3, (grid, p)).unflatten(2, (grid, p)).permute(0, 2, 4, 3, 5, 1)
        assert torch.equal(model._picture(tokens.reshape(2, grid * grid, p * p * 3)), x)

    def test_tuple_and_scalar_time(self):
        model = small_dit().eval()
        x = torch.randn(2, 1, 8, 8, generator=seeded(0))
        labels = torch.tensor([1, 2])
        one = model(x, torch.tensor(300.0), labels, return_dict=False)[0]
        assert torch.equal(one, model(x, torch.tensor([300.0, 300.0]), labels).sample)

    def test_benchmark_size_by_config(self):
        with torch.device("meta"):
            model = ClassDiT(width=512, num_layers=12, num_heads=8)
        assert 20e6 <= sum(p.numel() for p in model.parameters()) <= 60e6

    def test_sizes_that_do_not_divide(self):
        with pytest.raises(ConfigError, match="patch size 3 does not divide sample size 8"):
            small_dit(patch_size=3)
        with pytest.raises(ConfigError, match=r"width 18 .* 4 heads"):
            small_dit(width=18, num_heads=4)
        with pytest.raises(ConfigError, match=r"\(1, 10, 10\) for a model of \(1, 8, 8\)"):
            small_dit()(torch.zeros(1, 1, 10, 10), torch.zeros(1), torch.zeros(1).long())


def write_idx(file: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    file.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion_dir(tmp_path):
    rng = np.random.default_rng(0)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", rng.integers(0, 256, (20, 28, 28)))
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(20) % 10)
    return tmp_path


class TestData:
    def test_fashion_files(self, fashion_dir):
        pictures = data.load("fashion", fashion_dir)
        raw = data.read_idx(fashion_dir / "train-images-idx3-ubyte.gz")
        assert pictures.images.shape == (20, 1, 28, 28)
        assert torch.equal(pictures.labels, torch.arange(20) % 10)
        assert torch.equal(((pictures.images[:, 0] + 1) * 127.5).round().byte(), raw)
        assert pictures.images.abs().max() <= 1

    def test_missing_file_says_what_to_install(self, tmp_path):
        with pytest.raises(ConfigError, match=r"train-images.*dataset-fashion-mnist"):
            data.load("fashion", tmp_path)

    def test_damaged_files(self, fashion_dir):
        file = fashion_dir / "train-images-idx3-ubyte.gz"
        whole = gzip.decompress(file.read_bytes())
        file.write_bytes(gzip.compress(whole[:-1]))
        with pytest.raises(ConfigError, match="holds 15695 bytes, its header declares 15696"):
            data.read_idx(file)
        file.write_bytes(gzip.compress(b"PNG" + whole))
        with pytest.raises(ConfigError, match="starts with 504e4700"):
            data.read_idx(file)
        file.write_bytes(whole)
        with pytest.raises(ConfigError, match="no intact gzip"):
            data.read_idx(file)

    def test_two_sets_mixed(self, fashion_dir):
        write_idx(fashion_dir / "train-labels-idx1-ubyte.gz", np.zeros(19))
        with pytest.raises(ConfigError, match=r"20 pictures .* 19 labels"):
            data.load("fashion", fashion_dir)

    def test_digits(self):
        pytest.importorskip("sklearn")
        pictures = data.load("digits")
        assert pictures.images.shape == (1797, 1, 16, 16)
        assert (pictures.images.min(), pictures.images.max()) == (-1, 1)
        assert pictures.labels.bincount().numel() == 10

    def test_unknown_set(self):
        with pytest.raises(ConfigError, match="'cifar': choose fashion or digits"):
            data.load("cifar")


def toy_pictures() -> data.Pictures:
    """Class c is a flat picture of one grey: what a denoiser learns in a few steps."""
    labels = torch.arange(40) % 10
    images = (labels / 4.5 - 1)[:, None, None, None].expand(40, 1, 8, 8).contiguous()
    return data.Pictures(images, labels, "greys", "0")


def toy(model: str, **changes) -> Recipe:
    sizes = {"width": 16, "layers": 1, "heads": 2} if model == "dit" else {}
    return Recipe(model=model, **({"steps": 3, "batch": 4} | sizes | changes))


CPU = torch.device("cpu")


class TestTraining:
    @pytest.mark.parametrize("model", NAMES)
    def test_seed_decides_every_bit(self, model):
        def weights(seed):
            pipeline, loss, _ = train.train(toy(model, seed=seed), toy_pictures(), CPU)
            return torch.nn.utils.parameters_to_vector(pipeline.denoiser.parameters()), loss

        (first, loss), (again, same), (other, _) = weights(0), weights(0), weights(1)
        assert torch.equal(first, again)
        assert loss == same
        assert not torch.equal(first, other)

    def test_class_decides_the_picture(self):
        recipe = toy("dit", steps=500, batch=64, lr=5e-3, width=32)
        pipeline, loss, _ = train.train(recipe, toy_pictures(), CPU)
        pipeline.set_progress_bar_config(disable=True)
        run = {"num_inference_steps": 12, "guidance_scale": 1.0, "output_type": "latent"}
        greys = pipeline(list(range(10)), generator=seeded(0), **run).images.mean((1, 2, 3))
        assert loss < 0.1
        # Neighbouring classes are 0.22 apart.
        assert (greys - (torch.arange(10) / 4.5 - 1)).abs().max() < 0.15

    def test_velocity_target(self):
        """A model that knows the noise and the data has no loss; one off by 1 has loss 1."""
        x = torch.randn(4, 1, 8, 8, generator=seeded(0))
        noise = torch.randn(x.shape, generator=seeded(5))

        def oracle(off):
            def velocity(noisy, timestep, labels):
                s = (timestep / 1000)[:, None, None, None]
                torch.testing.assert_close(noisy, x + s * (noise - x))
                return type("Out", (), {"sample": noise - x + off})

            return velocity

        y = torch.zeros(4).long()
        assert losses.flow_loss(oracle(0.0), x, y, seeded(5)) == 0
        assert float(losses.flow_loss(oracle(1.0), x, y, seeded(5))) == pytest.approx(1)

    def test_epsilon_target(self):
        """Against the scheduler's own way to add noise."""
        scheduler = DDIMScheduler()
        x = torch.randn(4, 1, 8, 8, generator=seeded(0))
        noise = torch.randn(x.shape, generator=seeded(5))

        def oracle(noisy, timestep, labels):
            torch.testing.assert_close(noisy, scheduler.add_noise(x, noise, timestep))
            return type("Out", (), {"sample": noise + 0.5})

        abar, y = scheduler.alphas_cumprod, torch.zeros(4).long()
        loss = losses.epsilon_loss(oracle, x, y, seeded(5), abar)
        assert float(loss) == pytest.approx(0.25)

    def test_a_tenth_of_the_labels_is_dropped(self):
        dropped = losses._dropped(torch.zeros(20000).long(), seeded(0)) == 10
        assert abs(float(dropped.float().mean()) - 0.1) < 0.01

    @pytest.mark.parametrize("model", NAMES)
    def test_command_writes_a_folder_that_loads(self, model, fashion_dir):
        out = fashion_dir / model
        words = f"--model {model} --steps 2 --batch 4 --device cpu --commit abc --note short --flip"
        if model == "dit":
            words += " --width 16 --layers 1 --heads 2 --columns 2"
        else:
            words += " --columns 0"
        paths = ["--out", str(out), "--data-dir", str(fashion_dir)]
        assert train.main([*words.split(), *paths]) == 0
        record = load.check(out)
        assert (record["commit"], record["note"], record["device"]) == ("abc", "short", "CPU")
        assert str(fashion_dir) not in json.dumps(record)
        assert record["command"].endswith("--flip")
        if model == "dit":
            assert Image.open(fashion_dir / "dit-grid.png").size == (2 * 28, 10 * 28)
        assert load.load_folder(out)([1], 1, output_type="np").images.shape == (1, 28, 28, 1)

    def test_recorded_command_gives_the_recipe_back(self):
        recipe = Recipe(steps=7, lr=0.5, compile=True)
        words = recipe.command().split()[3:]
        assert train.parse([*words, "--out", "x"])[0] == recipe

    def test_user_errors_exit_with_two(self, tmp_path, caplog):
        words = ["--out", str(tmp_path / "o"), "--data-dir", str(tmp_path)]
        assert train.main(words) == 2
        assert "dataset-fashion-mnist" in caplog.text

    def test_what_does_not_fit(self):
        with pytest.raises(ConfigError, match="0 steps"):
            build(toy("dit", steps=0), 8)
        with pytest.raises(ConfigError, match="--width with --model unet"):
            build(Recipe(model="unet", width=64), 8)
        with pytest.raises(ConfigError, match="'gan'"):
            build(Recipe(model="gan"), 8)

    def test_wider_models_learn_slower_by_default(self):
        assert Recipe().learning_rate == 1e-3
        assert Recipe(width=512).learning_rate == 2.5e-4
        assert Recipe(width=512, lr=0.1).learning_rate == 0.1


def test_training_imports_on_a_bare_machine():
    """The GPU machine that trains has torch, diffusers and Pillow, and none of these."""
    # None in sys.modules makes a library look absent, to import and to diffusers' probing alike.
    absent = "transformers=None, accelerate=None, pydantic=None, cyclopts=None"
    code = f"import sys; sys.modules.update({absent}); import stretto.diffusion.shipped.train"
    assert "stretto.diffusion.shipped.train" in modules_after(code)


def test_loading_imports_the_model_class_itself():
    """diffusers finds a custom class only in a module that somebody imported before."""
    code = "from stretto.diffusion.shipped.load import load; load('dit')"
    assert "stretto.diffusion.shipped.dit" in modules_after(code)


def test_the_unet_twin_is_epsilon_and_ddim():
    pipe = load.load("unet")
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert pipe.num_classes == 10
