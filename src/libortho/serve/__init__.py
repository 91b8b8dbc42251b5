"""`libortho serve`: an OpenAI-compatible endpoint in which a request asks for an alpha.

    keys, policy        who may have which alpha: API keys as digests, read from a TOML file
    limits              bounds on bodies, times and rates
    engine              what answers: a protocol with two makers,
    engine_transformers   in this process, rows of one batch at different alphas
    engine_vllm           vLLM's own server, base and ortho adapters
    shapes, answers     OpenAI's requests, responses and streams
    app, run            the routes, and the server around them
    audit, metrics      what was given to whom, and how much of it
    ui/                 the page of `libortho ui`

Needs the extra `serve`. In doubt alpha is 0: a request that names none gets 0, a caller without a
key gets 0, and a server whose ortho stream is missing or damaged serves nothing else.
"""
