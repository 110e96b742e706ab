//! The codec of CodecLLM: from a checkpoint's weights to an archive, and back.
//!
//! The data's way: [`checkpoint`] → [`quantize`] → [`block`] (parts and raw bits, coded by [`entropy`]) →
//! [`encoded`] (one tensor's bytes) → [`archive`]. `docs/format.md` specifies the bytes.
//!
//! There is no model and no GPU in this crate.

pub mod archive;
pub mod block;
pub mod checkpoint;
pub mod cpu;
pub mod encoded;
pub mod entropy;
pub mod error;
pub mod feedback;
pub mod format;
pub mod gguf;
pub mod product;
pub mod quantize;
mod simd;
pub mod trellis;

pub use checkpoint::{Checkpoint, Dtype, Tensor};
pub use cpu::Cpu;
pub use encoded::{Checks, EncodeOptions, EncodedTensor, Layout, Prefer, encode_tensor, encode_with_feedback};
pub use error::{Error, Result};
pub use format::{Coder, Format, ScaleMode};
pub use product::Operand;
