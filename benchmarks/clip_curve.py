"""How zero-shot accuracy and recall of a B-cosified image tower grow with the images that it has seen.

    python -m benchmarks.clip_curve cnn runs/clip/cnn/HASH [--every 149]

Evaluates the original tower, and then each checkpoint of a finished run of the stage `clip`, on the data sets
that `params.yaml` names for zero-shot classification and retrieval. `training.keep_last` decides how many
checkpoints a run keeps. Prints one line of JSON per checkpoint: `images` is the number of images that the
tower has been trained on, and `kept` has each figure's share of the original's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace

from pipelines import models
from pipelines.distributed import Context
from pipelines.evaluation.retrieval import evaluate_retrieval
from pipelines.evaluation.zero_shot import evaluate_zero_shot
from pipelines.models import read_spec
from pipelines.params import Params, load
from pipelines.training import checkpoints
from pipelines.workflow.places import shards_of

FIGURES = ("image_to_text_recall_at_10", "text_to_image_recall_at_10")


def main() -> None:
    """Prints the curve of one run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tower", choices=["cnn", "vit"])
    parser.add_argument("run", help="directory of the run that trained models/clip/TOWER")
    parser.add_argument(
        "--every", type=int, default=1, help="only steps that this divides, such as an epoch's"
    )
    asked = parser.parse_args()
    params = load()
    original = measured(params, asked.tower, original_folder(asked.tower))
    print(json.dumps({"tower": "original", **original}))
    for step in checkpoints.steps(asked.run):
        if step % asked.every == 0:
            found = of_checkpoint(params, asked.tower, asked.run, step)
            kept = {name: round(value / original[name], 4) for name, value in found.items()}
            images = step * getattr(params.clip, asked.tower).bcosify.optim.batch_size
            print(json.dumps({"step": step, "images": images, **found, "kept": kept}), flush=True)


def of_checkpoint(params: Params, tower: str, run: str, step: int) -> dict[str, float]:
    """The figures of the tower as it was after `step` steps."""
    design = getattr(params.clip, tower).bcosify.design()  # a checkpoint has the buffers of schedules
    spec = replace(read_spec(f"models/clip/{tower}"), design=design)
    model = models.assemble(spec, check=False)
    model.load_state_dict(checkpoints.load(run, step)["model"])
    with tempfile.TemporaryDirectory() as folder:
        models.save(folder, model.eval(), spec)
        return measured(params, tower, folder)


def measured(params: Params, tower: str, folder: str) -> dict[str, float]:
    """Zero-shot accuracy and recall@10 both ways of the image tower in `folder` on the test splits."""
    clip, context = params.clip, Context()
    towers, texts = {"tower": folder}, {"tower": original_folder(tower)}
    labelled, pairs = shards_of(clip.labelled), shards_of(clip.pairs)
    zero_shot = evaluate_zero_shot(context, towers, labelled, clip.data, clip.evaluate, texts=texts)
    recall = evaluate_retrieval(context, towers, pairs, clip.data, clip.evaluate, texts=texts)
    accuracy = {"accuracy": zero_shot["models"]["tower"]["accuracy"]}
    return accuracy | {name: recall["models"]["tower"][name] for name in FIGURES}


def original_folder(tower: str) -> str:
    """Folder of the original image tower and its text tower."""
    return f"models/image_text/{tower}"


if __name__ == "__main__":
    main()
