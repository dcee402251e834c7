"""How good a model is: tasks, metrics, and pages that show them."""
