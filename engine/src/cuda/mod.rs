//! The CUDA backend: a model's weights lie in a GPU's memory, plain or encoded, and its operations run there.
//!
//! Nothing of CUDA is needed to build it or to start the program: the driver is looked for when a [`Device`] is opened.
//! The kernels (`engine/cuda/*.cu`) are compiled ahead, for every GPU from Ampere on, by `scripts/build-kernels.sh`; NVRTC, where it is
//! installed, compiles them for GPUs that those leave out.

mod ahead;
mod backend;
pub mod bench;
mod blas;
mod code;
mod decoder;
mod device;
mod encoded;
mod host;
mod nvcomp;
mod ops;
mod sample;
mod zstd;

pub use backend::{Batch, Buffer, Cache, CudaBackend, Matrix, Recording, Vector};
pub use decoder::CudaDecoder;
pub use device::Device;
pub use encoded::{External, ExternalInput, ExternalMatrix};
