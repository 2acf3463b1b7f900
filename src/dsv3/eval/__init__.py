"""What a model can do, in numbers: each task asks an `LLM` many things and returns a result that can be drawn."""
