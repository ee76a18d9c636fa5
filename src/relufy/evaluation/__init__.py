"""How good a model is, alone or beside another one: text, lm-evaluation-harness tasks, paired tests."""
