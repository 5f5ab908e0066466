"""Stage `evaluate`: evaluates all models on the validation and test splits, see `reports/evaluate`."""

from pipelines.data.shards.manifest import read_manifest
from pipelines.evaluation import figures
from pipelines.evaluation.gallery import draw_gallery
from pipelines.storage.files import write_json
from pipelines.workflow.evaluating import CODE, classifiers, evaluate_models, save_records, students
from pipelines.workflow.identity import of_data
from pipelines.workflow.places import REPORTS, shards_of
from pipelines.workflow.reports import flat, write_localisation
from pipelines.workflow.running import stage
from pipelines.workflow.sharing import shards_for_all
from pipelines.workflow.training import tracked

OUT = REPORTS / "evaluate"
SPLITS = ("val", "test")  # gates judge by the first, reports show the second


def main() -> None:
    """Evaluates the conventional, B-cos and published networks, then the teacher and its students.

    Grids are made of images that all models of a group classify correctly. Students form a group of their own
    with their teacher, so that a weak student does not reduce the grids of the other models.
    """
    with stage() as params:
        models, followers = (
            classifiers(params, read_manifest(shards_of(params.dataset)).classes),
            students(params),
        )
        upstream = (*models.values(), *followers.values())
        settings = (of_data(params.data), params.evaluate)
        with tracked(params, "evaluate", *settings, upstream=upstream, code=CODE, context="evaluation") as (
            run,
            _,
        ):
            records = evaluate_models(params, models, SPLITS)
            of_followers = evaluate_models(params, followers, SPLITS, "teacher")
            save_records(OUT / "records", records)
            save_records(OUT / "student_records", of_followers)
            metrics, of_students = figures(records["test"]), figures(of_followers["test"])
            write_json(OUT / "metrics.json", metrics)
            write_json(OUT / "students.json", of_students)
            write_localisation(OUT / "localisation.csv", metrics["models"] | of_students["models"])
            run.metrics(flat({"test": metrics["models"], "students": of_students["models"]}))
            view = (shards_for_all(params), params.data, params.evaluate)
            right, of_student = (
                found["test"].right(list(of)[-1])
                for found, of in ((records, models), (of_followers, followers))
            )
            run.pictures(draw_gallery(OUT / "pictures", models, right, *view))
            draw_gallery(OUT / "student_pictures", followers, of_student, *view)


if __name__ == "__main__":
    main()
