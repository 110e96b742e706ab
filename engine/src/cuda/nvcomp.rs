//! NVIDIA's nvCOMP, where the user has it: decompresses the frames of `zstd` tensors on the GPU, and stands beside the engine's own
//! decoder in the bench.
//!
//! It is proprietary, so that it is neither bundled nor linked: the library is opened when it is first needed. Version 6 of its
//! batched interface is what is declared here (`nvcomp/zstd.h`, `nvcomp/ans.h`).

use super::device::{Device, failed};
use crate::error::{Error, Result};
use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr, sys::CUstream};
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

/// The version whose interface is declared here.
const MAJOR: u32 = 6;
const LIBRARY: &str = "libnvcomp.so.6";
/// Names the library's file where the loader does not find it.
const PATH_VARIABLE: &str = "CODECLLM_NVCOMP";
/// What to do without it.
pub(super) const INSTALL: &str = "pip install 'nvidia-libnvcomp-cu13>=6,<7', and name its libnvcomp.so.6 in CODECLLM_NVCOMP or put its \
                                  folder into LD_LIBRARY_PATH";
/// Bytes that a chunk holds, the last one of a buffer excepted: what `docs/format.md` says of frames, and what nvCOMP advises.
pub(super) const CHUNK_BYTES: usize = 1 << 16;
/// Chunks of one call: working memory is three times what they hold.
const CALL_CHUNKS: usize = 1 << 11;
const SUCCESS: c_int = 0;

/// How chunks are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Zstd,
    Ans,
}

/// What elements `Ans` is told of: `nvcompType_t`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum ElementType {
    Byte = 1,
    E4m3 = 9,
    Float16 = 10,
}

/// `nvcompBatchedZstdDecompressOpts_t`, `nvcompBatchedANSDecompressOpts_t` and `nvcompBatchedANSCompressOpts_t`: 64 bytes, passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
struct Options {
    /// Decompression: the backend. ANS compression: the algorithm.
    first: c_int,
    /// ANS: the data type, or 0xff for that which the chunks say.
    data_type: c_int,
    rest: [u8; 56],
}

#[repr(C)]
#[derive(Default)]
struct Properties {
    version: u32,
    cudart_version: u32,
}

type Status = c_int;
type TempSize = unsafe extern "C" fn(usize, usize, Options, *mut usize, usize, CUstream) -> Status;
type Decompress = unsafe extern "C" fn(
    *const *const c_void,
    *const usize,
    *const usize,
    *mut usize,
    usize,
    *mut c_void,
    usize,
    *const *mut c_void,
    Options,
    *mut Status,
    CUstream,
) -> Status;
type MaxOutput = unsafe extern "C" fn(usize, Options, *mut usize) -> Status;
type Compress = unsafe extern "C" fn(
    *const *const c_void,
    *const usize,
    usize,
    usize,
    *mut c_void,
    usize,
    *const *mut c_void,
    *mut usize,
    Options,
    *mut Status,
    CUstream,
) -> Status;

/// The library, opened.
pub(super) struct Nvcomp {
    library: Library,
    version: u32,
}

/// Compressed chunks in the GPU's memory.
pub(super) struct Chunks {
    _data: CudaSlice<u8>,
    /// Where each begins, and its bytes.
    starts: CudaSlice<u64>,
    lens: CudaSlice<u64>,
    n_chunks: usize,
    n_bytes: usize,
    out_bytes: usize,
}

/// Where chunks are decompressed to, and what that needs: for the largest of the buffers that share it.
pub(super) struct Room {
    method: Method,
    /// The decompressed bytes, in whole chunks.
    pub out: CudaSlice<u8>,
    outs: CudaSlice<u64>,
    capacities: CudaSlice<u64>,
    found: CudaSlice<u64>,
    statuses: CudaSlice<i32>,
    temp: CudaSlice<u8>,
}

