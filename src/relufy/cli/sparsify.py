"""`relufy sparsify`: make the zeros of a recipe, without any training."""

from relufy.cli.options import Assignments, Model, OutputFolder, RecipeName
from relufy.cli.output import result
from relufy.cli.quiet import quiet_libraries


def command(model: Model, output: OutputFolder, recipe: RecipeName, assign: Assignments = None) -> None:
    """Make a model activation-sparse as a recipe says, and save it."""
    from relufy.errors import UserError
    from relufy.files import refuse_occupied
    from relufy.hub import model_folder
    from relufy.recipe import load_recipe

    chosen = load_recipe(recipe).with_values(assign or ())
    if chosen.sparsify is None:
        raise UserError(f"the recipe {chosen.name} makes no zeros; `relufy finetune` runs it")
    folder = model_folder(model)
    refuse_occupied(output, by_folder=True)

    from relufy.methods.sparsify import sparsify
    from relufy.model.checkpoint import load_model, load_tokenizer, save_checkpoint
    from relufy.model.empty import refuse_without_sites

    quiet_libraries()
    refuse_without_sites(folder)
    sparse = sparsify(load_model(folder), chosen)
    save_checkpoint(sparse, load_tokenizer(folder), output)
    result(f"{output}: {chosen.name}, not fine-tuned yet")
