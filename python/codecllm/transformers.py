"""Archives in Transformers: importing this registers the quantization method `codecllm`.

    import codecllm.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("tiny.int8", device_map="auto")

Linear layers become `CompressedLinear`, embeddings `CompressedEmbedding`, and the experts of mixtures `CompressedExperts`: their weights
stay as the archive has them, on the device, in `save_pretrained`, and when loaded again. What is encoded but belongs to no such layer
(the weight of a module of another kind) is decoded while it is loaded.

`from_pretrained("a plain checkpoint", quantization_config=CodecConfig(format="int8"))` compresses a model as it is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from codecllm import _core
from codecllm.torch import CompressedEmbedding, CompressedLinear, compress_model_, compressed_modules, group_

__all__ = ["CodecConfig", "CodecQuantizer", "CompressedExperts"]

METHOD = "codecllm"
_MAGIC = b"CODECLLM"
_HEADER_BYTES = 128
#: What became of an encoded weight: its name in the model, rows, columns, bytes.
_Encoded = tuple[int, int, int]


@register_quantization_config(METHOD)
class CodecConfig(QuantizationConfigMixin):
    """How a model is compressed.

    An archive's `config.json` has it. Given to `from_pretrained` with a plain checkpoint, it compresses the model once that is loaded:
    `format`, `bits`, `trellis`, `scale`, `coder`, `prefer` and `embeddings` are those of `codecllm.torch.compress_model_`, and
    `modules_to_not_convert` its `skip`.
    """

    def __init__(
        self,
        quant_method: str = METHOD,
        format: str = "int8",
        bits: float | None = None,
        trellis: bool = False,
        scale: str | None = "channel",
        coder: str = "rans",
        prefer: str | None = None,
        embeddings: bool = False,
        modules_to_not_convert: list[str] | None = None,
        **more: Any,
    ) -> None:
        self.quant_method: Any = quant_method
        self.format = format
        self.bits = bits
        self.trellis = trellis
        self.scale = scale
        self.coder = coder
        self.prefer = prefer
        self.embeddings = embeddings
        self.modules_to_not_convert = modules_to_not_convert
        # What archives say beyond that is kept for whoever reads it.
        self.more = more

    def to_dict(self) -> dict[str, Any]:
        """As `config.json` has it."""
        own = {k: v for k, v in self.__dict__.items() if k != "more" and (v or k == "scale")}
        return {**self.more, **own}


class CompressedExperts(nn.Module):
    """The experts of a mixture as compressed layers, each under the name that checkpoints have it under.

    The same sums as the eager experts of Transformers: every expert that a token chose runs on its tokens.
    """

    act_fn: Any

    def __init__(self, experts: Any, names: tuple[str, str, str]) -> None:
        """`experts`: with `gate_up_proj` `[n, 2 · width, hidden]` and `down_proj` `[n, hidden, width]`; `names` of gate, up and down."""
        super().__init__()
        gate_up, down = experts.gate_up_proj, experts.down_proj
        self.num_experts, self.names = down.shape[0], names
        self.act_fn = experts.act_fn
        width = down.shape[2]
        for i in range(self.num_experts):
            weights = (gate_up.data[i, :width], gate_up.data[i, width:], down.data[i])
            expert = nn.Module()
            for name, weight in zip(names, weights, strict=True):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                linear.weight = nn.Parameter(weight, requires_grad=gate_up.requires_grad)
                expert.add_module(name, linear)
            self.add_module(str(i), expert)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states `[n_tokens, hidden]`; the experts of each token `[n_tokens, k]`, and their weights."""
        out = torch.zeros_like(hidden_states)
        for i in torch.unique(top_k_index).tolist():
            if i >= self.num_experts:
                continue
            expert = self.get_submodule(str(i))
            gate, up, down = (expert.get_submodule(name) for name in self.names)
            token, place = torch.where(top_k_index == i)
            x = hidden_states[token]
            x = down(self.act_fn(gate(x)) * up(x)) * top_k_weights[token, place, None]
            out.index_add_(0, token, x.to(out.dtype))
        return out


def _is_splittable(module: nn.Module) -> bool:
    """Whether a module is the experts of a mixture in the form that most models of Transformers share."""
    try:
        from transformers.integrations.moe import _default_apply_gate
    except ImportError:
        return False
    up: Any = getattr(module, "gate_up_proj", None)
    down: Any = getattr(module, "down_proj", None)
    plain = isinstance(up, nn.Parameter) and isinstance(down, nn.Parameter) and up.dim() == down.dim() == 3
    if not plain or getattr(type(module), "_apply_gate", None) is not _default_apply_gate:
        return False
    odd = ("has_bias", "is_transposed", "has_post_expert_norm")
    fits = up.shape == (down.shape[0], 2 * down.shape[2], down.shape[1])
    return fits and not any(getattr(module, o, False) for o in odd) and getattr(module, "is_concatenated", True)


