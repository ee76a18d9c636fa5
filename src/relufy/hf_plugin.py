"""Importing this lets `transformers.AutoModelForCausalLM.from_pretrained` load relufied checkpoints."""

from relufy.model.plugin import register

register()
