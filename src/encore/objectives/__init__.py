"""What is learned: pure functions, no model. `denoise` and `ul2` are numpy, `losses` is torch (import it by name)."""
