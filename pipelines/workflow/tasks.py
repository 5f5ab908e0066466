"""One function per training stage, which returns its task: method, spec of the model, starting point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pipelines import models
from pipelines.data.loading.subsets import Subset, annotated_images, few_shot, validation_images
from pipelines.data.shards.manifest import Manifest, read_manifest
from pipelines.data.shards.sample import DataError
from pipelines.data.shards.stored_explanations import INDEX, Origin, check_origin
from pipelines.methods import (
    build_bcosification,
    build_classifier,
    build_clip,
    build_e2kd,
    build_guidance,
    build_image_text,
    build_pretrain,
    check_equal_shares,
    check_guidable,
    check_pair,
    classifier_spec,
)
from pipelines.methods.stored_explanations import origin_of
from pipelines.models import ModelSpec, chosen_preprocessing, read_spec
from pipelines.models.image_size import image_size_errors
from pipelines.params import (
    ClipParams,
    MethodParams,
    ModelParams,
    Params,
    ParamsError,
    TowersParams,
    keyed,
    param,
)
from pipelines.training import Job
from pipelines.workflow.places import STORED_EXPLANATIONS, model_folder, shards_of
from pipelines.workflow.sharing import (
    absolute_weights,
    explanations_for_all,
    model_for_all,
    of_config_file,
    shards_for_all,
)

if TYPE_CHECKING:
    from pipelines.methods.method import Method


@dataclass(frozen=True)
class Task:
    """The training of a stage.

    Attributes:
        params: params of the run, with `data` and `dataset` of this stage.
        name: name of the stage and of its folders in `models` and `reports`.
        method: the stage's own params.
        build: builds the method, in every worker.
        spec: spec of the trained model.
        upstream: folders of models of earlier stages that `build` starts from.
        model: the model whose weights are trained, if training does not start from `upstream`.
        subset: training images to use, `None` for all; `models/<name>/subset.json` lists them.
        explanations: root of the stored explanations of the training images.
        notes: file name -> JSON about the training data, saved beside the model.
        save: saves the trained module: `save(folder, module, spec)`.
    """

    params: Params
    name: str
    method: MethodParams
    build: Callable[[], Method]
    spec: ModelSpec
    upstream: tuple[Path, ...] = ()
    model: ModelParams | None = None
    subset: Subset | None = None
    explanations: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    save: Callable[[Path, nn.Module, ModelSpec], None] = models.save

    @property
    def section(self) -> str:
        """Key of `method` in params.yaml."""
        stage, _, which = self.name.partition("/")
        sections = {"classify": "guide.classify", "guide": "guide.guided"}
        sections |= {"image_text": f"clip.{which}.pretrain", "clip": f"clip.{which}.bcosify"}
        return sections.get(stage, self.name.replace("/", "."))

    def all_notes(self) -> dict[str, Any]:
        """Returns `notes`, and the subset if there is one."""
        return dict(self.notes) | ({} if self.subset is None else {"subset.json": self.subset.to_json()})

    def weights(self) -> ModelParams | None:
        """Returns `model` with the absolute path and sha256 of its weights file."""
        return None if self.model is None else absolute_weights(self.model)

    def stored_index(self) -> str | None:
        """Returns the index of the stored explanations, which names their teacher and each shard's sha256."""
        return None if self.explanations is None else Path(self.explanations, INDEX).read_text()

    def job(self, directory: str, **more: Any) -> Job:
        """Returns the job of the training loop in `directory`. `more` are further arguments of `Job`."""
        params = self.params
        return Job(
            build=self.build,
            shards=shards_for_all(params),
            data=params.data,
            params=self.method,
            training=params.training.with_loader(params.data.loader_workers),
            seed=params.seed,
            directory=directory,
            subset=None if self.subset is None else self.subset.numbers,
            explanations=explanations_for_all(params, self.explanations),
            spec=self.spec,
            **more,
        )


def pretrain(params: Params) -> Task:
    """Returns the training of the conventional model."""
    spec = _classifier_spec(params, kind="conventional")
    build = partial(build_pretrain, absolute_weights(params.model), spec, params.pretrain, params.seed)
    return Task(params, "pretrain", params.pretrain, build, spec, model=params.model)


