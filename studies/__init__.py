"""The studies of docs/studies: programs that train models, and make tables and plots of what they find."""