def _is_experts(module: nn.Module) -> bool:
    """Whether a module has the weights of several experts in one parameter."""
    parameters = [p for name, p in module.named_parameters(recurse=False) if name in ("gate_up_proj", "down_proj")]
    return any(p.dim() == 3 for p in parameters)


def _conversions(model: PreTrainedModel) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model))


def _merges_experts(converter: Any) -> bool:
    return isinstance(converter, WeightConverter) and any(
        target.endswith(("experts.gate_up_proj", "experts.down_proj")) for target in converter.target_patterns
    )


def _expert_names(conversions: Iterable[Any]) -> tuple[str, str, str]:
    """What checkpoints call an expert's gate, up and down."""
    names = {}
    for converter in filter(_merges_experts, conversions):
        sources = [str(s).removesuffix("$").removesuffix(".weight").rpartition(".")[2] for s in converter.source_patterns]
        names[len(sources)] = sources
    if len(names.get(2, ())) == 2 and len(names.get(1, ())) == 1:
        return names[2][0], names[2][1], names[1][0]
    return "gate_proj", "up_proj", "down_proj"


def split_experts_(model: nn.Module, skip: Iterable[str] = ()) -> None:
    """Put `CompressedExperts`, not compressed yet, in the place of the experts of mixtures."""
    found = [name for name, module in model.named_modules() if _is_splittable(module)]
    found = [name for name in found if not any(name == s or name.endswith("." + s) for s in skip)]
    if not found:
        return
    names = _expert_names(_conversions(model)) if isinstance(model, PreTrainedModel) else _expert_names(())
    for name in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, CompressedExperts(model.get_submodule(name), names))


class _Decode(ConversionOps):
    """Decodes encoded weights; leaves others alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def _one(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._one(v) for v in value]
        if value.dtype != torch.uint8 or value.dim() != 1:
            return value
        return CompressedLinear.from_encoded(value, device=value.device).decode(self.dtype)

    def convert(self, input_dict: dict[str, Any], *args: Any, **more: Any) -> dict[str, Any]:
        decoded = {k: self._one(v) for k, v in input_dict.items()}
        targets = more.get("target_patterns") or []
        # Alone in its converter, the operation gives the weight its name in the model.
        if len(decoded) == len(targets) == 1 and more.get("full_layer_name") == targets[0]:
            return {targets[0]: next(iter(decoded.values()))}
        return decoded

    @property
    def reverse_op(self) -> ConversionOps:
        return _Keep()


class _Keep(ConversionOps):
    """Changes nothing: what was decoded is saved as it is."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **more: Any) -> dict[str, Any]:
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def _encoded_tensors(files: Iterable[str]) -> dict[str, _Encoded]:
    """The encoded tensors of safetensors files, by name, from their headers alone."""
    from safetensors import safe_open

    found: dict[str, _Encoded] = {}
    for file in files:
        with safe_open(file, framework="np") as shard:
            for name in shard.keys():
                tensor = shard.get_slice(name)
                shape = tensor.get_shape()
                if tensor.get_dtype() != "U8" or len(shape) != 1 or shape[0] < _HEADER_BYTES:
                    continue
                header = bytes(tensor[:_HEADER_BYTES])
                if header.startswith(_MAGIC):
                    n_rows, n_cols = (int.from_bytes(header[at : at + 8], "little") for at in (16, 24))
                    found[name] = n_rows, n_cols, shape[0]
    return found


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer.train(model.training))


