"""The alias `candidate` moves to a version that is not worse, and a person's decision is never undone."""

import pytest
from mlflow import MlflowClient

from pipelines.tracking.candidate import nominate

NAME, MARK = "demo", "alias.candidate"


@pytest.fixture
def propose(client):
    """Returns a function that nominates the version with the name of a letter, which it creates at first.

    The function returns the outcome of `nominate`, and the letter of the version that then has the alias.
    """
    client.create_registered_model(NAME)
    numbers: dict[str, str] = {}

    def propose(letter, accuracy=None, metric="val/accuracy", data="data", higher_is_better=True):
        if letter not in numbers:
            tags = {"content.sha256": f"0{letter[0]}"}  # `a again` is the same model as `a`
            numbers[letter] = str(client.create_model_version(NAME, f"models/{letter}", tags=tags).version)
        client.set_model_version_tag(NAME, numbers[letter], "dataset.digest", data)
        if accuracy is not None:
            client.set_model_version_tag(NAME, numbers[letter], "metric.val/accuracy", str(accuracy))
        version = client.get_model_version(NAME, numbers[letter])
        told = nominate(client, version, "candidate", metric, higher_is_better)
        return told, holder()

    def holder():
        number = client.get_registered_model(NAME).aliases.get("candidate")
        return next(
            (letter for letter, own in numbers.items() if number is not None and own == str(number)), None
        )

    return propose


GIVEN = "alias candidate"


def test_the_alias_moves_to_a_version_that_is_not_worse_and_to_no_other(propose):
    assert propose("a", 0.5) == (GIVEN, "a")
    assert propose("a", 0.5) == (GIVEN, "a")
    told = "without alias candidate, which version 1 has: val/accuracy is 0.4 here, 0.5 there"
    assert propose("b", 0.4) == (told, "a")
    assert propose("c", 0.5) == (GIVEN, "c")
    assert propose("a", 0.5) == (GIVEN, "a")  # a machine took the alias from it, and it is not worse
    assert propose("d", 0.9) == (GIVEN, "d")
    assert propose("a", 0.5)[1] == "d"


def test_of_a_metric_that_should_fall_the_lower_value_wins(propose):
    assert propose("a", 0.5, higher_is_better=False)[1] == "a"
    assert propose("b", 0.6, higher_is_better=False)[1] == "a"
    assert propose("c", 0.4, higher_is_better=False)[1] == "c"


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"metric": None}, "no metric decides"),
        ({"data": "other data"}, "the two were measured on different data"),
        ({"accuracy": None}, "val/accuracy was not measured on this one"),
        ({"accuracy": float("nan")}, "val/accuracy was not measured on this one"),
    ],
)
def test_what_cannot_be_compared_does_not_move_it(propose, other, why):
    assert propose("a", 0.5) == (GIVEN, "a")
    assert propose("b", **{"accuracy": 0.9, **other}) == (
        f"without alias candidate, which version 1 has: {why}",
        "a",
    )


def test_a_version_from_which_a_person_took_the_alias_never_gets_it_back(propose, client):
    propose("a", 0.5)
    propose("b", 0.9)
    client.delete_registered_model_alias(NAME, "candidate")
    assert propose("b", 0.9) == ("without alias candidate, which a person took away from it", None)
    assert propose("a", 0.5) == (GIVEN, "a")  # nobody rejected this one
    assert propose("b", 0.9)[1] == "a"
    assert propose("c", 0.6)[1] == "c"


@pytest.mark.parametrize("decision", ["rejected", "approved"])
def test_a_version_that_a_person_decided_on_is_no_candidate_again(propose, client, decision):
    propose("a", 0.5)
    client.set_model_version_tag(NAME, "1", "decision", decision)
    client.delete_registered_model_alias(NAME, "candidate")
    assert propose("a", 0.5) == (f"without alias candidate, for a person decided on it ({decision})", None)
    assert propose("b", 0.1) == (GIVEN, "b")


def test_a_version_that_a_person_gave_the_alias_keeps_it(propose, client):
    propose("a", 0.5)
    propose("b", 0.1)
    client.set_registered_model_alias(NAME, "candidate", "2")
    client.set_registered_model_alias(NAME, "champion", "2")
    assert propose("a", 0.5) == ("without alias candidate, which a person took away from it", "b")
    assert propose("c", 0.9) == ("without alias candidate, which version 2 has by a person's hand", "b")
    assert propose("b", 0.1) == (GIVEN, "b")
    assert str(client.get_model_version_by_alias(NAME, "champion").version) == "2"


def test_a_model_whose_files_were_lost_has_the_rights_of_its_first_version(propose, client):
    propose("a", 0.5)
    assert propose("a again", 0.5) == (GIVEN, "a again")
    client.set_model_version_tag(NAME, "2", "decision", "rejected")
    client.delete_registered_model_alias(NAME, "candidate")
    assert propose("a once more", 0.5) == (
        "without alias candidate, for a person decided on it (rejected)",
        None,
    )
    propose("b", 0.5)
    client.delete_registered_model_alias(NAME, "candidate")
    assert propose("b again", 0.5) == ("without alias candidate, which a person took away from it", None)


# The writes of `nominate`: the marks of both versions, the alias, the new holder's mark.
@pytest.mark.parametrize("write", range(4))
def test_a_nomination_that_dies_between_its_writes_is_completed_when_it_is_repeated(
    propose, monkeypatch, write
):
    propose("a", 0.5)
    with monkeypatch.context() as dying:
        done = []

        def dies(real):
            def call(*arguments):
                if arguments[-2] == "candidate" or arguments[-2] == MARK:
                    if len(done) == write:
                        raise ConnectionError
                    done.append(arguments)
                return real(*arguments)

            return call

        for name in ("set_model_version_tag", "set_registered_model_alias"):
            dying.setattr(MlflowClient, name, dies(getattr(MlflowClient, name)))
        with pytest.raises(ConnectionError):
            propose("b", 0.9)
    assert propose("b", 0.9) == (GIVEN, "b")
    assert propose("a", 0.5)[1] == "b"
    assert propose("c", 0.95) == (GIVEN, "c")