def bcosify(params: Params, start: str) -> Task:
    """Returns the training of a B-cos network whose weights start `pretrained` or from `scratch`."""
    method = getattr(params.bcosify, start)
    spec = _classifier_spec(params, kind="bcos", design=method.design())
    upstream = (model_folder("pretrain"),) if start == "pretrained" else ()
    conventional = model_for_all(params, upstream[0]) if upstream else None
    build = partial(build_bcosification, spec, conventional, method, params.seed)
    return Task(params, f"bcosify/{start}", method, build, spec, upstream=upstream)


def distill(params: Params, run: str) -> Task:
    """Returns the training of a student of `models/teacher` with the loss of `run`, `kd` or `e2kd`."""
    method, teacher = getattr(params.distill, run), model_folder("teacher")
    manifest, teacher_spec = read_manifest(shards_of(params.dataset)), read_spec(teacher)
    spec = student_spec(params, manifest, teacher_spec)
    with keyed("distill", params.distill):
        check_pair(spec, teacher_spec, explained=method.explanation_weight > 0)
    if method.label_weight > 0 and not manifest.labelled:
        raise ParamsError(
            f"distill.{run}.label_weight: {params.dataset} has no labels; "
            f"0 is wanted, not {method.label_weight:g}"
        )
    subset, notes, explanations = None, {}, None
    if params.distill.shots is not None:
        shards = shards_for_all(params)
        with keyed("distill", params.distill):
            subset = few_shot(shards, "train", params.distill.shots, params.distill.shots_seed)
        notes = {"validation.json": validation_images(shards)}
    if method.explanations == "frozen":
        explanations = str(STORED_EXPLANATIONS.absolute())
        check_origin(explanations, explanations_origin(params))
    student = absolute_weights(params.distill.student)
    build = partial(
        build_e2kd, student, spec, model_for_all(params, teacher), method, params.seed, manifest.labelled
    )
    return Task(
        params,
        f"distill/{run}",
        method,
        build,
        spec,
        upstream=(teacher,),
        model=params.distill.student,
        subset=subset,
        explanations=explanations,
        notes=notes,
    )


def classify(whole: Params) -> Task:
    """Returns the training before guidance: `models/backbone` with a new head, on the data of `guide`."""
    params, backbone = whole.for_guide(), model_folder("backbone")
    manifest = read_manifest(shards_of(params.dataset))
    spec = classifier_spec(backbone, manifest.classes, manifest.task, params.data.image_size)
    build = partial(build_classifier, spec, model_for_all(params, backbone), params.seed)
    # The stage `guide` needs boxes. Without any, fail here rather than after this training.
    check_boxes(shards_of(params.dataset))
    with keyed("guide.guided", params.guide.guided), image_size_errors(spec, params.data.image_size):
        check_guidable(build().module, spec, params.guide.guided)
    return Task(params, "classify", params.guide.classify, build, spec, upstream=(backbone,))


def guide(whole: Params) -> Task:
    """Returns the training of the classifier in `models/classify` with guidance."""
    params, classifier = whole.for_guide(), model_folder("classify")
    method, keys = params.guide.guided, None
    check_boxes(shards_of(params.dataset))
    if method.annotated < 1:
        keys = annotated_images(shards_for_all(params), "train", method.annotated, method.annotated_seed)
    build = partial(build_guidance, model_for_all(params, classifier), method, keys)
    notes = {} if keys is None else {"annotated.json": {"count": len(keys), "keys": keys}}
    return Task(params, "guide", method, build, read_spec(classifier), upstream=(classifier,), notes=notes)


def image_text(whole: Params, tower: str) -> Task:
    """Returns the training of the image tower and text tower of `clip.<tower>` on images with captions."""
    params, section = whole.for_clip(whole.clip.pairs), f"clip.{tower}"
    pair: TowersParams = getattr(params.clip, tower)
    model, text = of_config_file(pair.model, "vision_cfg"), of_config_file(pair.text, "text_cfg")
    manifest = read_manifest(shards_of(params.dataset))
    check_captions(manifest, params.dataset)
    if pair.pretrain.label_weight > 0 and not manifest.labelled:
        raise DataError(f"{section}.pretrain.label_weight: {params.dataset} has no labels: 0 is right for it")
    known = replace(manifest, classes=(), task="embedding")  # type: ignore[arg-type]
    spec = _spec(params, f"{section}.model", known, kind="conventional")
    with keyed(f"{section}.pretrain.optim", pair.pretrain.optim):
        check_equal_shares(pair.pretrain.optim.batch_size, params.training, params.data)
    build = partial(
        build_image_text,
        absolute_weights(model),
        spec,
        absolute_weights(text),
        pair.pretrain,
        params.seed,
        len(manifest.classes),
        manifest.task,
    )
    return Task(params, f"image_text/{tower}", pair.pretrain, build, spec, model=pair.model, save=save_pair)


