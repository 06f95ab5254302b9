"""The benchmark suites by name; each is a module here with `run(options, say)` and `tell(result)`.

A suite compares two sides in one process and reports ratios, so that a slow or busy machine does
not change what it says.
"""

from __future__ import annotations

SUITES = {
    "overhead": "tokens/s of our decoding loop as a ratio to transformers' own generate",
    "predictor": "how well the next layers' experts are guessed on held-out chats",
    "formats": "what int8, int4, fp8 and mxfp4 experts cost on this CPU and in answers",
    "large": "a checkpoint of gigabytes: peak memory against plan, RAM and disk, bf16 and int4",
    "load": "time to load beside a plain read of the same bytes, and peak memory beside the plan",
    "policies": "every policy on the same simulated machines and models, beside a bound on time",
}
