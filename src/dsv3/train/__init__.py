"""Training on one machine: a loop, what its steps are made of, and the stages of a recipe over it."""