impl Chunks {
    /// Takes `data`, cut at `ranges`, to the GPU. Chunks begin at multiples of `align` bytes there. They hold `out_bytes` in all.
    pub fn new(
        device: &Device,
        data: &[u8],
        ranges: &[std::ops::Range<usize>],
        align: usize,
        out_bytes: usize,
    ) -> Result<Self> {
        if ranges.len() != out_bytes.div_ceil(CHUNK_BYTES) {
            return Err(Error::Parameter(format!("{} chunks for {out_bytes} bytes", ranges.len())));
        }
        let mut packed = Vec::with_capacity(data.len() + align * ranges.len());
        let mut starts = Vec::with_capacity(ranges.len());
        for range in ranges {
            packed.resize(packed.len().next_multiple_of(align), 0);
            starts.push(packed.len() as u64);
            packed.extend_from_slice(&data[range.clone()]);
        }
        let stream = device.stream();
        let data = stream.clone_htod(&packed).map_err(|e| device.out_of_memory(e, packed.len()))?;
        let base = data.device_ptr(stream).0;
        starts.iter_mut().for_each(|start| *start += base);
        let lens: Vec<u64> = ranges.iter().map(|r| r.len() as u64).collect();
        let words = |words: &[u64]| stream.clone_htod(words).map_err(|e| device.out_of_memory(e, 8 * words.len()));
        let (starts, lens) = (words(&starts)?, words(&lens)?);
        Ok(Self { _data: data, starts, lens, n_chunks: ranges.len(), n_bytes: packed.len(), out_bytes })
    }

    /// Bytes in the GPU's memory.
    pub fn bytes(&self) -> u64 {
        (self.n_bytes + 16 * self.n_chunks) as u64
    }

    /// Bytes that the chunks hold.
    pub fn out_bytes(&self) -> usize {
        self.out_bytes
    }
}

impl Room {
    /// Room for buffers of up to `out_bytes`.
    pub fn new(device: &Device, nvcomp: &Nvcomp, method: Method, out_bytes: usize) -> Result<Self> {
        let n_chunks = out_bytes.div_ceil(CHUNK_BYTES);
        let out = device.zeros::<u8>(n_chunks * CHUNK_BYTES)?;
        let stream = device.stream();
        let base = out.device_ptr(stream).0;
        let outs: Vec<u64> = (0..n_chunks).map(|i| base + (i * CHUNK_BYTES) as u64).collect();
        let words = |words: &[u64]| stream.clone_htod(words).map_err(|e| device.out_of_memory(e, 8 * words.len()));
        Ok(Self {
            method,
            outs: words(&outs)?,
            capacities: words(&vec![CHUNK_BYTES as u64; n_chunks])?,
            found: device.zeros(n_chunks)?,
            statuses: device.zeros(n_chunks)?,
            temp: device.zeros(nvcomp.temp_bytes(device, method, n_chunks.min(CALL_CHUNKS))?)?,
            out,
        })
    }

    /// Bytes in the GPU's memory.
    pub fn bytes(&self) -> u64 {
        (self.out.len() + 28 * self.outs.len() + self.temp.len()) as u64
    }

    /// Whether a buffer of so many bytes fits.
    pub fn holds(&self, out_bytes: usize) -> bool {
        out_bytes <= self.out.len()
    }
}

impl Nvcomp {
    /// Opens the library: that which `CODECLLM_NVCOMP` names, else that which the loader or the active Python environment has.
    /// `None` where there is none.
    ///
    /// # Errors
    /// A library that is named but does not open, one of another version.
    pub fn load() -> Result<Option<Self>> {
        match std::env::var_os(PATH_VARIABLE) {
            Some(path) => {
                Self::open(Path::new(&path)).map(Some).map_err(|e| Error::device(format!("{PATH_VARIABLE}: {e}")))
            }
            None => Self::find(std::iter::once(PathBuf::from(LIBRARY)).chain(python_places())),
        }
    }

    /// The first of these that is there.
    fn find(places: impl IntoIterator<Item = PathBuf>) -> Result<Option<Self>> {
        // SAFETY: nvCOMP's initializers register its kernels, and that is all.
        let found = places.into_iter().find_map(|place| unsafe { Library::new(place) }.ok());
        found.map(Self::new).transpose()
    }

    fn open(path: &Path) -> Result<Self> {
        // SAFETY: as above.
        let library = unsafe { Library::new(path) };
        let problem = |e: libloading::Error| match std::error::Error::source(&e) {
            Some(cause) => Error::device(format!("{} does not open: {cause}", path.display())),
            None => Error::device(format!("{} does not open: {e}", path.display())),
        };
        Self::new(library.map_err(problem)?)
    }

