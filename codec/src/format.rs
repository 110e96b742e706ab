//! The names of formats, coders and scale modes, as the command line and the header spell them.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

macro_rules! named_enum {
    ($(#[$doc:meta])* $name:ident, $what:literal, { $($(#[$vdoc:meta])* $variant:ident = $value:literal => $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "lowercase")]
        pub enum $name { $($(#[$vdoc])* $variant = $value),+ }

        impl $name {
            /// Every value, in the header's order.
            pub const ALL: &[$name] = &[$($name::$variant),+];

            /// The value's name on the command line and in JSON.
            pub const fn name(self) -> &'static str {
                match self { $($name::$variant => $text),+ }
            }

            /// The value that a header's byte stands for.
            pub fn from_byte(byte: u8) -> Result<Self> {
                match byte {
                    $($value => Ok($name::$variant),)+
                    other => Err(Error::unsupported("header", format!(
                        "{} {other} is unknown to this version; it may need a newer codecllm", $what))),
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.pad(self.name()) }
        }

        impl std::str::FromStr for $name {
            type Err = Error;
            fn from_str(s: &str) -> Result<Self> {
                Self::ALL.iter().copied().find(|v| v.name() == s).ok_or_else(|| Error::Parameter(format!(
                    "unknown {} `{s}`; expected one of {}", $what,
                    Self::ALL.iter().map(|v| v.name()).collect::<Vec<_>>().join(", "))))
            }
        }
    };
}

named_enum!(
    /// A number format: what a weight's code means. `docs/format.md`, section 3.
    Format, "format", {
        /// The BF16 weight itself: lossless.
        Bf16 = 0 => "bf16",
        /// E4M3 with a scale.
        Fp8 = 1 => "fp8",
        /// Symmetric integers −127 to 127 with an absmax scale.
        Int8 = 2 => "int8",
        /// Integers −127 to 127 on a grid whose step was chosen for a target size or error.
        Rate = 3 => "rate",
    }
);

named_enum!(
    /// The entropy coder.
    Coder, "coder", {
        /// Asymmetric numeral systems, tabled, in blocks of 32 rows: the format's own coder.
        Rans = 0 => "rans",
        /// Zstandard frames of 64 KiB of codes, for comparison and interoperation.
        Zstd = 1 => "zstd",
    }
);

named_enum!(
    /// What shares one scale in the quantizing formats.
    ScaleMode, "scale mode", {
        /// One scale per output channel (row).
        Channel = 0 => "channel",
        /// One scale for the tensor, for comparison.
        Tensor = 1 => "tensor",
    }
);

impl Format {
    /// Bits of a code: 16 for `bf16`, else 8.
    pub const fn code_bits(self) -> u32 {
        match self {
            Self::Bf16 => 16,
            Self::Fp8 | Self::Int8 | Self::Rate => 8,
        }
    }

    /// Whether codes are integers in two's complement, and values multiples of the scale.
    pub const fn is_integer(self) -> bool {
        matches!(self, Self::Int8 | Self::Rate)
    }

    /// Whether every source bit pattern survives.
    pub const fn is_lossless(self) -> bool {
        matches!(self, Self::Bf16)
    }
}
