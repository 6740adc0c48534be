from pathlib import Path

import pytest

from onnx_lathe.converter.recipe import Recipe, load_recipe
from onnx_lathe.runtime.errors import RecipeError

DIGITS = Path(__file__).parents[2] / "recipes" / "digits.toml"


def altered(tmp_path: Path, old: str, new: str) -> Path:
    text = DIGITS.read_text()
    assert old in text
    path = tmp_path / "recipe.toml"
    path.write_text(text.replace(old, new))
    return path


def test_the_shipped_recipes_load() -> None:
    for path in DIGITS.parent.glob("*.toml"):
        assert isinstance(load_recipe(path), Recipe)


@pytest.mark.parametrize(
    ("old", "new", "where", "message"),
    [
        ("temperature = 4.0", "temprature = 4.0", "distillation.temprature", "Did you mean 'temperature'?"),
        ("temperature = 4.0", "temperature = 0.0", "distillation.temperature", "greater than 0"),
        ('source = "digits"', "", "data.source", "Add 'source' to the recipe."),
        ("seed = 0", "seed = -1", "seed", "greater than or equal to 0"),
        ("seed = 0", 'seed = "zero"', "seed", "a valid integer"),
        ("select = 0.28", "select = 0.7", "data", "select + test must be under 0.9"),
        (
            "shift = 1 }\n\n[student]",
            'loss = "mse" }\n\n[student]',
            "teacher.training",
            "label_smoothing must be 0 with loss",
        ),
        (
            "learning_rate = 5e-4, shift = 1",
            'loss = "mse"',
            "recipe",
            "every training must have the same loss, not cross_entropy, cross_entropy, mse",
        ),
        ("[compile]", '[distributed]\nstrategy = "dpp"\n[compile]', "distributed.strategy", "'ddp' or 'fsdp'"),
        ("[compile]", "[compiles]", "compiles", "Did you mean 'compile'?"),
        ("epochs", "epoch", "teacher.training.epochs", "Add 'epochs' to the recipe."),
        ('name = "digits"', 'name = "../digits"', "name", "match pattern"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_mend(
    tmp_path: Path, old: str, new: str, where: str, message: str
) -> None:
    path = altered(tmp_path, old, new)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.where == f"{path}: {where}"
    assert message in str(caught.value)
    assert caught.value.exit_status == 2


def test_a_missing_recipe_and_broken_toml(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = [")
    with pytest.raises(RecipeError, match="not TOML"):
        load_recipe(broken)
