"""A job on virtual ranks and on real ones: the same pictures, and a comparison that adds up."""

import json
import subprocess
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stretto.diffusion import compare, folder
from stretto.diffusion.generate import automatic_plan, generate
from stretto.diffusion.job import Job
from stretto.diffusion.worker import Progress, guides, media_of
from stretto.errors import ConfigError, MissingDependency, PlanMismatch, UnsupportedPipeline
from stretto.mesh.launch import launch
from stretto.plan.model import Plan
from stretto.plan.options import Parastep, Steps
from stretto.testing.models import CASES, OTHERS

LABELS = {"class_labels": [1, 4]}
EMULATED = {"source": "dit", "call": LABELS, "steps": 6, "emulated": True}


def quiet(stage, **more):
    """What a rank tells, told to nobody."""


def run(**fields):
    return generate(quiet, Job(**{**EMULATED, **fields}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of tiny pipelines by the name of their case."""
    root = tmp_path_factory.mktemp("pipelines")

    def save(name):
        if not (root / name).exists():
            (CASES | OTHERS)[name].pipeline().save_pretrained(root / name)
        return str(root / name)

    return save


def embeddings(name, at):
    """The tensors that a case passes, as files for --set."""
    call = {}
    for key, value in (CASES | OTHERS)[name].inputs().items():
        if isinstance(value, torch.Tensor):
            np.save(at / f"{key}.npy", value.numpy())
            value = f"@{at / key}.npy"
        if key != "output_type":
            call[key] = value
    return call


# ---- plans and guidance ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "guided", "step", "cfg"),
    [(1, True, 1, 1), (2, True, 1, 2), (8, True, 4, 2), (3, True, 3, 1), (4, False, 4, 1)],
)
def test_automatic_plan(ranks, guided, step, cfg):
    plan = automatic_plan(ranks, guided)
    assert (plan.step.degree, plan.cfg.degree) == (step, cfg)


@pytest.mark.parametrize(
    ("name", "call", "expected"),
    [
        ("sd15-ddim", {}, True),
        ("sd15-ddim", {"guidance_scale": 1.0}, False),
        ("svd", {}, True),
        ("latte", {}, True),
        # A distilled model: its scale is an input of the network, there is one branch.
        ("flux-distilled", {"guidance_scale": 3.5}, False),
        ("flux-distilled", {"true_cfg_scale": 2.0}, False),
        ("flux-distilled", {"true_cfg_scale": 2.0, "negative_prompt": "blur"}, True),
        ("dit", {"guidance_scale": 4.0}, True),
        ("dit", {"guidance_scale": 1.0}, False),
    ],
)
def test_guidance_is_two_branches_not_a_number(name, call, expected):
    assert guides((CASES | OTHERS)[name].pipeline(), call) is expected


def test_a_denoiser_that_takes_the_scale_as_an_input_has_one_branch():
    pipe = CASES["sd15-ddim"].pipeline()
    assert guides(pipe, {"guidance_scale": 7.5})
    pipe.unet.register_to_config(time_cond_proj_dim=256)
    assert not guides(pipe, {"guidance_scale": 7.5})


def test_degree_above_steps_is_refused():
    with pytest.raises(PlanMismatch, match=r"step=8 is larger than the 6 steps"):
        run(ranks=8, plan=Plan(step=8))


def test_an_argument_that_the_pipeline_lacks_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="takes no 'clas_labels'; did you mean 'class_labels'"):
        run(ranks=1, call={"clas_labels": [1]})


# ---- one job ---------------------------------------------------------------------------------


def test_an_item_does_not_depend_on_its_neighbours():
    both = run(ranks=1).runs[0].media.items
    second = run(ranks=1, call={"class_labels": [4]}, seed=1).runs[0].media.items
    assert np.abs(both[1] - second[0]).max() < 1e-5
    assert np.abs(both[0] - second[0]).max() > 1e-2


def test_automatic_guidance_ranks_are_exact_to_rounding():
    outcome = run(ranks=2)
    assert outcome.plan == Plan(cfg=2)
    difference = np.abs(outcome.runs[0].media.items - run(ranks=1).runs[0].media.items).max()
    assert difference < 1e-5


@pytest.mark.ranks
def test_ranks_give_the_bits_of_virtual_ranks():
    job = Job(source="dit", call=LABELS, steps=6, ranks=2, plan=Plan(step=2))
    real = launch(generate, job, ranks=2, timeout_s=60, preload=("stretto.diffusion.compare",))
    emulated = run(ranks=2, plan=Plan(step=2)).runs[0]
    assert np.array_equal(real[0].runs[0].media.items, emulated.media.items)
    # Ranks above 0 do not decode.
    assert real[1].runs[0].media is None
    reports = [outcome.runs[0].report for outcome in real]
    kept = ("evaluations", "network_calls", "bytes_sent", "depth")
    assert [[r[k] for k in kept] for r in reports] == [
        [r[k] for k in kept] for r in emulated.report["ranks"]
    ]


# ---- folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("sd15-ddim", "image"), ("latte", "video"), ("audioldm2", "audio")]
)
def test_a_saved_pipeline_gives_its_kind(saved, tmp_path, name, kind):
    job = {"source": saved(name), "call": embeddings(name, tmp_path), "steps": 4}
    outcome = run(ranks=2, plan=Plan(step=2), **job)
    media = outcome.runs[0].media
    assert media.kind == kind
    assert len(media.items) == 1
    assert np.isfinite(media.items).all()
    assert (media.rate > 0) == (kind != "image")


def test_missing_folder_and_index(tmp_path):
    with pytest.raises(ConfigError, match=r"no folder .*nowhere"):
        folder.describe(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no model_index\.json"):
        folder.describe(tmp_path)


def index(at, content):
    (at / folder.INDEX).write_text(json.dumps(content))
    return at


def test_a_folder_without_denoiser_names_what_it_saw(tmp_path):
    index(tmp_path, {"_class_name": "Odd", "mixer": ["diffusers", "X"], "vae": ["diffusers", "Y"]})
    with pytest.raises(UnsupportedPipeline, match=r"among mixer, vae(.|\n)*--denoiser"):
        folder.describe(tmp_path)
    (tmp_path / "vae").mkdir()
    with pytest.raises(ConfigError, match="lacks mixer, named in its"):
        folder.describe(tmp_path, denoiser="mixer")
    (tmp_path / "mixer").mkdir()
    assert folder.describe(tmp_path, denoiser="mixer").class_name == "Odd"


def test_code_in_the_folder_is_refused_before_it_runs(tmp_path):
    index(tmp_path, {"_class_name": "Odd", "unet": ["evil", "X"]})
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "evil.py").write_text("raise SystemExit")
    with pytest.raises(UnsupportedPipeline, match=r"code of its own .*unet/evil\.py"):
        folder.open_pipeline(tmp_path)
    index(tmp_path, {"_class_name": ["evil", "Odd"], "unet": ["diffusers", "X"]})
    with pytest.raises(UnsupportedPipeline, match="code of its own"):
        folder.describe(tmp_path)


def test_unknown_shipped_model_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'unet'"):
        folder.describe("shipped:unt")


def test_foreign_torchvision_is_found_before_anything_starts(monkeypatch):
    versions = {"torchvision": "0.28.0+cu130", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(folder.metadata, "version", versions.__getitem__)
    broken = SimpleNamespace(returncode=1, stderr="RuntimeError: operator nms does not exist")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: broken)
    with pytest.raises(MissingDependency, match=r"0\.28\.0\+cu130 .*nms(.|\n)*pip uninstall"):
        folder.check_torchvision()
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=0))
    folder.check_torchvision()


# ---- comparison ------------------------------------------------------------------------------


def test_methods_at_equal_ranks():
    two = {m.who: m.plan for m in compare.methods(Plan(cfg=2), 50, guided=True)}
    assert two == {
        "sequential": None,
        "ours": Plan(cfg=2),
        "published parastep": Plan(step=Steps(degree=2, windows=Parastep())),
        "step alone": Plan(step=2),
    }
    four = {m.who: m.plan for m in compare.methods(Plan(step=2, cfg=2), 50, guided=True)}
    assert {plan.world_size for plan in four.values() if plan} == {4}
    assert "cfg alone" in four
    odd = {m.who for m in compare.methods(Plan(step=3), 50, guided=True)}
    assert odd == {"sequential", "ours", "published parastep"}


def test_depth_counts_cut_batches_at_their_cost():
    report = {"windows": [{"size": size} for size in (1, 2, 2, 1)]}
    half = {(2, 1): float(Fraction(1, 2))}
    assert compare.depth_of(report, Plan(step=2), half) == 3.0
    published = Plan(step=Steps(degree=2, windows=Parastep()))
    assert compare.depth_of(report, published, half) == 4.0


def test_comparison_adds_up():
    outcome = run(ranks=2, plan=Plan(step=2), repeats=3, call={"class_labels": [3]})
    table = {row["who"]: row for row in compare.rows([outcome], timed=False)}
    assert set(table) == {
        "sequential",
        "ours",
        "published parastep",
        "cfg alone",
        "fewer steps",
    }
    assert table["sequential"]["evaluations"] == [6]
    assert table["sequential"]["identical"]
    assert table["published parastep"]["evaluations"] == [4, 4]
    assert table["fewer steps"]["steps"] == round(table["ours"]["depth"])
    assert table["cfg alone"]["psnr_db"] > 100
    assert all(len(run.seconds) == 3 for run in outcome.runs)
    # A row that computes something else must be seen to.
    assert table["fewer steps"]["psnr_db"] < 60
    assert np.array_equal(outcome.floor.items, outcome.runs[3].media.items)


def test_fewer_steps_take_as_many_evaluations_as_ours_where_steps_take_several(saved, tmp_path):
    source, call = saved("sd15-heun"), embeddings("sd15-heun", tmp_path)
    job = {"source": source, "call": {**call, "height": 16, "width": 16}, "steps": 8}
    outcome = run(**job, ranks=2, plan=Plan(step=Steps(degree=2, exact_split=False)), repeats=1)
    table = {row["who"]: row for row in compare.rows([outcome], timed=False)}
    assert (table["sequential"]["depth"], table["sequential"]["evaluations"]) == (15, [15])
    assert table["ours"]["scheduler_steps"] == 15
    (evaluations,) = table["fewer steps"]["evaluations"]
    assert evaluations == table["fewer steps"]["depth"]
    assert abs(evaluations - table["ours"]["depth"]) <= 1
    assert not table["fewer steps"]["identical"]


# ---- small parts -----------------------------------------------------------------------------


def test_long_messages_of_pipelines_keep_their_ends(saved, tmp_path):
    call = embeddings("latte", tmp_path) | {"negative_prompt": ""}
    with pytest.raises(ConfigError, match="Cannot forward both") as caught:
        run(source=saved("latte"), ranks=1, call=call)
    assert len(str(caught.value)) < 1500


def test_progress_serves_both_ways_pipelines_use_a_bar():
    told = []

    def tell(stage, **more):
        told.append((stage, more["done"], more["total"]))

    with Progress(tell, "a", None, 3) as bar:
        bar.update()
        bar.update(2)
    assert list(Progress(tell, "b", [5, 6], None)) == [5, 6]
    assert [entry for entry in told if entry[1] == entry[2]] == [("a", 3, 3), ("b", 2, 2)]


def test_a_result_of_no_known_kind_is_refused():
    with pytest.raises(UnsupportedPipeline, match="neither images, frames nor audios"):
        media_of(object(), SimpleNamespace(latents=1), {})
