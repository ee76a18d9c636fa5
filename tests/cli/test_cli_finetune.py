"""What `relufy finetune` makes of its options before it trains."""

import pytest

from relufy.cli.finetune import chosen_recipe, detail_of
from relufy.errors import UserError
from relufy.recipe import load_recipe


def test_options_reach_every_stage_that_trains() -> None:
    stages = chosen_recipe("relufy-both", [], 0.9, 8, steps=7, seed=3).stages()
    assert [stage.finetune.steps for stage in stages] == [7, 7]
    assert all(stage.finetune.penalty and stage.finetune.penalty.target == 0.9 for stage in stages)
    assert all(stage.finetune.lora and stage.finetune.lora.rank == 8 for stage in stages)
    ending = chosen_recipe("prosparse", [], 0.8, None, steps=7).stages()[1]
    assert ending.finetune.steps == 0 and ending.finetune.penalty is None, "a stage without training stays so"


def test_a_target_keeps_the_recipe_s_own_way_and_takes_the_place_of_a_table() -> None:
    own = load_recipe("prosparse").finetune.penalty
    found = chosen_recipe("prosparse", [], 0.8, None).finetune.penalty
    assert own and found and (found.target, found.strength, found.until) == (0.8, own.strength, own.until)
    table = chosen_recipe("prosparse-7b", [], 0.8, None).finetune.penalty
    assert table and table.target == 0.8 and max(table.strength) == 1


def test_an_assignment_reaches_what_follows() -> None:
    recipe = chosen_recipe("relufy-both", ["then.finetune.learning_rate=1e-3"], None, None)
    assert [stage.finetune.learning_rate for stage in recipe.stages()] == [2e-5, 1e-3]


def test_a_target_that_is_no_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"between 0 and 1, found 1\.5"):
        chosen_recipe("prosparse", [], 1.5, None)


def test_the_line_beside_the_bar_has_loss_zeros_and_speed() -> None:
    log = {"loss": 3.25, "tokens_per_second": 5000.0}
    assert detail_of(log) == "loss 3.2500  5,000 tokens/s"
    log |= {"sparsity": {"neuron": [0.8, 0.9]}, "dead": [0.0, 0.02], "union_density": [0.4, 0.5]}
    words = "loss 3.2500  neurons 85.0 % zero  1.0 % dead  45 % used in 8 tokens  5,000 tokens/s"
    assert detail_of(log) == words


def test_a_target_is_also_what_a_measured_shift_is_taken_for() -> None:
    from relufy.cli.finetune import chosen_recipe

    held = chosen_recipe("relufy-held", [], 0.8, None)
    assert held.sparsify.sparsity == 0.8 and held.finetune.penalty.target == 0.8
    plain = chosen_recipe("relufy-stage1", [], 0.8, None)
    assert plain.sparsify.sparsity is None and plain.finetune.penalty.target == 0.8
