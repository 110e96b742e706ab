"""Writes the GGUF files that the tests read, with the package of llama.cpp's authors, and what it says they hold.

    pip install gguf==0.19.0 safetensors==0.8.0 sentencepiece==0.2.3
    python scripts/gguf_fixtures.py

codec/tests/data/
gguf-types.gguf                  a tensor [2, 256] of every element type, blocks of random bits with plausible scales
gguf-types.expected.safetensors  its values by gguf.quants, float32
gguf-spm.gguf                    a SentencePiece BPE vocabulary trained on assets/tale.txt, and the least of a model around it
gguf-spm.json                    texts, and the tokens that SentencePiece makes of them
"""

import io
import json
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "codec" / "tests" / "data"
SHAPE = (2, 256)
# Where the F16 numbers of each type's block are.
SCALES = {
    Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0],
    Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208],
}  # fmt: skip
TEXTS = [
    "Once upon a time there was a king.",
    "  two  spaces, and a tab\there\n\nnew lines ",
    "naïve 漢字 🦀 — “quoted”",
    "don't; 3.14159 = x**2",
    "a",
    "thethethe",
]


def types() -> None:
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(DATA / "gguf-types.gguf", "none")
    expected = {}
    for quant, offsets in SCALES.items():
        weights, block_bytes = gguf.GGML_QUANT_SIZES[quant]
        blocks = rng.integers(0, 256, (SHAPE[0], SHAPE[1] // weights, block_bytes), dtype=np.uint8)
        for at in offsets:
            scale = rng.normal(0, 0.02, blocks.shape[:2]).astype(np.float16)
            blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
        data = blocks.reshape(SHAPE[0], -1)
        writer.add_tensor(quant.name, data, raw_dtype=quant)
        expected[quant.name] = gguf.quants.dequantize(data, quant)
    values = rng.normal(0, 1, SHAPE).astype(np.float32)
    writer.add_tensor("F32", values)
    expected["F32"] = values
    writer.add_tensor("F16", values.astype(np.float16))
    expected["F16"] = values.astype(np.float16).astype(np.float32)
    bf16 = gguf.quants.quantize(values, Type.BF16)
    writer.add_tensor("BF16", bf16, raw_dtype=Type.BF16)
    expected["BF16"] = gguf.quants.dequantize(bf16, Type.BF16)
    finish(writer)
    save_file(expected, DATA / "gguf-types.expected.safetensors")


def sentence_piece() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        input=str(ROOT / "assets" / "tale.txt"), model_writer=model, model_type="bpe", vocab_size=420,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    n = pieces.vocab_size()

    def token_type(i: int) -> gguf.TokenType:
        if pieces.is_unknown(i):
            return gguf.TokenType.UNKNOWN
        if pieces.is_control(i):
            return gguf.TokenType.CONTROL
        return gguf.TokenType.BYTE if pieces.is_byte(i) else gguf.TokenType.NORMAL

    writer = gguf.GGUFWriter(DATA / "gguf-spm.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(4)
    writer.add_feed_forward_length(8)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([pieces.id_to_piece(i) for i in range(n)])
    writer.add_token_scores([pieces.get_score(i) for i in range(n)])
    writer.add_token_types([token_type(i) for i in range(n)])
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_unk_token_id(pieces.unk_id())
    writer.add_chat_template("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    writer.add_tensor("token_embd.weight", np.zeros((n, 4), np.float16))
    finish(writer)
    known = [{"text": text, "tokens": pieces.encode(text)} for text in TEXTS]
    (DATA / "gguf-spm.json").write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    DATA.mkdir(parents=True, exist_ok=True)
    types()
    sentence_piece()
