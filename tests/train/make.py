"""Small text and small jobs for the tests of the trainer."""

from stretto.plan.model import Plan
from stretto.train.job import Job, build
from stretto.train.presets import task_of
from stretto.train.recipe import Descent, Recipe

#: Descents whose results show a wrong gradient: SGD shows a factor, AdamW a direction.
SGD = Descent(optimizer="sgd", rate=0.05, warmup=2)
ADAMW = Descent(rate=1e-3, warmup=2)


def write_text(folder, files=60, size=400):
    """A folder of files whose bytes say which file and which place they are; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        words = " ".join(f"{number}:{place}" for place in range(size))
        (folder / f"{number:03d}.txt").write_text(words[: size + 7 * number])
    return str(folder)


def recipe(data, **changes):
    fields = {"tokens": 64, "sequences": 4, "steps": 4, "dtype": "float64", "descent": SGD}
    return Recipe(**(fields | {"data": data} | changes))


def trainer(given, mesh, plan=None):
    plan = plan or Plan(kind="train")
    task = task_of(given)
    return build(task, task.model(), Job(recipe=given, plan=plan), mesh)
