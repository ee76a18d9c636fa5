"""What keeps a model from being sparse, what each method may give it, and what to run next."""
