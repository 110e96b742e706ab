//! The GPU's decoder by itself, for `verify` to compare with the reference.

use super::device::{Device, failed};
use super::encoded::{DeviceMatrix, EncodedKernels};
use super::host::Upload;
use super::zstd::Zstd;
use crate::error::Result;
use codecllm_codec::archive::Decoder;
use codecllm_codec::quantize::Codes;
use codecllm_codec::{Coder, EncodedTensor};
use std::sync::Mutex;

/// Decodes tensors to their codes on a GPU.
pub struct CudaDecoder {
    device: Device,
    kernels: EncodedKernels,
    upload: Mutex<Upload>,
    /// Opened for the first tensor of that coder.
    zstd: Mutex<Option<Zstd>>,
    name: String,
}

impl CudaDecoder {
    /// A decoder on a GPU.
    ///
    /// # Errors
    /// Kernels that the driver refuses, too little memory.
    pub fn new(device: Device) -> Result<Self> {
        let kernels = EncodedKernels::new(&device)?;
        let upload = Mutex::new(Upload::new(&device)?);
        let name = format!("cuda:{} ({})", device.index(), device.name()?);
        Ok(Self { device, kernels, upload, zstd: Mutex::new(None), name })
    }

    fn codes(&self, tensor: &EncodedTensor) -> Result<Codes<'static>> {
        let (device, stream) = (&self.device, self.device.stream());
        if tensor.coder() == Coder::Zstd {
            let mut zstd = self.zstd.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let zstd = match &mut *zstd {
                Some(zstd) => zstd,
                none => none.insert(Zstd::new(device)?),
            };
            return Ok(codes_of(zstd.codes(device, tensor)?, tensor));
        }
        let mut upload = self.upload.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let matrix = DeviceMatrix::upload(device, &self.kernels, &mut upload, tensor)?;
        let code_bytes = tensor.format().code_bits() as usize / 8;
        let mut decoded = device.zeros::<u8>(tensor.n_rows() * tensor.n_cols() * code_bytes)?;
        self.kernels.decode_codes(device, &mut [(&matrix, &mut decoded)])?;
        let bytes = stream.clone_dtoh(&decoded).map_err(failed("copying codes"))?;
        device.synchronize()?;
        Ok(codes_of(bytes, tensor))
    }
}

/// A tensor's codes from how they lie in memory.
fn codes_of(bytes: Vec<u8>, tensor: &EncodedTensor) -> Codes<'static> {
    match tensor.format().code_bits() {
        8 => Codes::U8(bytes.into()),
        _ => Codes::U16(bytes.as_chunks().0.iter().map(|code| u16::from_le_bytes(*code)).collect()),
    }
}

impl Decoder for CudaDecoder {
    fn name(&self) -> &str {
        &self.name
    }

    fn decode(&self, tensor: &EncodedTensor) -> Result<Codes<'static>, String> {
        self.codes(tensor).map_err(|e| e.to_string())
    }
}
