//! The engine of CodecLLM: runs models of the Llama family, from plain and from compressed weights alike.
//!
//! [`config`] says what the model is, [`weights`] finds its tensors, [`llama`] is the forward pass, written once in the
//! operations of [`backend`], which [`cpu`] and [`cuda`] implement; [`memory`] says what of it is kept decoded on a device. Around it stand the [`tokenizer`] and the [`chat`] template, the
//! [`sampler`], [`generate`](mod@generate), which makes text of them, [`evaluate`](mod@evaluate), which measures, and
//! [`calibrate`](mod@calibrate), which compresses a model for the inputs that its matrices have.

pub mod backend;
pub mod calibrate;
pub mod chat;
pub mod config;
pub mod cpu;
pub mod cuda;
pub mod error;
pub mod evaluate;
pub mod generate;
pub mod llama;
pub mod memory;
pub mod sampler;
pub mod tokenizer;
pub mod weights;

pub use backend::Logits;
pub use calibrate::calibrate;
pub use chat::{ChatTemplate, Message};
pub use config::Config;
pub use error::{Error, Result};
pub use evaluate::evaluate;
pub use generate::{Finish, GenerateOptions, Generation, generate};
pub use llama::{KvCache, LoadOptions, Model};
pub use memory::{CachePolicy, MemoryUse};
pub use sampler::{Draw, Sampler, SamplingOptions};
pub use tokenizer::{TextStream, Tokenizer};
pub use weights::TensorSource;