    /// As [`Self::load`], for `what`, which cannot do without.
    ///
    /// # Errors
    /// That there is none, and what to install, too.
    pub fn required(what: &str) -> Result<Self> {
        Self::load()?.ok_or_else(|| missing(what))
    }

    fn new(library: Library) -> Result<Self> {
        let mut properties = Properties::default();
        let mut nvcomp = Self { library, version: 0 };
        let get: unsafe extern "C" fn(*mut Properties) -> Status = nvcomp.function("nvcompGetProperties")?;
        // SAFETY: the structure is that of `nvcomp/shared_types.h`.
        let status = unsafe { get(&mut properties) };
        nvcomp.check(status, "asking nvCOMP for its version")?;
        nvcomp.version = properties.version;
        if properties.version / 1000 != MAJOR {
            return Err(Error::device(format!(
                "nvCOMP has version {}; {MAJOR}.x is needed: {INSTALL}",
                nvcomp.version()
            )));
        }
        Ok(nvcomp)
    }

    /// As in 6.0.0.
    pub fn version(&self) -> String {
        format!("{}.{}.{}", self.version / 1000, self.version % 1000 / 100, self.version % 100)
    }

    fn function<F: Copy>(&self, name: &str) -> Result<F> {
        // SAFETY: every use names a function with the type that nvCOMP's headers give it.
        let found = unsafe { self.library.get::<F>(name.as_bytes()) };
        found
            .map(|f| *f)
            .map_err(|_| Error::device(format!("nvCOMP has no `{name}`; version {MAJOR}.x is needed: {INSTALL}")))
    }

    fn check(&self, status: Status, doing: &str) -> Result<()> {
        if status == SUCCESS {
            return Ok(());
        }
        let text =
            self.function::<unsafe extern "C" fn(Status) -> *const c_char>("nvcompGetStatusString").map(|text| {
                // SAFETY: the library returns a string of its own for every number.
                unsafe { CStr::from_ptr(text(status)) }.to_string_lossy().into_owned()
            });
        Err(Error::device(format!("{doing} failed: {} (status {status})", text.unwrap_or_default())))
    }

    /// Working memory for so many chunks.
    fn temp_bytes(&self, device: &Device, method: Method, n_chunks: usize) -> Result<usize> {
        let size: TempSize = self.function(match method {
            Method::Zstd => "nvcompBatchedZstdDecompressGetTempSize",
            Method::Ans => "nvcompBatchedANSDecompressGetTempSize",
        })?;
        let mut bytes = 0;
        let stream = device.bound_stream()?;
        // SAFETY: as the header declares it.
        let status =
            unsafe { size(n_chunks, CHUNK_BYTES, method.decompression(), &mut bytes, n_chunks * CHUNK_BYTES, stream) };
        self.check(status, "asking nvCOMP for its working memory")?;
        Ok(bytes)
    }

    /// Issues the decompression of chunks to `room.out`.
    ///
    /// What nvCOMP does with chunks that are not what its compressor, or Zstandard's, makes is undefined: they have to come from a
    /// tensor whose checksums were compared.
    pub fn decompress(&self, device: &Device, chunks: &Chunks, room: &mut Room) -> Result<()> {
        if !room.holds(chunks.out_bytes) {
            return Err(Error::Parameter(format!("room for {} of {} bytes", room.out.len(), chunks.out_bytes)));
        }
        let decompress: Decompress = self.function(match room.method {
            Method::Zstd => "nvcompBatchedZstdDecompressAsync",
            Method::Ans => "nvcompBatchedANSDecompressAsync",
        })?;
        let stream = device.stream();
        let (starts, lens) = (chunks.starts.device_ptr(stream).0, chunks.lens.device_ptr(stream).0);
        let (outs, capacities) = (room.outs.device_ptr(stream).0, room.capacities.device_ptr(stream).0);
        let (found, statuses) = (room.found.device_ptr_mut(stream).0, room.statuses.device_ptr_mut(stream).0);
        let temp = room.temp.device_ptr_mut(stream).0;
        let raw = device.bound_stream()?;
        for first in (0..chunks.n_chunks).step_by(CALL_CHUNKS) {
            let n = CALL_CHUNKS.min(chunks.n_chunks - first);
            let (words, ints) = (8 * first as u64, 4 * first as u64);
            // SAFETY: every array has an element for each chunk, every output room for a whole one.
            let status = unsafe {
                decompress(
                    (starts + words) as *const _,
                    (lens + words) as *const _,
                    (capacities + words) as *const _,
                    (found + words) as *mut _,
                    n,
                    temp as *mut _,
                    room.temp.len(),
                    (outs + words) as *const _,
                    room.method.decompression(),
                    (statuses + ints) as *mut _,
                    raw,
                )
            };
            self.check(status, "decompressing with nvCOMP")?;
        }
        Ok(())
    }

