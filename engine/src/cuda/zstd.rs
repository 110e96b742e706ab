//! Matrices of coder `zstd` on a GPU: their frames lie there as they are in the archive, and whenever one is used, nvCOMP decompresses
//! it into a buffer that all share, from which its values are made for a dense product.
//!
//! For comparison and interoperation: every use pays for writing the decoded matrix to memory and reading it again.

use super::code;
use super::device::{Device, Grid, failed};
use super::nvcomp::{Chunks, Method, Nvcomp, Room};
use crate::error::Result;
use codecllm_codec::encoded::Checks;
use codecllm_codec::quantize::code_value;
use codecllm_codec::{EncodedTensor, Format};
use cudarc::driver::{CudaFunction, CudaSlice, DevicePtr, DevicePtrMut};
use half::bf16;

const THREADS: u32 = 256;

/// nvCOMP, and what all matrices share.
pub(super) struct Zstd {
    nvcomp: Nvcomp,
    to_values: CudaFunction,
    /// The codes of a matrix, and what decompressing them takes; none before the first.
    room: Option<Room>,
    /// For [`Device::separate`].
    word: CudaSlice<u32>,
}

/// A matrix, compressed, in the GPU's memory.
pub(super) struct ZstdMatrix {
    n_rows: usize,
    n_cols: usize,
    chunks: Chunks,
    /// What a code of one byte stands for, and each row's scale; none where the codes are values.
    values: Option<(CudaSlice<f32>, CudaSlice<f32>)>,
}

/// `CodesToValues` in codes.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct CodesToValues {
    codes: u64,
    values: u64,
    scales: u64,
    out: u64,
    n_cols: u32,
    stride: u32,
}

impl ZstdMatrix {
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Whether its values are BF16 to the bit.
    pub fn is_lossless(&self) -> bool {
        self.values.is_none()
    }

    /// Bytes in the GPU's memory.
    pub fn bytes(&self) -> u64 {
        let values = self.values.as_ref().map_or(0, |(values, scales)| values.num_bytes() + scales.num_bytes());
        self.chunks.bytes() + values as u64
    }
}

impl Zstd {
    /// Opens nvCOMP.
    ///
    /// # Errors
    /// It is not there, with what to install.
    pub fn new(device: &Device) -> Result<Self> {
        let nvcomp = Nvcomp::required("a tensor of coder `zstd` on a GPU")?;
        let module = device.load(&code::CODES)?;
        let to_values = device.kernel(&module, "codes_to_values", 0)?;
        Ok(Self { nvcomp, to_values, room: None, word: device.zeros(1)? })
    }

    /// Takes a tensor to the GPU and has it decompressed once: nvCOMP promises nothing about frames that are damaged, so that the
    /// checksums are compared whatever the caller asked for, and every frame has to hold what it should.
    ///
    /// # Errors
    /// A damaged tensor, too little memory.
    pub fn matrix(&mut self, device: &Device, tensor: &EncodedTensor) -> Result<ZstdMatrix> {
        let tensor = EncodedTensor::parse(tensor.bytes().clone(), Checks::Full)?;
        let (n_rows, n_cols, format) = (tensor.n_rows(), tensor.n_cols(), tensor.format());
        let out_bytes = n_rows * n_cols * (format.code_bits() as usize / 8);
        let method = Method::Zstd;
        let chunks = Chunks::new(device, tensor.bytes(), &tensor.frames(), method.align(), out_bytes)?;
        if self.room.as_ref().is_none_or(|room| !room.holds(out_bytes)) {
            // The old one goes first, so that there is memory for both in turn.
            self.room = None;
            self.room = Some(Room::new(device, &self.nvcomp, method, out_bytes)?);
        }
        if let Some(room) = &mut self.room {
            self.nvcomp.check_chunks(device, &chunks, room)?;
        }
        let floats = |values: Vec<f32>| {
            device.stream().clone_htod(&values).map_err(|e| device.out_of_memory(e, 4 * values.len()))
        };
        let values = match format {
            Format::Bf16 => None,
            _ => {
                let values = floats((0..256).map(|code| code_value(format, code)).collect())?;
                Some((values, floats((0..n_rows).map(|row| tensor.scale(row)).collect())?))
            }
        };
        Ok(ZstdMatrix { n_rows, n_cols, chunks, values })
    }

    /// Bytes in the GPU's memory, beside those of the matrices.
    pub fn bytes(&self) -> u64 {
        self.room.as_ref().map_or(0, Room::bytes)
    }

    /// Decodes a tensor to its codes as they lie in memory, and waits for them.
    ///
    /// # Errors
    /// As [`Self::matrix`].
    pub fn codes(&mut self, device: &Device, tensor: &EncodedTensor) -> Result<Vec<u8>> {
        // To be sure of its frames, it is decompressed.
        let matrix = self.matrix(device, tensor)?;
        let Some(room) = &self.room else { return Ok(Vec::new()) };
        let mut codes = device.stream().clone_dtoh(&room.out).map_err(failed("copying codes"))?;
        codes.truncate(matrix.chunks.out_bytes());
        Ok(codes)
    }

