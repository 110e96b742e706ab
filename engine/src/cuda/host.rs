//! Page-locked memory of the host: what the GPU reads and writes by itself, and the way of weights to the GPU.

use super::device::{Device, failed};
use crate::error::Result;
use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, DevicePtrMut, result};
use rayon::prelude::*;
use std::sync::Arc;

/// Bytes that are copied to page-locked memory at a time: the disk or the page cache fills one part while the GPU takes
/// the other.
const PART_BYTES: usize = 16 << 20;
/// Bytes that a thread copies of it: one thread is slower than the way to the GPU.
const TASK_BYTES: usize = 1 << 20;

/// Page-locked bytes that the GPU sees at the same address.
pub(super) struct Pinned {
    context: Arc<CudaContext>,
    data: *mut u8,
    len: usize,
}

// SAFETY: it owns its memory, which any thread may use.
unsafe impl Send for Pinned {}
// SAFETY: shared references only read it.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// `len` zeros, aligned to a page.
    pub fn new(device: &Device, len: usize) -> Result<Self> {
        let context = device.stream().context().clone();
        context.bind_to_thread().map_err(failed("binding the GPU to a thread"))?;
        // SAFETY: the memory is freed once, when this is dropped.
        let data = unsafe { result::malloc_host(len, 0) }.map_err(failed("page-locking memory"))?.cast::<u8>();
        // SAFETY: the allocation has `len` bytes.
        unsafe { data.write_bytes(0, len) };
        Ok(Self { context, data, len })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn address(&self) -> CUdeviceptr {
        self.data as CUdeviceptr
    }

    /// Word `i`, which the GPU may have written: the stream has to be synchronized.
    pub fn word(&self, i: usize) -> u32 {
        assert!(4 * (i + 1) <= self.len);
        // SAFETY: within the allocation, and aligned; volatile, as the writer is not this program.
        unsafe { self.data.cast::<u32>().add(i).read_volatile() }
    }

    /// The bytes; the GPU must be done with them.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the allocation has `len` initialized bytes, and this is the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
        // SAFETY: allocated by `new`, and freed only here.
        self.context.record_err(unsafe { result::free_host(self.data.cast()) });
    }
}

/// Copies weights from mapped files to the GPU.
pub(super) struct Upload {
    parts: [(Pinned, CudaEvent); 2],
    next: usize,
}

impl Upload {
    pub fn new(device: &Device) -> Result<Self> {
        let part = || -> Result<_> {
            let event = device.stream().context().new_event(None).map_err(failed("making an event"))?;
            Ok((Pinned::new(device, PART_BYTES)?, event))
        };
        Ok(Self { parts: [part()?, part()?], next: 0 })
    }

    /// Takes `data` to memory of its own.
    pub fn take(&mut self, device: &Device, data: &[u8]) -> Result<CudaSlice<u8>> {
        let stream = device.stream();
        // SAFETY: it is written as a whole before anything that is issued later.
        let mut to = unsafe { stream.alloc::<u8>(data.len()) }.map_err(|e| device.out_of_memory(e, data.len()))?;
        let address = to.device_ptr_mut(stream).0;
        // SAFETY: the allocation has as many bytes.
        unsafe { self.copy(device, data, address, data.len(), data.len())? };
        Ok(to)
    }

    /// Copies `data` to `to`, in rows of `row_bytes` that lie `stride_bytes` apart there.
    ///
    /// # Safety
    /// `to` has room for all rows, and nothing reads it before the stream comes to what is issued after this.
    pub unsafe fn copy(
        &mut self,
        device: &Device,
        data: &[u8],
        to: CUdeviceptr,
        row_bytes: usize,
        stride_bytes: usize,
    ) -> Result<()> {
        let stream = device.stream();
        let rows_of_part = (PART_BYTES / stride_bytes).max(1);
        let copying = "copying weights to the GPU";
        // Whichever thread this is.
        stream.context().bind_to_thread().map_err(failed(copying))?;
        let (run, run_stride) = if row_bytes == stride_bytes {
            (PART_BYTES, PART_BYTES)
        } else {
            (rows_of_part * row_bytes, rows_of_part * stride_bytes)
        };
        for (i, run) in data.chunks(run).enumerate() {
            let (pinned, event) = &mut self.parts[self.next];
            self.next ^= 1;
            event.synchronize().map_err(failed(copying))?;
            let len = if row_bytes == stride_bytes {
                let tasks = pinned.bytes_mut().par_chunks_mut(TASK_BYTES).zip(run.par_chunks(TASK_BYTES));
                tasks.for_each(|(to, from)| to[..from.len()].copy_from_slice(from));
                run.len()
            } else {
                let rows = pinned.bytes_mut().chunks_exact_mut(stride_bytes).zip(run.chunks_exact(row_bytes));
                for (to, from) in rows {
                    to[..row_bytes].copy_from_slice(from);
                    to[row_bytes..].fill(0);
                }
                run.len() / row_bytes * stride_bytes
            };
            let to = to + (i * run_stride) as CUdeviceptr;
            let bytes = &pinned.bytes_mut()[..len];
            // SAFETY: the part is not written before its event has come; `to` has the room, says the caller.
            unsafe { result::memcpy_htod_async(to, bytes, stream.cu_stream()) }.map_err(failed(copying))?;
            event.record(stream).map_err(failed(copying))?;
        }
        Ok(())
    }
}

impl Drop for Upload {
    /// The GPU may still read the parts.
    fn drop(&mut self) {
        for (pinned, event) in &self.parts {
            pinned.context.record_err(event.synchronize());
        }
    }
}
