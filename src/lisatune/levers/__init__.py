"""What is put on a model from outside to save memory or change a step."""