    /// Decompresses once, waits, and checks that every chunk held what it should.
    pub fn check_chunks(&self, device: &Device, chunks: &Chunks, room: &mut Room) -> Result<()> {
        self.decompress(device, chunks, room)?;
        device.synchronize()?;
        let statuses = read_back(device, &room.statuses)?;
        let found = read_back(device, &room.found)?;
        for i in 0..chunks.n_chunks {
            self.check(statuses[i], &format!("decompressing chunk {i} with nvCOMP"))?;
            let expected = CHUNK_BYTES.min(chunks.out_bytes - i * CHUNK_BYTES);
            if found[i] != expected as u64 {
                return Err(Error::device(format!(
                    "chunk {i} decompressed to {} bytes, expected {expected}",
                    found[i]
                )));
            }
        }
        Ok(())
    }

    /// Compresses `data` on the GPU with nvCOMP's ANS: the chunks, one after another, and where each lies.
    pub fn compress_ans(
        &self,
        device: &Device,
        data: &[u8],
        element: ElementType,
    ) -> Result<(Vec<u8>, Vec<std::ops::Range<usize>>)> {
        let temp_size: TempSize = self.function("nvcompBatchedANSCompressGetTempSize")?;
        let max_output: MaxOutput = self.function("nvcompBatchedANSCompressGetMaxOutputChunkSize")?;
        let compress: Compress = self.function("nvcompBatchedANSCompressAsync")?;
        let options = Options { first: 0, data_type: element as c_int, rest: [0; 56] };
        let n_chunks = data.len().div_ceil(CHUNK_BYTES);
        let raw = device.bound_stream()?;
        let (mut temp_bytes, mut stride) = (0, 0);
        // SAFETY: as the header declares them.
        let statuses = unsafe {
            [
                temp_size(n_chunks, CHUNK_BYTES, options, &mut temp_bytes, data.len(), raw),
                max_output(CHUNK_BYTES, options, &mut stride),
            ]
        };
        for status in statuses {
            self.check(status, "asking nvCOMP for its working memory")?;
        }
        let stride = stride.next_multiple_of(16);
        let stream = device.stream();
        let source = stream.clone_htod(data).map_err(|e| device.out_of_memory(e, data.len()))?;
        let mut out = device.zeros::<u8>(n_chunks * stride)?;
        let mut temp = device.zeros::<u8>(temp_bytes.max(1))?;
        let mut found = device.zeros::<u64>(n_chunks)?;
        let mut statuses = device.zeros::<i32>(n_chunks)?;
        let (from, to) = (source.device_ptr(stream).0, out.device_ptr_mut(stream).0);
        let words = |words: Vec<u64>| stream.clone_htod(&words).map_err(|e| device.out_of_memory(e, 8 * words.len()));
        let starts = words((0..n_chunks).map(|i| from + (i * CHUNK_BYTES) as u64).collect())?;
        let sizes = words((0..n_chunks).map(|i| CHUNK_BYTES.min(data.len() - i * CHUNK_BYTES) as u64).collect())?;
        let outs = words((0..n_chunks).map(|i| to + (i * stride) as u64).collect())?;
        // SAFETY: every array has an element for each chunk, every output the size that nvCOMP asks for.
        let status = unsafe {
            compress(
                starts.device_ptr(stream).0 as *const _,
                sizes.device_ptr(stream).0 as *const _,
                CHUNK_BYTES,
                n_chunks,
                temp.device_ptr_mut(stream).0 as *mut _,
                temp_bytes,
                outs.device_ptr(stream).0 as *const _,
                found.device_ptr_mut(stream).0 as *mut _,
                options,
                statuses.device_ptr_mut(stream).0 as *mut _,
                raw,
            )
        };
        self.check(status, "compressing with nvCOMP")?;
        device.synchronize()?;
        for status in read_back(device, &statuses)? {
            self.check(status, "compressing with nvCOMP")?;
        }
        let (out, found) = (read_back(device, &out)?, read_back(device, &found)?);
        let ranges = found.iter().enumerate().map(|(i, &len)| i * stride..i * stride + (len as usize).min(stride));
        Ok((out, ranges.collect()))
    }
}

