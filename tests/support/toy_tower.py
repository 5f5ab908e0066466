"""A tiny image tower, its teacher, and ranks that learn from it together."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.bcos import BcosLinear
from pipelines.data.loading.batch import Batch
from pipelines.distributed import gather_rows
from pipelines.methods import ClipBcosification, ImageText, ImageTextTraining
from pipelines.metrics import Recall
from pipelines.params import ClipParams, DataParams, ImageTextParams, MethodParams, TrainingParams
from pipelines.training import Context, Job
from pipelines.training.loop import set_up
from pipelines.training.step import compute_gradients
from tests.support.method_params import method_params

SIDE, WIDTH, COUNT, CLASSES = 4, 8, 14, 3
SHARES: dict[int, dict[str, tuple[int, ...]]] = {
    2: {"equal": (7, 7), "unequal": (9, 5), "idle": (0, 14)},
    4: {"unequal": (3, 4, 4, 3), "very": (7, 1, 2, 4), "idle": (6, 0, 7, 1)},
}


class ToyTower(nn.Module):
    """Maps images (N, 6, SIDE, SIDE) to embeddings (N, width), without a norm over the batch."""

    def __init__(self, seed: int, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = BcosLinear(6 * SIDE * SIDE, 16), BcosLinear(16, width)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(images.flatten(1)).relu())


class ToyText(nn.Module):
    """Maps texts, which are numbers, (T, 1) to embeddings (T, WIDTH)."""

    width = WIDTH

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(COUNT, WIDTH)

    def tokens(self, texts: list[str]) -> Tensor:
        return torch.tensor([[int(text)] for text in texts])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens[:, 0])


def clip_params(**values: Any) -> ClipParams:
    return method_params(ClipParams, **{"epochs": 2, "batch_size": COUNT, **values})


def taught(params: ClipParams) -> ClipBcosification:
    """Returns a student and its teacher, with the same weights on each call."""
    return ClipBcosification(ToyTower(1), ToyTower(2), params)


def pair(params: ImageTextParams) -> ImageTextTraining:
    """Returns an image tower and a text tower, with the same weights on each call."""
    classes = CLASSES if params.label_weight > 0 else 0
    towers = ImageText(ToyTower(1), ToyText(2), params.loss, params.locked, classes)  # type: ignore[arg-type]
    return ImageTextTraining(towers, params)


def images_of(count: int = COUNT) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def batch_of(rows: range, count: int = COUNT) -> Batch:
    """Returns images with captions and labels; for a rank without images, the loader's empty batch."""
    if not rows:
        return {"key": [], "skipped": 1}
    names = [str(row) for row in rows]
    images, labels = images_of(count)[rows.start : rows.stop], torch.tensor(rows) % CLASSES
    return {"key": names, "image": images, "caption": names, "label": labels, "skipped": 0}


def batches(
    job: Job, split: str, *, context: Context | None = None, epoch: int = 0, start_batch: int = 0, **_: Any
) -> list[Batch]:
    """Returns batches of all images for one worker: ten per epoch in training, one in evaluation."""
    return [batch_of(range(COUNT))] * (10 - start_batch if split == "train" else 1)


def job_of(build: Any, optim: MethodParams, directory: str = "", **training: Any) -> Job:
    data = DataParams(image_size=SIDE, on_error="skip")
    params = TrainingParams(**{"workers": 0, **training})
    return Job(build, "", data, optim, params, seed=1, directory=directory, batches=batches)


def step(context: Context, job: Job, rows: range) -> tuple[float, Tensor]:
    """Returns the loss of a rank's share of the images, and the gradient after DDP has averaged it."""
    run = set_up(context, job)
    run.objective.train()
    found = compute_gradients(run, batch_of(rows))
    gradients = [parameter.grad for parameter in run.method.module.parameters() if parameter.grad is not None]
    return float(found.get("loss", torch.zeros(()))), torch.cat(
        [gradient.flatten() for gradient in gradients]
    )


def rows_of(shares: tuple[int, ...], rank: int) -> range:
    return range(sum(shares[:rank]), sum(shares[: rank + 1]))


def all_cases(world_size: int) -> dict[str, tuple[Job, tuple[int, ...]]]:
    """Returns name -> (job of `world_size` workers, number of images of each)."""
    found = {}
    for name, shares in SHARES[world_size].items():
        size = {"batch_size": world_size * max(shares)}
        for parts in (1, 2):
            optim = clip_params(**size)
            found[f"siglip {name} {parts}"] = (
                job_of(partial(taught, optim), optim, workers=world_size, accumulate=parts),
                shares,
            )
    equal = (COUNT // world_size,) * world_size
    for loss in ("clip", "siglip"):
        for locked in (False, True):
            labels = 0.0 if locked else 0.5
            pairs = method_params(
                ImageTextParams, batch_size=COUNT, loss=loss, locked=locked, label_weight=labels
            )
            found[f"{loss} {locked}"] = job_of(partial(pair, pairs), pairs, workers=world_size), equal
    return found


def recall_on_rank(context: Context, images: Tensor, texts: Tensor, owners: Tensor) -> dict[str, float]:
    """Returns the recall over all ranks. Rank 0 has two batches, rank 1 has the rest, others have none."""
    metric = Recall(images.shape[1])
    cuts = {0: (0, 7, 15), 1: (15, len(images))}.get(context.rank, ())
    for start, stop in pairwise((0, len(images)) if context.world_size == 1 else cuts):
        own = (owners >= start) & (owners < stop)
        metric.update(images[start:stop], texts[own], owners[own] - start)
    return {name: float(value) for name, value in metric.compute().items()}


def on_rank(rank: int, world_size: int, folder: str, retrieval: tuple[Tensor, Tensor, Tensor]) -> None:
    """Runs all cases on a rank and saves the results to `folder/RANK.pt`."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    context = Context(rank, world_size)
    cases = all_cases(world_size).items()
    found: dict[str, Any] = {name: step(context, job, rows_of(shares, rank)) for name, (job, shares) in cases}
    found["rows"] = gather_rows(torch.full((rank, 2), float(rank)), context, world_size)
    found["recall"] = recall_on_rank(context, *retrieval)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
