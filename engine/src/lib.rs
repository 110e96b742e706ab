//! The engine of CodecLLM: runs models of the Llama family, from plain and from compressed weights alike.
//!
//! [`config`] says what the model is, [`weights`] finds its tensors, [`llama`] is the forward pass, written once in the
//! operations of [`backend`], which [`cpu`] implements.

pub mod backend;
pub mod config;
pub mod cpu;
pub mod error;
pub mod llama;
pub mod weights;

pub use backend::Logits;
pub use config::Config;
pub use error::{Error, Result};
pub use llama::{KvCache, LoadOptions, Model};
pub use weights::TensorSource;
