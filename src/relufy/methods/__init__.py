"""How zeros are made: one file per paper. `sparsify.sparsify` picks the method by the recipe's type."""
