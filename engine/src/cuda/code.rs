//! The kernels' code: compiled ahead into fatbins that are part of the program, or, where the driver takes none of what is in those,
//! compiled here from the same sources by NVRTC, NVIDIA's compiler library.

use crate::error::{Error, Result};
use cudarc::nvrtc::sys;
use std::ffi::{CStr, CString, c_char, c_int};

/// Set to 1, it has NVRTC compile the kernels even where the fatbins would do.
pub(super) const VARIABLE: &str = "CODECLLM_NVRTC";
/// More options for NVRTC, separated by spaces.
const OPTIONS_VARIABLE: &str = "CODECLLM_NVRTC_OPTIONS";
const INSTALL: &str =
    "pip install 'nvidia-cuda-nvrtc>=13,<14', or the CUDA toolkit, with its folder in LD_LIBRARY_PATH";
/// What `scripts/build-kernels.sh` compiles for.
const AHEAD: [c_int; 6] = [80, 86, 89, 90, 100, 120];
/// What of a compiler's log an error quotes.
const LOG_CHARS: usize = 1000;

/// One file of kernels.
pub(super) struct KernelFile {
    pub name: &'static str,
    /// By `scripts/build-kernels.sh`.
    pub fatbin: &'static [u8],
    source: &'static str,
}

macro_rules! kernel_file {
    ($name:literal) => {
        KernelFile {
            name: concat!($name, ".cu"),
            fatbin: include_bytes!(concat!("../../cuda/", $name, ".fatbin")),
            source: include_str!(concat!("../../cuda/", $name, ".cu")),
        }
    };
}

/// Kernels on encoded tensors.
pub(super) const ENCODED: KernelFile = kernel_file!("encoded");
/// The other operations of a forward pass.
pub(super) const MODEL: KernelFile = kernel_file!("model");
/// Drawing a token.
pub(super) const SAMPLE: KernelFile = kernel_file!("sample");
/// The codes of `zstd` tensors.
pub(super) const CODES: KernelFile = kernel_file!("codes");
/// What only the bench runs.
pub(super) const BENCH: KernelFile = kernel_file!("bench");

/// What sources include, and what stands for NVIDIA's and the standard library's headers.
const HEADERS: [(&CStr, &str); 12] = [
    (c"activations.cuh", include_str!("../../cuda/activations.cuh")),
    (c"common.cuh", include_str!("../../cuda/common.cuh")),
    (c"decode.cuh", include_str!("../../cuda/decode.cuh")),
    (c"launch.cuh", include_str!("../../cuda/launch.cuh")),
    (c"one_token.cuh", include_str!("../../cuda/one_token.cuh")),
    (c"rows.cuh", include_str!("../../cuda/rows.cuh")),
    (c"tensor_cores.cuh", include_str!("../../cuda/tensor_cores.cuh")),
    (c"tiles.cuh", include_str!("../../cuda/tiles.cuh")),
    (c"values.cuh", include_str!("../../cuda/values.cuh")),
    (c"cuda_bf16.h", STAND_IN),
    (c"cstdint", STAND_IN),
    (c"type_traits", STAND_IN),
];
const STAND_IN: &str = include_str!("../../cuda/nvrtc.h");

/// What NVRTC made.
pub(super) enum Compiled {
    /// For the very architecture.
    Cubin(Vec<u8>),
    /// For one that the driver compiles on from.
    Ptx(String),
}

