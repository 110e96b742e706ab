//! Decoded matrices, for products of many tokens: there are two places for them, of which one is filled, on a stream of its own, while products read the other.
//! What a stream leaves idle between its kernels, and where the last of their thread blocks end, is the other's.

use super::device::{Device, failed};
use super::encoded::{DeviceMatrix, EncodedKernels, decoded_len};
use crate::error::Result;
use crate::memory::TOGETHER_BYTES;
use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaEvent, CudaSlice};
use half::bf16;
use std::collections::VecDeque;
use std::sync::Arc;

/// What decodes ahead of the products.
pub(super) struct Ahead {
    /// The same GPU, with a stream on which matrices are decoded.
    device: Device,
    /// Matrices of the next products, in their order, which are not decoded yet.
    expected: VecDeque<Arc<DeviceMatrix>>,
    slots: [Slot; 2],
    /// What had been issued to the products' stream when matrices were last decoded beside it.
    issued: CudaEvent,
}

/// A place for matrices that are decoded together.
struct Slot {
    values: CudaSlice<bf16>,
    /// Those whose products are not issued yet, and where they lie.
    matrices: VecDeque<(Arc<DeviceMatrix>, CUdeviceptr)>,
    /// They are decoded, and whether the products' stream waits for that already.
    ready: CudaEvent,
    is_awaited: bool,
}

impl Slot {
    fn new(device: &Device) -> Result<Self> {
        // SAFETY: it is empty.
        let values = unsafe { device.stream().alloc(0) }.map_err(failed("allocating memory"))?;
        Ok(Self { values, matrices: VecDeque::new(), ready: device.event()?, is_awaited: true })
    }

    /// Makes room for so many values, where nothing that is issued works with what is there.
    fn grow(&mut self, device: &Device, len: usize) -> Result<()> {
        if self.values.len() < len {
            *self = Self::new(device)?;
            // SAFETY: every value is written before it is read.
            self.values =
                unsafe { device.stream().alloc(len) }.map_err(|e| device.out_of_memory(e, len * size_of::<bf16>()))?;
        }
        Ok(())
    }
}

impl Ahead {
    /// For products on the device's stream, as all that follows.
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self {
            device: device.beside()?,
            expected: VecDeque::new(),
            slots: [Slot::new(device)?, Slot::new(device)?],
            issued: device.event()?,
        })
    }

    /// Says which matrices the next products are of, behind those that are expected already, and begins to decode them.
    pub fn expect(
        &mut self,
        device: &Device,
        kernels: &EncodedKernels,
        matrices: impl Iterator<Item = Arc<DeviceMatrix>>,
    ) -> Result<()> {
        self.expected.extend(matrices);
        self.fill(device, kernels)
    }

    /// Where a matrix lies decoded, for work on the device's stream; [`done`](Self::done) follows it.
    pub fn place(
        &mut self,
        device: &Device,
        kernels: &EncodedKernels,
        matrix: &Arc<DeviceMatrix>,
    ) -> Result<CUdeviceptr> {
        let next =
            |slot: &Slot| slot.matrices.front().filter(|(first, _)| Arc::ptr_eq(first, matrix)).map(|next| next.1);
        for slot in &mut self.slots {
            if let Some(place) = next(slot) {
                if !std::mem::replace(&mut slot.is_awaited, true) {
                    device.stream().wait(&slot.ready).map_err(failed("waiting for decoded weights"))?;
                }
                return Ok(place);
            }
        }
        // Not the one that was expected.
        self.clear()?;
        let slot = &mut self.slots[0];
        slot.grow(device, decoded_len(matrix))?;
        let place = kernels.decode_together(device, &[matrix], &mut slot.values)?[0];
        slot.matrices.push_back((matrix.clone(), place));
        Ok(place)
    }

    /// The product of the matrix that was placed last is issued.
    pub fn done(&mut self, device: &Device, kernels: &EncodedKernels, matrix: &Arc<DeviceMatrix>) -> Result<()> {
        for slot in &mut self.slots {
            if slot.matrices.front().is_some_and(|(first, _)| Arc::ptr_eq(first, matrix)) {
                slot.matrices.pop_front();
            }
        }
        self.fill(device, kernels)
    }

    /// Expects nothing any more, and has nothing decoded. A place that is free from then on, for work on the device's stream.
    pub fn clear(&mut self) -> Result<&mut CudaSlice<bf16>> {
        if !self.expected.is_empty() || self.slots.iter().any(|slot| !slot.matrices.is_empty()) {
            self.device.synchronize()?;
        }
        self.expected.clear();
        for slot in &mut self.slots {
            slot.matrices.clear();
            slot.is_awaited = true;
        }
        Ok(&mut self.slots[0].values)
    }

    /// Bytes of both places.
    pub fn n_bytes(&self) -> usize {
        self.slots.iter().map(|slot| slot.values.num_bytes()).sum()
    }

    /// Decodes what is expected into places whose products are all issued: once these are done.
    fn fill(&mut self, device: &Device, kernels: &EncodedKernels) -> Result<()> {
        let Self { device: beside, expected, slots, issued } = self;
        for slot in slots.iter_mut().filter(|slot| slot.matrices.is_empty()) {
            let mut len = 0;
            let room = slot.values.len().max(TOGETHER_BYTES as usize / size_of::<bf16>());
            let fitting = expected.iter().take_while(|matrix| {
                let is_first = len == 0;
                len += decoded_len(matrix);
                is_first || len <= room
            });
            let n_fitting = fitting.count();
            if n_fitting == 0 {
                break;
            }
            let group: Vec<_> = expected.drain(..n_fitting).collect();
            slot.grow(device, group.iter().map(|matrix| decoded_len(matrix)).sum())?;
            issued.record(device.stream()).map_err(failed("ordering two streams"))?;
            beside.stream().wait(issued).map_err(failed("ordering two streams"))?;
            let matrices: Vec<&DeviceMatrix> = group.iter().map(|matrix| &**matrix).collect();
            let places = kernels.decode_together(beside, &matrices, &mut slot.values)?;
            slot.ready.record(beside.stream()).map_err(failed("ordering two streams"))?;
            slot.is_awaited = false;
            slot.matrices = group.into_iter().zip(places).collect();
        }
        Ok(())
    }
}

impl Drop for Ahead {
    /// What it works with is given back in the order of the other stream.
    fn drop(&mut self) {
        let _ = self.device.synchronize();
    }
}
