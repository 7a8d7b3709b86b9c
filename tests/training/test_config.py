"""Settings files: mistakes are named, changes from the command line are typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from triptych.apps.cli.train import recipe_files
from triptych.errors import SettingsError
from triptych.training.config import RunSettings, check_settings, read_settings

MINIMAL = {"recipe": "stage_c", "out": "runs/x"}


def test_placeholders_stand_for_the_folder_of_the_file_and_the_output(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'recipe = "stage_c"\nout = "o"\n[data]\nshards = ["{here}/a.tar"]\n[parts]\nsemantic = "{out}/s"\n'
    )
    run = read_settings(file, ["out=elsewhere"])
    assert run.data.shards == (f"{tmp_path}/a.tar",)
    assert run.parts.semantic == "elsewhere/s"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("optim.lrr=1", 'unknown key "optim.lrr"; did you mean "lr"'),
        ("stepps=1", 'did you mean "steps"'),
        ("steps=0", "greater than or equal to 1"),
        ("steps=many", "steps"),
        ("recipe=stage_d", "recipe"),
        ("optim=3", "optim"),
        ("steps", "key=value"),
        ("steps.a=1", '"steps" is a value'),
    ],
)
def test_a_wrong_setting_is_one_sentence(change: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('recipe = "stage_c"\nout = "o"\nsteps = 5\n')
    with pytest.raises(SettingsError) as raised:
        read_settings(file, [change])
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_or_broken_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        read_settings(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(SettingsError, match="not valid TOML"):
        read_settings(tmp_path / "bad.toml")


REPOSITORY = Path(__file__).parents[2]
RECIPES = [path for path in sorted(REPOSITORY.glob("recipes/*/*.toml")) if path.stem != "study"]


@pytest.mark.parametrize("path", [*RECIPES, *REPOSITORY.glob("triptych/recipes/*.toml")], ids=str)
def test_every_recipe_in_the_repository_is_valid(path: Path) -> None:
    assert isinstance(read_settings(path), RunSettings)


@pytest.mark.parametrize("folder", ["tiny", "mini"])
def test_a_folder_of_recipes_is_trained_whole_and_leaves_its_study_alone(folder: str) -> None:
    own = [path for path in RECIPES if path.parent.name == folder]
    assert (own[0].parent / "study.toml").exists()
    assert recipe_files(own[0].parent) == own
    assert recipe_files(own[0]) == [own[0]]


values = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats()
    | strategies.text(),
    lambda inner: (
        strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(), inner, max_size=3)
    ),
    max_leaves=5,
)
keys = strategies.sampled_from(sorted(RunSettings.model_fields)) | strategies.text()


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(strategies.dictionaries(keys, values, max_size=5))
def test_any_table_is_accepted_or_refused_in_one_sentence(raw: dict) -> None:
    try:
        run = check_settings(MINIMAL | raw, "fuzz")
    except SettingsError:
        return
    assert isinstance(run, RunSettings)