/// Compiles a file for GPUs of a compute capability, as in (9, 0).
///
/// # Errors
/// NVRTC is not there, or too old, or finds fault with the source.
pub(super) fn compile(file: &KernelFile, capability: (i32, i32)) -> Result<Compiled> {
    // SAFETY: loads the library, as its first use would.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::device(format!("compiling the kernels here needs NVRTC, which was not found: {INSTALL}")));
    }
    let (architecture, is_binary) = target(&supported()?, capability)?;
    let mut options =
        vec!["--std=c++17".into(), "-default-device".into(), format!("--gpu-architecture={architecture}")];
    let (mut major, mut minor) = (0, 0);
    // SAFETY: pointers to local integers.
    check(unsafe { sys::nvrtcVersion(&mut major, &mut minor) }, "asking NVRTC for its version")?;
    if major >= 13 {
        // On all cores: there are many kernels.
        options.push("--split-compile=0".into());
    }
    options.extend(std::env::var(OPTIONS_VARIABLE).unwrap_or_default().split_whitespace().map(String::from));
    let program = Program::new(file)?;
    program.compile(&options).map_err(|e| Error::device(format!("NVRTC {major}.{minor}: {e}")))?;
    match is_binary {
        true => program.output(sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN).map(Compiled::Cubin),
        false => program.output(sys::nvrtcGetPTXSize, sys::nvrtcGetPTX).map(|ptx| Compiled::Ptx(text(&ptx))),
    }
}

/// The architectures that NVRTC compiles for, as in 90, ascending.
fn supported() -> Result<Vec<c_int>> {
    let mut n = 0;
    // SAFETY: a pointer to a local integer.
    check(unsafe { sys::nvrtcGetNumSupportedArchs(&mut n) }, "asking NVRTC for its architectures")?;
    let mut all = vec![0; n as usize];
    // SAFETY: there is room for as many as it counted.
    check(unsafe { sys::nvrtcGetSupportedArchs(all.as_mut_ptr()) }, "asking NVRTC for its architectures")?;
    Ok(all)
}

/// What to compile for, and whether that is machine code: which runs within a major version, from its minor version on.
fn target(supported: &[c_int], capability: (i32, i32)) -> Result<(String, bool)> {
    let wanted = 10 * capability.0 + capability.1;
    let fits = |found: &c_int| (80..=wanted).contains(found);
    // The sources tell apart those that the fatbins are for.
    let as_ahead = |found: &c_int| fits(found) && AHEAD.contains(found) && found / 10 == capability.0;
    let nearest = |fits: &dyn Fn(&c_int) -> bool| supported.iter().copied().filter(fits).max();
    let Some(best) = nearest(&as_ahead).or_else(|| nearest(&fits)) else {
        return Err(Error::device(format!(
            "this NVRTC does not compile for compute capability {}.{}: {INSTALL}",
            capability.0, capability.1
        )));
    };
    Ok(match best / 10 == capability.0 {
        // As the fatbin is.
        true if best == 90 => ("sm_90a".into(), true),
        true => (format!("sm_{best}"), true),
        false => (format!("compute_{best}"), false),
    })
}

struct Program {
    program: sys::nvrtcProgram,
    name: &'static str,
    /// What it may point to.
    _texts: Vec<CString>,
}

impl Program {
    fn new(file: &KernelFile) -> Result<Self> {
        let c_text = |text: &str| CString::new(text).map_err(|_| Error::device("a kernel's source has a zero byte"));
        let mut texts = vec![c_text(file.source)?, c_text(file.name)?];
        for (_, header) in HEADERS {
            texts.push(c_text(header)?);
        }
        let headers: Vec<*const c_char> = texts[2..].iter().map(|text| text.as_ptr()).collect();
        let names = HEADERS.map(|(name, _)| name.as_ptr());
        let mut program = std::ptr::null_mut();
        let n = HEADERS.len() as c_int;
        // SAFETY: strings that end in zero; as many headers as names.
        let status = unsafe {
            let (source, name) = (texts[0].as_ptr(), texts[1].as_ptr());
            sys::nvrtcCreateProgram(&mut program, source, name, n, headers.as_ptr(), names.as_ptr())
        };
        check(status, "starting NVRTC")?;
        Ok(Self { program, name: file.name, _texts: texts })
    }

