//! Which instruction set the decoders use: chosen at run time, or forced.

use crate::error::{Error, Result};

/// A CPU instruction-set level that the block decoders and products are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cpu {
    /// Plain Rust: the reference, and what other architectures use.
    Scalar,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 as Ice Lake and Zen 4 have it (F, BW, DQ, VL, VBMI, VBMI2, VNNI, GFNI).
    Avx512,
}

impl Cpu {
    /// Every level, slowest first.
    pub const ALL: &[Cpu] = &[Cpu::Scalar, Cpu::Avx2, Cpu::Avx512];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// The features of this level that the machine lacks; empty where it can run.
    pub fn missing(self) -> Vec<&'static str> {
        #[cfg(target_arch = "x86_64")]
        {
            macro_rules! lacks { ($($f:tt),*) => {{
                let mut v = Vec::new();
                $(if !std::arch::is_x86_feature_detected!($f) { v.push($f); })*
                v
            }}; }
            match self {
                Self::Scalar => Vec::new(),
                Self::Avx2 => lacks!("avx2", "fma", "f16c"),
                Self::Avx512 => lacks!(
                    "avx2",
                    "fma",
                    "f16c",
                    "avx512f",
                    "avx512bw",
                    "avx512dq",
                    "avx512vl",
                    "avx512vbmi",
                    "avx512vbmi2",
                    "avx512vnni",
                    "gfni"
                ),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        match self {
            Self::Scalar => Vec::new(),
            _ => vec!["an x86-64 processor"],
        }
    }

    /// The fastest level that this machine runs.
    pub fn detect() -> Self {
        Self::ALL.iter().rev().copied().find(|c| c.missing().is_empty()).unwrap_or(Self::Scalar)
    }

    /// The levels that this machine runs, slowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.iter().copied().filter(|c| c.missing().is_empty())
    }
}

impl std::fmt::Display for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Cpu {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let cpu = Self::ALL.iter().copied().find(|c| c.name() == s).ok_or_else(|| {
            Error::Parameter(format!("unknown instruction set `{s}`; expected scalar, avx2 or avx512"))
        })?;
        let missing = cpu.missing();
        if missing.is_empty() {
            Ok(cpu)
        } else {
            Err(Error::Parameter(format!(
                "this machine cannot run `{s}`: it lacks {}; the fastest level it has is `{}`",
                missing.join(", "),
                Self::detect()
            )))
        }
    }
}
