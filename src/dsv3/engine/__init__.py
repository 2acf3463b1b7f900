"""Inference: latent cache, scheduler, runner, sampling, and the `LLM` class that puts them together.

One step is: `Scheduler` gives every running `Sequence` its share of the batch and a row of the `LatentCache`,
`ModelRunner` takes the tokens through the model, `sample` picks the next ones.
"""