    /// Issues the decoding of a matrix to its values, `[n_rows, stride]`, with zeros past its columns. What is issued next starts
    /// when they are there.
    ///
    /// # Panics
    /// If `out` is too small, or the matrix not one of [`Self::matrix`].
    pub fn decode(
        &mut self,
        device: &Device,
        matrix: &ZstdMatrix,
        out: &mut CudaSlice<bf16>,
        stride: usize,
    ) -> Result<()> {
        assert!(stride >= matrix.n_cols && out.len() >= matrix.n_rows * stride, "room for a matrix's values");
        let room = self.room.as_mut().expect("a matrix has made room");
        self.nvcomp.decompress(device, &matrix.chunks, room)?;
        let stream = device.stream();
        let address = |slice: &CudaSlice<f32>| slice.device_ptr(stream).0;
        let (values, scales) = matrix.values.as_ref().map_or((0, 0), |(v, s)| (address(v), address(s)));
        let params = CodesToValues {
            codes: room.out.device_ptr(stream).0,
            values,
            scales,
            out: out.device_ptr_mut(stream).0,
            n_cols: matrix.n_cols as u32,
            stride: stride as u32,
        };
        let grid = Grid { blocks: (matrix.n_rows as u32, 1, 1), threads: THREADS, shared_bytes: 0 };
        // SAFETY: the room holds the matrix's codes, there is a scale for each row, and `out` was checked.
        unsafe { device.launch(&self.to_values, grid, &params)? };
        device.separate(&mut self.word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use codecllm_codec::encoded::EncodeOptions;
    use codecllm_codec::quantize::Codes;
    use codecllm_codec::{Coder, Cpu, Dtype, Tensor, encode_tensor};

    fn tensor(format: Format, n_rows: usize, n_cols: usize) -> EncodedTensor {
        let value = |i: usize| bf16::from_f32(((i * 7919 % 1000) as f32 - 500.0) * 1e-4);
        let data: Vec<u8> = (0..n_rows * n_cols).flat_map(|i| value(i).to_le_bytes()).collect();
        let source = Tensor { name: "w".into(), dtype: Dtype::Bf16, shape: vec![n_rows, n_cols], data: data.into() };
        let options = EncodeOptions { format, coder: Coder::Zstd, step: Some(1e-3), ..Default::default() };
        EncodedTensor::parse(encode_tensor(&source, &options).unwrap().into(), Checks::Full).unwrap()
    }

    /// A GPU and nvCOMP, or nothing where one is missing and no GPU is required.
    fn gpu() -> Option<(Device, Zstd)> {
        let found = Device::open(0).and_then(|device| {
            let zstd = Zstd::new(&device)?;
            Ok((device, zstd))
        });
        let required = std::env::var_os("CODECLLM_REQUIRE_CUDA").is_some_and(|v| v == "1");
        match found {
            Ok(found) => Some(found),
            Err(Error::Device(problem)) if !required || problem.contains("nvCOMP, which was not found") => {
                eprintln!("skipped: {problem}");
                None
            }
            Err(e) => panic!("{e}"),
        }
    }

    #[test]
    fn decodes_to_the_values_of_the_plain_decoder() {
        let Some((device, mut zstd)) = gpu() else { return };
        assert_eq!(zstd.bytes(), 0);
        // One frame, several, rows that begin anywhere; large, then small in the same room.
        for (n_rows, n_cols) in [(257, 1000), (1, 1), (33, 31), (100, 2080)] {
            for &format in Format::ALL {
                let tensor = tensor(format, n_rows, n_cols);
                let matrix = zstd.matrix(&device, &tensor).unwrap();
                assert!(matrix.bytes() >= tensor.sizes().payload);
                let stride = n_cols.next_multiple_of(8);
                let ones = vec![bf16::ONE; n_rows * stride];
                let mut out = device.stream().clone_htod(&ones).unwrap();
                zstd.decode(&device, &matrix, &mut out, stride).unwrap();
                let found = device.stream().clone_dtoh(&out).unwrap();
                let codes = tensor.decode_codes(Cpu::Scalar).unwrap();
                let bytes: Vec<u8> = match &codes {
                    Codes::U8(codes) => codes.to_vec(),
                    Codes::U16(codes) => codes.iter().flat_map(|code| code.to_le_bytes()).collect(),
                };
                assert!(zstd.codes(&device, &tensor).unwrap() == bytes, "{n_rows} x {n_cols} {format}: codes");
                for (i, found) in found.into_iter().enumerate() {
                    let (row, col) = (i / stride, i % stride);
                    let value = |col| code_value(format, codes.get(row * n_cols + col)) * tensor.scale(row);
                    let expected = if col < n_cols { bf16::from_f32(value(col)) } else { bf16::ZERO };
                    assert_eq!(found.to_bits(), expected.to_bits(), "{n_rows} x {n_cols} {format}: {row}, {col}");
                }
            }
        }
    }

    #[test]
    fn a_damaged_frame_is_refused_before_it_is_decompressed() {
        let Some((device, mut zstd)) = gpu() else { return };
        let tensor = tensor(Format::Int8, 64, 1024);
        let mut bytes = tensor.bytes().to_vec();
        bytes[tensor.frames()[0].start + 20] ^= 1;
        let tensor = EncodedTensor::parse(bytes.into(), Checks::None).unwrap();
        let problem = zstd.matrix(&device, &tensor).err().unwrap().to_string();
        assert!(problem.contains("checksum"), "{problem}");
    }
}
