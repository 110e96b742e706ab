//! A GPU: found, checked, with a stream of its own and the kernels loaded.

use super::code::{self, Compiled, KernelFile};
use crate::error::{Error, Result};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaModule, CudaSlice, CudaStream, DeviceRepr, DriverError, ValidAsZeroBits,
    result, sys,
};
use cudarc::nvrtc::Ptx;
use std::ffi::c_void;
use std::sync::Arc;

/// The oldest driver that knows everything the kernels are compiled with, as `cuDriverGetVersion` counts: CUDA 13.0.
const MIN_DRIVER: i32 = 13_000;
/// The oldest compute capability that the kernels are compiled for.
const MIN_CAPABILITY: (i32, i32) = (8, 0);

/// A GPU that models run on. All its work goes through one stream, in order.
pub struct Device {
    index: usize,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    n_multiprocessors: u32,
    shared_bytes: u32,
    capability: (i32, i32),
}

/// Blocks, threads and shared memory of a launch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub blocks: (u32, u32, u32),
    pub threads: u32,
    pub shared_bytes: u32,
}

impl Device {
    /// Opens GPU number `index`.
    ///
    /// # Errors
    /// No driver, a driver that is too old, no such GPU, a GPU that is too old: what was found and what is needed.
    pub fn open(index: usize) -> Result<Self> {
        // SAFETY: loads the driver's library, as its first use would.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::device(
                "no NVIDIA driver was found (libcuda.so.1); install one of version 580 or later, or use --device cpu",
            ));
        }
        result::init().map_err(|e| {
            Error::device(format!(
                "the driver finds no usable GPU ({}); see `nvidia-smi`, or use --device cpu",
                text(e)
            ))
        })?;
        let mut driver = 0;
        // SAFETY: the pointer is to a local integer.
        unsafe { sys::cuDriverGetVersion(&mut driver) }.result().map_err(failed("asking for the driver's version"))?;
        if driver < MIN_DRIVER {
            return Err(Error::device(format!(
                "the driver supports CUDA {}.{}; 13.0 is needed: update it to version 580 or later, or use --device cpu",
                driver / 1000,
                driver % 1000 / 10
            )));
        }
        let count = CudaContext::device_count().map_err(failed("counting GPUs"))?;
        if index >= count as usize {
            return Err(Error::device(format!(
                "there is no GPU {index}; this machine has {count}, counted from 0 (--device cuda:N)"
            )));
        }
        let context = CudaContext::new(index).map_err(failed("opening the GPU"))?;
        let capability = context.compute_capability().map_err(failed("asking for the compute capability"))?;
        if capability < MIN_CAPABILITY {
            return Err(Error::device(format!(
                "GPU {index}, {}, has compute capability {}.{}; 8.0 (Ampere) or later is needed",
                context.name().unwrap_or_default(),
                capability.0,
                capability.1
            )));
        }
        // SAFETY: every slice lives on the one stream below, so that no event has to order its uses.
        unsafe { context.disable_event_tracking() };
        // Before what goes on beside it, which has the lowest priority, as any stream that does not ask for another.
        let priority = context.bind_to_thread().and_then(|()| result::stream::get_priority_range());
        let (_, highest) = priority.map_err(failed("asking for the priorities of streams"))?;
        let stream = context.new_stream_with_priority(highest).map_err(failed("making a stream"))?;
        let n_multiprocessors = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(failed("counting multiprocessors"))? as u32;
        let shared_bytes = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
            .map_err(failed("asking for the shared memory"))? as u32;
        Ok(Self { index, context, stream, n_multiprocessors, shared_bytes, capability })
    }

    /// The same GPU with another library's stream, which all work then goes through.
    ///
    /// # Safety
    /// The stream is one of the GPU's primary context, and lives as long as what is returned.
    pub(super) unsafe fn on_stream(&self, stream: sys::CUstream) -> Self {
        // SAFETY: the caller's promise.
        let stream = unsafe { self.context.wrap_borrowed_stream(stream) };
        Self { context: self.context.clone(), stream, ..*self }
    }

    /// The same GPU with another stream, whose work goes on beside this one's, where that leaves it room.
    pub(super) fn beside(&self) -> Result<Self> {
        let stream = self.context.new_stream().map_err(failed("making a stream"))?;
        Ok(Self { context: self.context.clone(), stream, ..*self })
    }

    /// An event, by which a stream can wait for what another has come to.
    pub(super) fn event(&self) -> Result<CudaEvent> {
        self.context.new_event(None).map_err(failed("making an event"))
    }

    /// The GPU's number.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The GPU's name, as its vendor has it.
    pub fn name(&self) -> Result<String> {
        self.context.name().map_err(failed("asking for the name"))
    }

    /// Memory that is free and memory that there is, in bytes.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.context.mem_get_info().map_err(failed("asking for the memory"))
    }

    /// Checks that `bytes` fit the free memory, so that a model that does not is refused before its upload.
    pub fn check_room(&self, bytes: u64) -> Result<()> {
        let (free, total) = self.memory()?;
        if bytes > free as u64 {
            let gb = |n: u64| n as f64 / 1e9;
            return Err(Error::device(format!(
                "GPU {} has {:.2} GB free of {:.2} GB; the weights need {:.2} GB. Compress the model further, or use \
                 --device cpu",
                self.index,
                gb(free as u64),
                gb(total as u64),
                gb(bytes)
            )));
        }
        Ok(())
    }

    /// Waits until everything that was issued is done.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(failed("running the model"))
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The stream as another library takes it, in the context that this thread then has.
    pub(super) fn bound_stream(&self) -> Result<sys::CUstream> {
        self.context.bind_to_thread().map_err(failed("binding the GPU to a thread"))?;
        Ok(self.stream.cu_stream())
    }

    /// Has the next kernel start when everything before is done. For one that reads, before it waits, what the kernel before it writes.
    pub(super) fn separate(&self, word: &mut CudaSlice<u32>) -> Result<()> {
        // Kernels overlap with kernels alone.
        self.stream.memset_zeros(word).map_err(failed("separating two kernels"))
    }

    pub(super) fn n_multiprocessors(&self) -> u32 {
        self.n_multiprocessors
    }

    /// Whether kernels may start while the one before them ends, and thread blocks be clusters: from 9.0 on.
    pub(super) fn has_clusters(&self) -> bool {
        self.capability >= (9, 0)
    }

    /// Shared memory that a thread block may have, what its kernel declares included, in bytes.
    pub(super) fn shared_bytes(&self) -> u32 {
        self.shared_bytes
    }

    /// Loads a file of kernels: as it is compiled into this program, or compiled here where the driver takes none of that.
    ///
    /// # Errors
    /// Neither is possible: why, and what to install.
    pub(super) fn load(&self, file: &KernelFile) -> Result<Arc<CudaModule>> {
        if std::env::var_os(code::VARIABLE).is_some_and(|v| v == "1") {
            return self.compile(file);
        }
        let (major, minor) = self.capability;
        let problem = |e: DriverError| {
            format!("the driver refuses the kernels for compute capability {major}.{minor} ({})", text(e))
        };
        match self.context.load_module(Ptx::from_binary(file.fatbin.to_vec())) {
            Ok(module) => Ok(module),
            Err(e) if has_no_code(e) => self.compile(file).map_err(|second| {
                Error::device(format!("{}; update it to version 580 or later. In place of that: {second}", problem(e)))
            }),
            Err(e) => Err(Error::device(problem(e))),
        }
    }

    /// Has NVRTC compile a file of kernels, and loads what comes out.
    fn compile(&self, file: &KernelFile) -> Result<Arc<CudaModule>> {
        let (major, minor) = self.capability;
        eprintln!("compiling {} for compute capability {major}.{minor}; on one core it may take a minute", file.name);
        let ptx = match code::compile(file, self.capability)? {
            Compiled::Cubin(code) => Ptx::from_binary(code),
            Compiled::Ptx(source) => Ptx::from_src(source),
        };
        self.context.load_module(ptx).map_err(failed("loading kernels that NVRTC compiled"))
    }

    /// Finds a kernel, has it run beside others (which takes as much shared memory of all: a multiprocessor has to be idle for another
    /// division between that and its cache), and lets it take `shared_bytes` of dynamic shared memory where that is more than any may.
    pub(super) fn kernel(&self, module: &Arc<CudaModule>, name: &str, shared_bytes: u32) -> Result<CudaFunction> {
        let kernel = module.load_function(name).map_err(failed(name))?;
        let carveout = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        kernel.set_attribute(carveout, 100).map_err(failed(name))?;
        if shared_bytes > 48 << 10 {
            let limit = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            kernel.set_attribute(limit, shared_bytes as i32).map_err(failed(name))?;
        }
        Ok(kernel)
    }

    /// Launches a kernel whose one parameter is the structure `params`.
    ///
    /// On GPUs that can (9.0 and later) the kernel starts while the one before it ends: it has to execute
    /// `griddepcontrol.wait` before it touches what others write.
    ///
    /// # Safety
    /// `params` has the layout that the kernel declares, and its pointers have the room that the kernel takes.
    pub(super) unsafe fn launch<P: Copy>(&self, kernel: &CudaFunction, grid: Grid, params: &P) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_clusters(kernel, grid, (1, 1), params) }
    }

    /// The same, with clusters of so many blocks along x and y: of one, on a GPU that does not [have them](Self::has_clusters).
    ///
    /// # Safety
    /// As of [`Self::launch`].
    pub(super) unsafe fn launch_clusters<P: Copy>(
        &self,
        kernel: &CudaFunction,
        grid: Grid,
        cluster: (u32, u32),
        params: &P,
    ) -> Result<()> {
        self.context.bind_to_thread().map_err(failed("binding the GPU to a thread"))?;
        let attribute = |id, value| sys::CUlaunchAttribute { id, pad: Default::default(), value };
        let dim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: cluster.0, y: cluster.1, z: 1 };
        let mut attributes = [
            attribute(
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
            ),
            attribute(
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                sys::CUlaunchAttributeValue { clusterDim: dim },
            ),
        ];
        let config = sys::CUlaunchConfig {
            gridDimX: grid.blocks.0,
            gridDimY: grid.blocks.1,
            gridDimZ: grid.blocks.2,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared_bytes,
            hStream: self.stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: u32::from(self.has_clusters()) + u32::from(cluster != (1, 1)),
        };
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: the configuration and the argument live until the call returns, which copies them.
        unsafe { sys::cuLaunchKernelEx(&config, kernel.cu_function(), arguments.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(failed("launching a kernel"))
    }

    /// Allocates `len` zeros.
    pub(super) fn zeros<T: DeviceRepr + ValidAsZeroBits>(&self, len: usize) -> Result<CudaSlice<T>> {
        self.stream.alloc_zeros(len).map_err(|e| self.out_of_memory(e, len * size_of::<T>()))
    }

    /// The error of an allocation of `bytes` that failed.
    pub(super) fn out_of_memory(&self, e: DriverError, bytes: usize) -> Error {
        let free = self.memory().map_or(0, |(free, _)| free);
        Error::device(format!(
            "GPU {} cannot give {:.1} MB of memory; {:.1} MB are free ({})",
            self.index,
            bytes as f64 / 1e6,
            free as f64 / 1e6,
            text(e)
        ))
    }
}

/// Turns a driver's error into ours; `doing` says what failed.
pub(super) fn failed(doing: &str) -> impl FnOnce(DriverError) -> Error {
    move |e| Error::device(format!("{doing} failed: {}", text(e)))
}

/// Whether a fatbin was refused for having nothing that the driver can run or compile for the GPU.
fn has_no_code(e: DriverError) -> bool {
    use sys::CUresult::*;
    matches!(
        e.0,
        CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUDA_ERROR_INVALID_IMAGE
            | CUDA_ERROR_INVALID_PTX
            | CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | CUDA_ERROR_JIT_COMPILER_NOT_FOUND
            | CUDA_ERROR_JIT_COMPILATION_DISABLED
    )
}

/// The driver's own words.
fn text(e: DriverError) -> String {
    e.error_string().map_or_else(|_| format!("{e:?}"), |s| s.to_string_lossy().into_owned())
}
