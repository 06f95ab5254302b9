"""The words of the app and its panel, each with one answer."""

from __future__ import annotations

TERMS: dict[str, tuple[str, str]] = {
    "PreScope": (
        "PreScope|this app|the app|this program|this application",
        "PreScope is an app for chatting with big Mixture-of-Experts models on one graphics card. "
        "It keeps most experts in RAM and copies the needed ones to the card just in time.",
    ),
    "moe": (
        "a mixture of experts|mixture of experts|a mixture of experts model|MoE|a MoE model|"
        "an MoE|MoE models|a mixture-of-experts model",
        "A Mixture-of-Experts model has many small networks, called experts, in each layer. Only a "
        "few of them work on each token, so most experts can wait outside the graphics card.",
    ),
    "expert": (
        "an expert|experts|the experts|expert",
        "An expert is a small network inside a layer. Each layer has many experts, but each token "
        "uses only a few of them.",
    ),
    "router": (
        "the router|a router|router|routing|the gate",
        "The router is a small matrix in each layer. It scores all experts for a token and picks "
        "the few best ones.",
    ),
    "top-k": (
        "top-k|top k|the top-k",
        "Top-k is the number of experts that the router picks for each token in a layer.",
    ),
    "token": (
        "a token|tokens|token",
        "A token is a small piece of text, often a word or a part of a word. The model reads and "
        "writes one token after another.",
    ),
    "layer": (
        "a layer|layers|layer",
        "A layer is one step of the model, with attention and a set of experts. Every token passes "
        "through all layers in order.",
    ),
    "cache": (
        "the cache|the expert cache|a cache|cache|expert cache",
        "The expert cache is the part of VRAM that holds the experts in use. It is divided into "
        "slots, and each slot holds one expert.",
    ),
    "cache hit": (
        "a cache hit|cache hits|a hit|hits|cache hit|an expert hit",
        "A cache hit means that the expert the router chose is already in VRAM. The layer runs at "
        "once and nothing has to be copied.",
    ),
    "cache miss": (
        "a cache miss|cache misses|a miss|misses|cache miss|an expert miss",
        "A cache miss means that the chosen expert is not in VRAM. It has to be copied now or "
        "computed on the CPU, and that takes time.",
    ),
    "hit rate": (
        "the hit rate|hit rate|the cache hit rate|a hit rate|hit rates",
        "The hit rate is the share of expert uses that found the expert already in VRAM. A higher "
        "hit rate means less waiting.",
    ),
    "prefetch": (
        "prefetching|a prefetch|prefetch|prefetches|prefetching experts",
        "Prefetching copies an expert into VRAM before it is needed, because the predictor expects "
        "it soon. A good prefetch hides the waiting time.",
    ),
    "late prefetch": (
        "a late prefetch|late prefetches|a prefetch that is late|late|prefetched late",
        "A late prefetch is a copy that was started early but had not finished when the layer "
        "needed the expert. It saves only a part of the waiting.",
    ),
    "in time": (
        "prefetched in time|a prefetch in time|a prefetch that is in time|an early prefetch",
        "Prefetched in time means that the expert was copied ahead and was there when the layer "
        "needed it, so nothing had to wait.",
    ),
    "heat map": (
        "the heat map|heat map|a heat map|the map of experts|the expert map|the colored squares",
        "The heat map shows every expert of every layer as a small square. Its color tells whether "
        "the expert is on the card or offloaded, and brighter means used more.",
    ),
    "wasted prefetch": (
        "a wasted prefetch|wasted prefetches|wasted|a prefetch that is wasted|wasted bytes",
        "A wasted prefetch is an expert that was copied early but never used. It costs time on the "
        "link and gains nothing.",
    ),
    "stall": (
        "a stall|stalls|stall|stall time|the stall time|stalling|stall per token|Stall / token",
        "A stall is the time a layer waits for an expert to arrive. Good prefetching keeps stalls "
        "short.",
    ),
    "on-demand load": (
        "an on-demand load|on-demand loads|on-demand loading|on demand load|loading on demand|on "
        "demand",
        "An on-demand load copies an expert at the moment the router asks for it. The layer has to "
        "wait until the copy is done.",
    ),
    "slot": (
        "a slot|slots|slot|a cache slot|cache slots",
        "A slot is a place in VRAM that holds exactly one expert. When all slots are full, a new "
        "expert needs an eviction.",
    ),
    "eviction": (
        "eviction|an eviction|evictions|evicting|evicting an expert|evicted",
        "Eviction frees a slot by forgetting the expert in it. Nothing is lost, because RAM still "
        "holds every expert.",
    ),
    "resident": (
        "a resident expert|resident experts|resident|Resident|on the card",
        "A resident expert is one that is in VRAM right now, so it can be used without a copy.",
    ),
    "offloading": (
        "offloading|expert offloading|offload|offloaded experts|an offloaded expert|offloaded",
        "Offloading keeps most experts in RAM or on disk and brings only the needed ones to the "
        "graphics card. This lets a big model run on a small card.",
    ),
    "pinned memory": (
        "pinned memory|pinned RAM|pinned",
        "Pinned memory is RAM that the system may not move. Copies from it to the graphics card "
        "are faster and can run in the background.",
    ),
    "PCIe": (
        "PCIe|the PCIe link|PCIe link|PCI Express|PCIe bandwidth|the link",
        "PCIe is the link between the main board and the graphics card. Experts travel over it "
        "when they are copied, and its speed limits how fast they arrive.",
    ),
    "VRAM": (
        "VRAM|GPU memory|video memory|the VRAM|memory of the graphics card",
        "VRAM is the memory on the graphics card. It is very fast but small, so only some of the "
        "experts fit in it.",
    ),
    "RAM": (
        "RAM|main memory|the RAM|system memory",
        "RAM is the main memory of the computer. It holds the experts that do not fit in VRAM.",
    ),
    "bandwidth": (
        "bandwidth|link bandwidth|the bandwidth",
        "Bandwidth tells how many bytes can be moved per second. More bandwidth means that experts "
        "arrive sooner.",
    ),
    "latency": (
        "latency|the latency",
        "Latency is the time you wait before something arrives. Prefetching tries to hide the "
        "latency of copying experts.",
    ),
    "LLaPor": (
        "LLaPor|the LLaPor predictor|llapor|LLapor",
        "LLaPor is the learnable layer-aware predictor of expert activation. For each layer it "
        "learns to guess which experts the next layers will choose.",
    ),
    "predictor": (
        "the predictor|a predictor|predictor|the expert predictor|expert prediction|predictions",
        "The predictor guesses which experts the next layers will choose. In PreScope it is called "
        "LLaPor, and its guesses tell the app what to copy early.",
    ),
    "PreSched": (
        "PreSched|the PreSched scheduler|presched|Presched",
        "PreSched makes the plan across layers. It weighs prefetching, on-demand loading and CPU "
        "work, and picks the mix that should finish first.",
    ),
    "scheduler": (
        "the scheduler|a scheduler|scheduler|scheduling|the plan",
        "The scheduler decides for each layer which experts are copied ahead, loaded now or "
        "computed on the CPU. In PreScope it is called PreSched.",
    ),
    "AsyncIO": (
        "AsyncIO|the AsyncIO part|async IO|asyncio|asynchronous copies",
        "AsyncIO decouples copying from computing. Experts travel to VRAM in the background while "
        "the graphics card works on other experts.",
    ),
    "recall": (
        "recall|the recall|predictor recall|the predictor recall",
        "Recall is the share of the experts really used that the predictor had guessed. High "
        "recall means few surprises.",
    ),
    "precision": (
        "precision|the precision|predictor precision|the predictor precision",
        "Precision is the share of the guessed experts that were really used. High precision means "
        "few wasted copies.",
    ),
    "cpu work": (
        "CPU work|a CPU expert|CPU experts|computing on the CPU|served by the CPU|on the CPU",
        "CPU work means that a missing expert is computed on the processor and not copied. For a "
        "single token this can be faster than waiting for the link.",
    ),
    "emulated": (
        "the emulated machine|an emulated machine|emulated|emulation|the emulated card|"
        "the emulated mode|the emulated badge",
        "Without a graphics card PreScope shows an emulated one. It moves the real bytes and keeps "
        "modelled time, so you can watch the cache work, and its figures are marked as emulated.",
    ),
    "TTFT": (
        "TTFT|ttft|time to first token|the time to first token|first token|the first token time",
        "TTFT is the time to first token: how long you wait from sending a message to the first "
        "word of the answer.",
    ),
    "tokens per second": (
        "tokens per second|tokens/s|the tokens per second|tok/s|tps",
        "Tokens per second is the writing speed. It tells how many tokens the model produces each "
        "second.",
    ),
    "prefill": (
        "prefill|the prefill|prefill phase",
        "Prefill is the first phase, in which the model reads your whole message before it writes "
        "the first word.",
    ),
    "decode": (
        "decode|decoding|the decode phase",
        "Decode is the phase in which the model writes the answer, one token at a time.",
    ),
    "KV cache": (
        "the KV cache|KV cache|a KV cache|kv cache",
        "The KV cache stores keys and values of earlier tokens, so attention does not have to "
        "compute them again.",
    ),
    "context": (
        "the context window|context window|context length|the context|a context window",
        "The context window is the number of tokens the model can look at. In a long chat the "
        "oldest text falls out of it.",
    ),
    "temperature": (
        "temperature|the temperature setting|temperature setting",
        "Temperature controls how random the answer is. Zero always takes the most likely token, "
        "and higher values bring more variety.",
    ),
    "greedy": (
        "greedy decoding|greedy|greedy mode",
        "Greedy decoding always takes the most likely token, so the same message gives the same "
        "answer.",
    ),
    "seed": (
        "a seed|the seed|the random seed|seed",
        "The seed starts the random choices. With the same seed, settings and message the answer "
        "comes out the same.",
    ),
    "quantization": (
        "quantization|a quantized model|quantized models|quantisation",
        "Quantization stores weights with fewer bits. The experts become smaller and travel "
        "faster, at a small cost in quality.",
    ),
    "bf16": (
        "bf16|bfloat16|the bf16 format",
        "The format bf16 stores a number in sixteen bits. It keeps a wide range of values with "
        "less precision.",
    ),
    "int4": (
        "int4|4 bit|4-bit weights|the int4 format",
        "The format int4 stores a weight in four bits. An expert then needs a quarter of the space "
        "it has in bf16.",
    ),
    "GPU": (
        "a GPU|the GPU|GPU|GPUs|the graphics card|a graphics card",
        "The GPU is the graphics card. It computes the layers very fast, but only with data that "
        "is in its VRAM.",
    ),
    "weights": (
        "weights|the weights|parameters|a parameter|model weights",
        "Weights are the numbers a model has learned. They are also called parameters, and in a "
        "Mixture-of-Experts model most of them sit in the experts.",
    ),
    "policy": (
        "a policy|the policy|policies|policy|offloading policy",
        "A policy is the rule for moving experts, for example loading on demand, computing misses "
        "on the CPU, or the PreScope plan with prefetching.",
    ),
    "panel": (
        "the panel|the live panel|panel|this panel|the side panel",
        "The panel shows live what happens to the experts: hits, misses, prefetches, stalls, the "
        "bytes on the link and the speed in tokens per second.",
    ),
    "vram limit": (
        "the VRAM limit|VRAM limit|the VRAM budget|a VRAM limit",
        "The VRAM limit is the most memory of the graphics card that PreScope may use. You can set "
        "it in the settings, and 0 means no limit.",
    ),
    "load balancing": (
        "load balancing|balancing|expert load balancing",
        "Load balancing is a training rule that keeps the router from using the same few experts "
        "all the time.",
    ),
    "hidden state": (
        "the hidden state|a hidden state|hidden states|hidden state",
        "The hidden state is the list of numbers that stands for a token between two layers. The "
        "predictor reads it to guess the next experts.",
    ),
    "LRU": (
        "LRU|an LRU cache|least recently used|LRU cache",
        "LRU means least recently used. It is an eviction rule that drops the expert that has not "
        "been used for the longest time.",
    ),
    "attention": (
        "attention|the attention|self-attention",
        "Attention lets a token look back at earlier tokens and collect what is useful from them.",
    ),
    "system prompt": (
        "the system prompt|a system prompt|system prompt",
        "The system prompt is a text at the start of the chat that tells the model how to behave.",
    ),
    "disk": (
        "the disk|disk|an SSD|SSD|the SSD",
        "The disk holds the whole model. Reading an expert from it takes longer than reading it "
        "from RAM.",
    ),
    "language model": (
        "a language model|language models|an LLM|LLM|LLMs",
        "A language model predicts the next token of a text, again and again. That is how it "
        "writes its answers.",
    ),
}
"""Fact name -> (names people use for it, separated by bars; the one answer)."""