impl Method {
    fn decompression(self) -> Options {
        // ANS: of whatever type the chunks say.
        Options { first: 0, data_type: if self == Self::Ans { 0xff } else { 0 }, rest: [0; 56] }
    }

    /// Bytes at whose multiples compressed chunks have to begin.
    pub fn align(self) -> usize {
        match self {
            Self::Zstd => 1,
            Self::Ans => 16,
        }
    }
}

fn read_back<T: DeviceRepr>(device: &Device, data: &CudaSlice<T>) -> Result<Vec<T>> {
    device.stream().clone_dtoh(data).map_err(failed("reading nvCOMP's results"))
}

/// The error where there is no nvCOMP.
fn missing(what: &str) -> Error {
    Error::device(format!("{what} needs NVIDIA's nvCOMP, which was not found: {INSTALL}"))
}

/// Where pip puts the library in the active Python environment.
fn python_places() -> Vec<PathBuf> {
    let roots = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let versions = roots.filter_map(|root| std::fs::read_dir(root.join("lib")).ok()).flatten().flatten();
    let pythons = versions.filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"));
    pythons.map(|p| p.path().join("site-packages/nvidia/libnvcomp/lib64").join(LIBRARY)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Needs the library, not a GPU: names, version and the way that structures are passed.
    #[test]
    fn the_library_is_what_is_declared() {
        let nvcomp = match Nvcomp::load().unwrap() {
            Some(nvcomp) => nvcomp,
            None => return eprintln!("skipped, for want of nvCOMP: {INSTALL}"),
        };
        assert!(nvcomp.version().starts_with("6."));
        assert_eq!(size_of::<Options>(), 64);
        let max: MaxOutput = nvcomp.function("nvcompBatchedANSCompressGetMaxOutputChunkSize").unwrap();
        let mut bytes = 0;
        let options = |data_type| Options { first: 0, data_type, rest: [0; 56] };
        // SAFETY: as the header declares it.
        assert_eq!(unsafe { max(CHUNK_BYTES, options(ElementType::Byte as c_int), &mut bytes) }, SUCCESS);
        assert!((CHUNK_BYTES..2 * CHUNK_BYTES).contains(&bytes), "{bytes}");
        // A type that there is none of: the option arrived.
        // SAFETY: as above.
        assert_ne!(unsafe { max(CHUNK_BYTES, options(77), &mut bytes) }, SUCCESS);
        type Alignments = unsafe extern "C" fn(Options, *mut [usize; 3]) -> Status;
        for (method, name) in [
            (Method::Zstd, "nvcompBatchedZstdDecompressGetRequiredAlignments"),
            (Method::Ans, "nvcompBatchedANSDecompressGetRequiredAlignments"),
        ] {
            let get: Alignments = nvcomp.function(name).unwrap();
            let mut found = [0; 3];
            // SAFETY: as the header declares it.
            assert_eq!(unsafe { get(method.decompression(), &mut found) }, SUCCESS);
            assert!(found[0] <= method.align() && CHUNK_BYTES.is_multiple_of(found[1]), "{method:?} {found:?}");
        }
        for name in [
            "nvcompBatchedZstdDecompressGetTempSize",
            "nvcompBatchedZstdDecompressAsync",
            "nvcompBatchedANSDecompressGetTempSize",
            "nvcompBatchedANSDecompressAsync",
            "nvcompBatchedANSCompressGetTempSize",
            "nvcompBatchedANSCompressAsync",
        ] {
            assert!(nvcomp.function::<unsafe extern "C" fn()>(name).is_ok(), "{name}");
        }
    }

    #[test]
    fn without_the_library_the_error_says_what_to_install() {
        let nowhere = PathBuf::from("/nonexistent").join(LIBRARY);
        assert!(Nvcomp::find([nowhere.clone()]).unwrap().is_none());
        assert!(Nvcomp::open(&nowhere).is_err_and(|e| e.to_string().contains("/nonexistent")));
        assert!(missing("a test").to_string().contains("nvidia-libnvcomp-cu13"));
    }
}