    fn compile(&self, options: &[String]) -> Result<()> {
        let texts = options.iter().map(|option| CString::new(option.as_str()).unwrap_or_default()).collect::<Vec<_>>();
        let options: Vec<*const c_char> = texts.iter().map(|text| text.as_ptr()).collect();
        // SAFETY: the program is there, and the options are strings that end in zero.
        let status = unsafe { sys::nvrtcCompileProgram(self.program, options.len() as c_int, options.as_ptr()) };
        check(status, &format!("compiling {}", self.name)).map_err(|e| {
            let log = self.output(sys::nvrtcGetProgramLogSize, sys::nvrtcGetProgramLog).unwrap_or_default();
            let log: String = text(&log).trim().chars().take(LOG_CHARS).collect();
            Error::device(format!("{e}\n{log}"))
        })
    }

    /// What a pair of functions, one for the size, says of the program.
    fn output(
        &self,
        size: unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult,
        get: unsafe fn(sys::nvrtcProgram, *mut c_char) -> sys::nvrtcResult,
    ) -> Result<Vec<u8>> {
        let mut n = 0;
        // SAFETY: the program is there.
        check(unsafe { size(self.program, &mut n) }, "reading what NVRTC made")?;
        let mut bytes = vec![0u8; n];
        // SAFETY: there is room for what was counted.
        check(unsafe { get(self.program, bytes.as_mut_ptr().cast()) }, "reading what NVRTC made")?;
        Ok(bytes)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and destroyed only here. There is nothing to do where that fails.
        let _ = unsafe { sys::nvrtcDestroyProgram(&mut self.program) };
    }
}

fn check(status: sys::nvrtcResult, doing: &str) -> Result<()> {
    match status {
        sys::nvrtcResult::NVRTC_SUCCESS => Ok(()),
        status => Err(Error::device(format!("{doing} failed: {status:?}"))),
    }
}

/// Up to the zero that ends it.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|&b| b == 0).next().unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_architecture_is_chosen() {
        let known = [75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121];
        for (capability, expected) in [
            ((8, 0), ("sm_80", true)),
            ((8, 7), ("sm_86", true)),
            ((9, 0), ("sm_90a", true)),
            ((10, 3), ("sm_100", true)),
            ((11, 0), ("sm_110", true)),
            ((12, 1), ("sm_120", true)),
            ((13, 0), ("compute_121", false)),
        ] {
            assert_eq!(target(&known, capability).unwrap(), (expected.0.to_string(), expected.1), "{capability:?}");
        }
        assert!(target(&[100, 120], (9, 0)).is_err_and(|e| e.to_string().contains("9.0")));
    }

    /// Needs the library, not a GPU. The stand-ins have all that the sources use; the largest file only goes as far as PTX, for
    /// machine code takes a minute.
    #[test]
    fn nvrtc_compiles_the_sources() {
        // SAFETY: loads the library.
        if !unsafe { sys::is_culib_present() } {
            let problem = compile(&BENCH, (9, 0)).err().unwrap().to_string();
            assert!(problem.contains("nvidia-cuda-nvrtc"), "{problem}");
            assert!(std::env::var("CODECLLM_REQUIRE_NVRTC").as_deref() != Ok("1"), "{problem}");
            return eprintln!("skipped: {problem}");
        }
        for file in [BENCH, CODES, MODEL, SAMPLE] {
            for capability in [(8, 0), (9, 0)] {
                let Compiled::Cubin(code) = compile(&file, capability).unwrap() else { panic!("{} as PTX", file.name) };
                assert!(code.starts_with(b"\x7fELF"), "{}", file.name);
            }
        }
        let newest = supported().unwrap().into_iter().max().unwrap();
        let Compiled::Ptx(ptx) = compile(&ENCODED, (newest / 10 + 1, 0)).unwrap() else { panic!("machine code") };
        assert!(ptx.contains(".entry product_1_int8(") && ptx.contains(".entry decode_values_bf16_any("));
    }
}