DIFFERENCES: dict[tuple[str, str], str] = {
    ("a hit|a cache hit|hits|cache hits", "a miss|a cache miss|misses|cache misses"): (
        "With a hit the expert is already in VRAM and runs at once. With a miss it is not there "
        "and must be copied or computed on the CPU."
    ),
    ("a prefetch|prefetching|prefetch", "an on-demand load|on-demand loading|loading on demand"): (
        "A prefetch copies an expert before it is needed. An on-demand load copies it only when "
        "the layer already waits for it."
    ),
    ("VRAM|GPU memory", "RAM|main memory|system memory"): (
        "VRAM is the small and fast memory on the graphics card. RAM is the larger main memory, "
        "and the card reaches it only over PCIe."
    ),
    ("LLaPor|the predictor", "PreSched|the scheduler"): (
        "LLaPor guesses which experts will be needed. PreSched uses the guesses to plan what is "
        "prefetched, loaded on demand or computed on the CPU."
    ),
    ("PreSched", "AsyncIO"): (
        "PreSched decides what is copied and when. AsyncIO carries out the copies in the "
        "background while the card computes."
    ),
    ("prefill|the prefill", "decode|decoding"): (
        "In prefill the model reads your whole message at once. In decode it writes the answer one "
        "token at a time."
    ),
    ("an expert|experts", "a layer|layers"): (
        "A layer is one step of the model. Experts are the small networks inside a layer."
    ),
    ("an expert|experts", "the router|a router"): (
        "The experts do the work inside a layer. The router chooses which of them work on a token."
    ),
    ("recall", "precision"): (
        "Recall asks how many of the used experts were guessed. Precision asks how many of the "
        "guessed experts were used."
    ),
    ("TTFT|time to first token", "tokens per second|tokens/s"): (
        "TTFT is the wait before the first word. Tokens per second is the speed after that."
    ),
    ("a late prefetch", "a wasted prefetch"): (
        "A late prefetch arrives after the layer needs it. A wasted prefetch is never used at all."
    ),
    ("bandwidth", "latency"): (
        "Bandwidth is how much can be moved per second. Latency is how long you wait before "
        "something arrives."
    ),
    ("the expert cache|the cache", "the KV cache|KV cache"): (
        "The expert cache holds experts in VRAM. The KV cache holds keys and values of the tokens "
        "in this chat."
    ),
}
"""Pairs people mix up, with the one answer that separates them."""
