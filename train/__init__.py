"""Training: objectives, state, steps and the loop."""
