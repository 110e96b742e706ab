"""A codec for the weights of language models.

    import codecllm

    codecllm.compress("TinyLlama-1.1B", "tiny.int8", format="int8")
    archive = codecllm.open("tiny.int8")
    archive["model.layers.0.mlp.up_proj.weight"].decode()   # numpy, float32
    codecllm.verify("tiny.int8", source="TinyLlama-1.1B")["status"]   # "proven"

`import codecllm.transformers` teaches Transformers to load archives; `codecllm.torch` has `CompressedLinear` for models of
any architecture. Nothing here needs PyTorch until a tensor is asked for.
"""

from codecllm._archive import Archive, Tensor, compress, inspect, open, verify
from codecllm._core import DeviceError, FormatError, UnsupportedError, __version__, get_threads, set_threads

__all__ = [
    "Archive",
    "DeviceError",
    "FormatError",
    "Tensor",
    "UnsupportedError",
    "__version__",
    "compress",
    "get_threads",
    "inspect",
    "open",
    "set_threads",
    "verify",
]
