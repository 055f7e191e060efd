"""Readers of GGUF: weights alone, in the types whose blocks of 32 have one scale in half precision."""

from dmquant.exchange.engines.engine import Engine, formats, weights_in

_BLOCKS = {"granularity": "group:32", "store": "fp16", "scale": "lean"}

ENGINE = Engine(
    "gguf",
    inputs=(),
    formats=formats(*(weights_in(name, **_BLOCKS) for name in ("iq4_nl", "int4", "int5", "int8"))),
)
