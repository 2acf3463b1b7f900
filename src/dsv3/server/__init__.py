"""The HTTP server: OpenAI's API, a page to chat on, keys, limits and metrics, around one engine.

A request passes the `Gate`, is read and checked by `protocol`, becomes token ids, and goes to the engine; what comes
back is put into the shape that was asked for and written as it comes. `docs/serving.md` is for those who run it.
"""