@register_quantizer(METHOD)
class CodecQuantizer(HfQuantizer):
    """Loads archives, and compresses models that are loaded."""

    requires_calibration = False
    quantization_config: CodecConfig

    def __init__(self, quantization_config: CodecConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._drops_merges = False
        self._decoded: list[str] = []
        self._dtype = torch.bfloat16
        self._dtypes: dict[str, torch.dtype] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses devices that have no kernels."""
        device_map = kwargs.get("device_map")
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        for device in devices:
            if device in (None, "auto", "balanced", "balanced_low_0", "sequential", "disk") or isinstance(device, int):
                continue
            if torch.device(device).type not in ("cpu", "cuda"):
                raise _core.DeviceError(f"compressed layers run on the CPU and on NVIDIA GPUs, not on {device}")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            return model
        files = kwargs.get("checkpoint_files")
        if not files or not all(str(file).endswith(".safetensors") for file in files):
            raise _core.UnsupportedError("an archive is loaded from its safetensors files: give its path to `from_pretrained`")
        self._dtype = model.dtype
        encoded = _encoded_tensors(files)
        conversions = _conversions(model)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        merges = [c for c in conversions if isinstance(c, WeightConverter)]
        renamed = {rename_source_key(name, renamings, [])[0]: encoded[name] for name in encoded}
        prefix = model.base_model_prefix

        if any(re.search(r"\.experts\.\d+\.", name) for name in renamed):
            experts = [module for module in model.modules() if _is_experts(module)]
            if all(map(_is_splittable, experts)):
                split_experts_(model)
                self._drops_merges = True
                merges = [m for m in merges if not _merges_experts(m)]

        # Every submodule's dtype plan may ask for float32, which bytes are not.
        patterns = set(model._keep_in_fp32_modules or ()) | set(model._keep_in_fp32_modules_strict or ())
        modules = dict(model.named_modules())
        plain = ((name, p.dtype) for name, p in model.named_parameters() if p.is_floating_point())
        self._dtypes = {name: dtype for name, dtype in plain if not patterns.intersection(name.split("."))}
        state = model.state_dict()
        replaced: dict[str, _Encoded] = {}
        for name, shape in renamed.items():
            target, merge = rename_source_key(name, [], merges, prefix, state)
            module_name, _, parameter = target.rpartition(".")
            module = modules.get(module_name)
            fits = type(module) in (nn.Linear, nn.Embedding) and parameter == "weight" and merge is None
            if fits and not any(part in module_name.split(".") for part in patterns):
                self._put_layer(model, module_name, module, shape)
                replaced[target] = shape
            else:
                self._decoded.append(target)
        # A layer without a weight of its own shares another's.
        for target, source in model.all_tied_weights_keys.items():
            for name, other in ((target, source), (source, target)):
                module_name = name.removesuffix(".weight")
                module = modules.get(module_name)
                if other in replaced and name not in replaced and type(module) in (nn.Linear, nn.Embedding):
                    self._put_layer(model, module_name, module, replaced[other])
        return model

    def _put_layer(self, model: Any, name: str, module: Any, shape: _Encoded) -> None:
        n_rows, n_cols, n_bytes = shape
        if tuple(module.weight.shape) != (n_rows, n_cols):
            raise _core.FormatError(
                f"layer `{name}` is {tuple(module.weight.shape)} by the model's configuration, {n_rows, n_cols} in the archive"
            )
        device, dtype = module.weight.device, module.weight.dtype
        layer: nn.Module
        if isinstance(module, nn.Linear):
            layer = CompressedLinear(n_cols, n_rows, n_bytes, module.bias is not None, device, dtype)
        else:
            layer = CompressedEmbedding(n_rows, n_cols, n_bytes, module.padding_idx, device, dtype)
        _replace(model, name, layer)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """What is encoded and has no compressed layer is decoded, before any merge."""
        if not self.pre_quantized:
            return weight_conversions
        kept = [c for c in weight_conversions if not (self._drops_merges and _merges_experts(c))]
        if self._decoded:
            merged = [c for c in kept if isinstance(c, WeightConverter)]
            for converter in merged:
                converter.operations = [_Decode(self._dtype), *converter.operations]
            patterns = [target for c in merged for target in c.target_patterns]
            for name in self._decoded:
                if not any(name.endswith(pattern) for pattern in patterns):
                    kept.append(WeightConverter(name, name, [_Decode(self._dtype)]))
        return kept

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            c = self.quantization_config
            options: Any = {"bits": c.bits, "trellis": c.trellis, "scale": c.scale or "channel", "coder": c.coder}
            options["prefer"] = c.prefer
            format: Any = c.format
            skip = c.modules_to_not_convert or ()
            compress_model_(model, format, skip=skip, embeddings=c.embeddings, **options)
        for name, parameter in model.named_parameters():
            # Up to 5.17 Transformers leaves what it renamed in the dtype of the checkpoint.
            dtype = self._dtypes.get(name, parameter.dtype)
            if parameter.is_floating_point() and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        for module in compressed_modules(model).values():
            # Tying pads a shared layer's bias to as many elements as the weight has bytes.
            bias = getattr(module, "bias", None)
            if isinstance(module, CompressedLinear) and bias is not None and bias.shape[0] != module.out_features:
                bias.data = bias.data[: module.out_features].clone()
            module.prepare()
        group_(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in compressed_modules(model).items():
            plain = module.to_linear(dtype) if isinstance(module, CompressedLinear) else module.to_embedding(dtype)
            _replace(model, name, plain)
        model.tie_weights()
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """A compressed model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Compressed weights are not trained; gradients pass through them, to adapters, say."""
        return False

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` takes the products as operators."""
        return True


def adopt(model: Any, **options: Any) -> None:
    """Have a model of Transformers, compressed in memory, saved and loaded as such."""
    if not isinstance(model, PreTrainedModel) or getattr(model, "hf_quantizer", None) is not None:
        return
    quantizer = CodecQuantizer(CodecConfig(**options), pre_quantized=True)
    model.config.quantization_config = quantizer.quantization_config
    marks = {"hf_quantizer": quantizer, "is_quantized": True, "quantization_method": METHOD}
    for name, value in marks.items():
        setattr(model, name, value)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
