//! The parameters of the kernels in `engine/cuda/model.cu`, as those structures have them, and the kernels themselves.

use super::code;
use super::device::Device;
use crate::error::Result;
use cudarc::driver::CudaFunction;
use cudarc::driver::sys::CUdeviceptr;

/// Threads of a block of [`Attend`].
pub(super) const ATTEND_THREADS: u32 = 128;
/// Quads of columns that a thread of [`SiluMul`] takes.
pub(super) const SILU_QUADS: usize = 2;
/// Threads of a block of [`AttendOne`], their warps, and positions that a block takes at a time.
pub(super) const ONE_THREADS: u32 = 256;
const ONE_WARPS: usize = ONE_THREADS as usize / 32;
pub(super) const ONE_TILE: usize = 64;
/// Elements of a head in the cache, padded, that [`Attend`] and [`AttendOne`] are made for.
pub(super) const CACHED_DIMS: [usize; 4] = [32, 64, 128, 256];
/// Query heads that a block of [`AttendOne`] takes at most.
pub(super) const ONE_HEADS: usize = 2;
/// Blocks of a cluster of [`AttendOne`], at most (`ONE_CLUSTER` in model.cu). Larger ones wait longer for their room.
pub(super) const ONE_CLUSTER: usize = 4;

/// Tokens of a block of [`Attend`], as in model.cu.
pub(super) fn attend_tokens(cached_dim: usize, narrow: bool) -> u32 {
    if narrow && cached_dim <= 128 { 128 } else { 64 }
}

/// Bytes of shared memory that it takes: queries, as two numbers each unless they are narrow, and two tiles of keys and of values, of as many positions as in
/// model.cu.
pub(super) fn attend_bytes(cached_dim: usize, narrow: bool) -> u32 {
    let positions = match cached_dim {
        256.. => 16,
        128 if narrow => 32,
        _ => 64,
    };
    let queries = attend_tokens(cached_dim, narrow) * if narrow { 1 } else { 2 };
    2 * (queries + 4 * positions) * cached_dim as u32
}

/// Bytes of shared memory that a block of [`AttendOne`] takes.
pub(super) fn one_bytes(cached_dim: usize) -> u32 {
    (4 * ONE_WARPS * ONE_HEADS * cached_dim) as u32
}

/// Pointers to nothing stand for what is optional.
pub(super) const NONE: CUdeviceptr = 0;

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct BeginStep {
    pub step_host: CUdeviceptr,
    pub position: CUdeviceptr,
    pub tokens: CUdeviceptr,
    pub n_tokens: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct EmbedDense {
    pub tokens: CUdeviceptr,
    pub table: CUdeviceptr,
    pub out: CUdeviceptr,
    pub n_cols: u32,
    pub stride: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Normalize {
    pub x: CUdeviceptr,
    pub weight: CUdeviceptr,
    pub out: CUdeviceptr,
    pub narrow: CUdeviceptr,
    pub eps: f32,
    pub n_cols: u32,
    pub stride: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct AddBias {
    pub out: CUdeviceptr,
    pub bias: CUdeviceptr,
    pub n_rows: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct SiluMul {
    pub gate: CUdeviceptr,
    pub up: CUdeviceptr,
    pub narrow: CUdeviceptr,
    pub n_cols: u32,
    pub stride: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub first_position: CUdeviceptr,
    pub q: CUdeviceptr,
    pub k: CUdeviceptr,
    pub v: CUdeviceptr,
    pub keys: CUdeviceptr,
    pub values: CUdeviceptr,
    pub inverse_frequencies: CUdeviceptr,
    pub query_norm: CUdeviceptr,
    pub key_norm: CUdeviceptr,
    pub query_eps: f32,
    pub key_eps: f32,
    pub n_heads: u32,
    pub n_kv_heads: u32,
    pub head_dim: u32,
    pub capacity: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Attend {
    pub first_position: CUdeviceptr,
    pub q: CUdeviceptr,
    pub keys: CUdeviceptr,
    pub values: CUdeviceptr,
    pub out: CUdeviceptr,
    pub n_tokens: u32,
    pub n_heads: u32,
    pub n_kv_heads: u32,
    pub head_dim: u32,
    pub capacity: u32,
    pub window: u32,
    pub stride: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct AttendOne {
    pub heads: Heads,
    pub out: CUdeviceptr,
    pub partial: CUdeviceptr,
    pub done: CUdeviceptr,
    pub window: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Choose {
    pub logits: CUdeviceptr,
    pub best: CUdeviceptr,
    pub done: CUdeviceptr,
    pub choice_host: CUdeviceptr,
    pub vocab: u32,
}

/// The kernels, loaded.
pub(super) struct Kernels {
    pub begin_step: CudaFunction,
    pub embed_dense: CudaFunction,
    pub normalize: CudaFunction,
    pub add_bias: CudaFunction,
    pub silu_mul: CudaFunction,
    /// As in [`CACHED_DIMS`], and the next three.
    pub place_heads: [CudaFunction; 4],
    pub attend: [CudaFunction; 4],
    /// The same with BF16 numbers alone.
    pub attend_narrow: [CudaFunction; 4],
    pub attend_one: [CudaFunction; 4],
    pub choose: CudaFunction,
}

impl Kernels {
    pub fn load(device: &Device) -> Result<Self> {
        let module = device.load(&code::MODEL)?;
        let kernel = |name| device.kernel(&module, name, 0);
        let of_dims = |name: &str, bytes: fn(usize) -> u32| -> Result<[CudaFunction; 4]> {
            let [a, b, c, d] = CACHED_DIMS.map(|dim| device.kernel(&module, &format!("{name}_{dim}"), bytes(dim)));
            Ok([a?, b?, c?, d?])
        };
        Ok(Self {
            begin_step: kernel("begin_step")?,
            embed_dense: kernel("embed_dense")?,
            normalize: kernel("normalize")?,
            add_bias: kernel("add_bias")?,
            silu_mul: kernel("silu_mul")?,
            place_heads: of_dims("place_heads", |_| 0)?,
            attend: of_dims("attend", |dim| attend_bytes(dim, false))?,
            attend_narrow: of_dims("attend_narrow", |dim| attend_bytes(dim, true))?,
            attend_one: of_dims("attend_one", one_bytes)?,
            choose: kernel("choose")?,
        })
    }
}
