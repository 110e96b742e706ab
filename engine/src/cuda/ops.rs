//! The parameters of the kernels in `engine/cuda/model.cu`, as those structures have them, and the kernels themselves.

use super::code;
use super::device::Device;
use crate::error::Result;
use cudarc::driver::CudaFunction;
use cudarc::driver::sys::CUdeviceptr;

/// Tokens of a block of [`Attend`], of which a warp has 16.
pub(super) const ATTEND_TOKENS: u32 = 64;
pub(super) const ATTEND_THREADS: u32 = ATTEND_TOKENS * 2;
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

/// Bytes of shared memory that a block of [`Attend`] takes: queries as two numbers each, and two tiles of keys and of values, of as many positions as in model.cu.
pub(super) fn attend_bytes(cached_dim: usize) -> u32 {
    let positions = if cached_dim > 128 { 16 } else { 64 };
    (2 * (2 * ATTEND_TOKENS as usize + 4 * positions) * cached_dim) as u32
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
    pub n: u64,
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
    pub cached_dim: u32,
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
    pub place_heads: CudaFunction,
    /// As in [`CACHED_DIMS`], and the next.
    pub attend: [CudaFunction; 4],
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
            place_heads: kernel("place_heads")?,
            attend: of_dims("attend", attend_bytes)?,
            attend_one: of_dims("attend_one", one_bytes)?,
            choose: kernel("choose")?,
        })
    }
}
