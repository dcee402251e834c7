"""Training: recipes over one loop. The only code that calls `optimizer.step()`. No torch until a run starts."""
