"""The only maths that asks which device it is on: plain reference first, fast paths beside it."""