def clip(whole: Params, tower: str) -> Task:
    """Returns the training of a B-cosified image tower.

    The original in `models/image_text/<tower>` is its start and its teacher. Only images are needed.
    """
    params, original = whole.for_clip(whole.clip.images), model_folder(f"image_text/{tower}")
    method: ClipParams = getattr(params.clip, tower).bcosify
    spec = replace(read_spec(original), kind="bcos", design=method.design())
    build = partial(build_clip, spec, model_for_all(params, original), method, params.seed)
    save = partial(save_with_text, original)
    return Task(params, f"clip/{tower}", method, build, spec, upstream=(original,), save=save)


TASKS: dict[str, Callable[..., Task]] = {
    task.__name__: task for task in (pretrain, bcosify, distill, classify, guide, image_text, clip)
}


def student_spec(params: Params, manifest: Manifest, teacher: ModelSpec) -> ModelSpec:
    """Returns the student's spec, with the classes of the data or, if it has no labels, of the teacher."""
    student, known = params.distill.student, manifest if manifest.labelled else teacher
    return _spec(params, "distill.student", known, kind=student.kind, design=student.design())


def explanations_origin(params: Params) -> Origin:
    """Returns what the stored explanations of the teacher in `models/teacher` depend on."""
    teacher, shards = model_folder("teacher"), shards_of(params.dataset)
    return origin_of(str(teacher), shards, params.data, params.distill.frozen, params.distill.student.kind)


def check_boxes(shards: str) -> None:
    """Raises `DataError` unless the splits `train` and `val` have boxes."""
    fields = read_manifest(shards).fields
    for split in ("train", "val"):
        if "boxes" not in fields.get(split, ()):
            raise DataError(f"guide.dataset: no image of {split} in {shards} has a box: guidance needs some")


def check_captions(manifest: Manifest, dataset: str) -> None:
    """Raises `DataError` unless the splits `train` and `val` have captions."""
    for split in ("train", "val"):
        if "caption" not in manifest.fields.get(split, ()):
            raise DataError(
                f"clip.pairs: no image of {split} in {dataset} has a caption: "
                "an image tower and a text tower learn from pairs"
            )


def save_pair(folder: Path, module: nn.Module, spec: ModelSpec) -> None:
    """Saves the image tower and the text tower of a module of `ImageTextTraining`."""
    models.save(folder, module.image, spec)  # type: ignore[arg-type]
    models.save_text_tower(folder, module.text)  # type: ignore[arg-type]


def save_with_text(original: Path, folder: Path, module: nn.Module, spec: ModelSpec) -> None:
    """Saves a B-cosified image tower with the text tower of the model in `original`."""
    models.save(folder, module, spec)
    models.save_text_tower(folder, models.load_text_tower(original))


def _classifier_spec(params: Params, **more: Any) -> ModelSpec:
    """Returns the spec of the run's model for the run's data; raises `DataError` if it has no labels."""
    manifest = read_manifest(shards_of(params.dataset))
    if not manifest.labelled:
        raise DataError(
            f"dataset: {params.dataset} has no labels: only students of a teacher learn from it (distill)"
        )
    return _spec(params, "model", manifest, **more)


def _spec(params: Params, section: str, known: Manifest | ModelSpec, **more: Any) -> ModelSpec:
    """Returns the spec of the model in `section` of the params, with the classes and task of `known`."""
    model: ModelParams = param(params, section)
    preprocessing = chosen_preprocessing(
        model.name,
        model.weights,
        model.options,
        mean=model.mean,
        std=model.std,
        image_size=params.data.image_size,
        eval_resize=params.data.eval_resize,
        section=section,
    )
    name, options = models.resolved_name(model.name, {**preprocessing.options, **model.options})
    return ModelSpec(
        name=name,
        classes=tuple(known.classes),
        image_size=params.data.image_size,
        task=known.task,  # type: ignore[arg-type]
        mean=preprocessing.mean,
        std=preprocessing.std,
        options=options,
        weights_view=preprocessing.view,
        **more,
    )
